"""The quickstart's run on a stack that answers what the tests want: what it does, shows and refuses."""

import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from scripts import prompt_injection, quickstart
from scripts.prompt_injection import Split
from scripts.quickstart import MODEL, StepFailed

SPLITS = {"train": 800, "validation": 48, "test": 240, "other_test": 150}


class FakeStack:
    """A stack whose jobs end at once. `statuses` are those of the jobs whose id starts with the key, one by one."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.answer = "The capital is Paris."
        self.statuses: dict[str, list[dict[str, Any]]] = {
            "evaluate-base": [completed(evaluated(0.125))],
            "tune": [completed({"seconds": 61, "tokens_per_second": 432, "loss": 0.25})],
            "evaluate-tuned": [completed(evaluated(0.95))],
            "evaluate-other": [completed(evaluated(0.75))],
        }

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if request.method == "POST":
            body = json.loads(request.content)
            self.requests.append((path, body))
            if path == "/inference/chat_completion":
                return httpx.Response(200, json={"completion_message": {"content": self.answer}})
            if path == "/v1/chat/completions":
                return httpx.Response(200, json={"choices": [{"message": {"content": self.answer}}]})
            return httpx.Response(200, json={})
        job_uuid = request.url.params["job_uuid"]
        if path == "/post_training/job/artifacts":
            return httpx.Response(200, json={"metrics": [{"name": "loss", "step": 1, "value": 0.5}]})
        (statuses,) = (statuses for name, statuses in self.statuses.items() if job_uuid.startswith(name))
        return httpx.Response(200, json=statuses.pop(0))

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for requested, body in self.requests if requested == path]


def completed(metrics: dict[str, float]) -> dict[str, Any]:
    return {"status": "completed", "metrics": metrics}


def evaluated(em: float, examples: int = 240) -> dict[str, float]:
    tokens = {"prompt_tokens": 900, "completion_tokens": 100}
    return {"em": em, "f1": em, "examples": examples, "seconds": 10.0, **tokens}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the quickstart prints."""
    printed = io.StringIO()
    monkeypatch.setattr(quickstart, "console", Console(file=printed, width=200, highlight=False))
    return printed


@pytest.fixture
def fake(home: Path, shown: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> FakeStack:
    def write_splits(source: Path, folder: Path) -> dict[str, Split]:
        assert source == home / "packaged-data" / "prompt-injection"
        assert folder.parent == home / "data" / "prompt-injection"
        return {name: Split(folder / f"{name}.jsonl", rows, 0.625, 3) for name, rows in SPLITS.items()}

    fake = FakeStack()
    client = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **options: client(**options, transport=httpx.MockTransport(fake)))
    monkeypatch.setattr(prompt_injection, "write_splits", write_splits)
    monkeypatch.setattr(quickstart, "POLL_S", 0)
    return fake


def run() -> None:
    quickstart.run("http://stack")


def rows(shown: io.StringIO) -> list[list[str]]:
    """The printed lines that are parts of a table, as cells."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in shown.getvalue().splitlines()]
    return [line for line in lines if len(line) > 1]


def test_a_whole_run(fake: FakeStack, home: Path, shown: io.StringIO) -> None:
    run()
    table = rows(shown)
    assert ["before", "after", "gain"] in table
    assert ["exact match, S-Labs test (240 rows)", "0.125", "0.950", "+0.825"] in table
    assert ["F1", "0.125", "0.950", "+0.825"] in table
    assert ["always the commonest label", "–", "0.625"] in table
    assert ["exact match, neuralchemy (150 rows)", "–", "0.750"] in table
    assert ["training time", "61 s"] in table
    (report,) = (home / "reports").iterdir()
    assert f"Report: {report}" in shown.getvalue()
    assert "<td class=number>0.950</td>" in report.read_text()


def test_the_tuned_model_is_what_is_asked_and_evaluated(fake: FakeStack) -> None:
    run()
    (tuning,) = fake.bodies("/post_training/supervised_fine_tune")
    tuned = f"{MODEL}:{tuning['job_uuid']}"
    base, after, other = fake.bodies("/evaluate/question_answering/")
    assert [body["checkpoint"] for body in (base, after, other)] == [MODEL, tuned, tuned]
    assert base["dataset"] == after["dataset"] != other["dataset"]
    assert tuning["dataset"] not in (base["dataset"], other["dataset"])
    registered = {body["uuid"]: body["dataset"]["content_url"] for body in fake.bodies("/datasets/create")}
    assert registered[base["dataset"]].endswith("/test.jsonl")
    assert registered[other["dataset"]].endswith("/other_test.jsonl")
    assert registered[tuning["dataset"]].endswith("/train.jsonl")
    assert registered[tuning["validation_dataset"]].endswith("/validation.jsonl")
    assert tuned in [body["model"] for body in fake.bodies("/inference/chat_completion")]


@pytest.mark.parametrize("job", ["evaluate-base", "tune", "evaluate-tuned", "evaluate-other"])
@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"status": "failed", "error": "out of memory"}, "failed: out of memory"),
        ({"status": "cancelled"}, "was cancelled"),
        ({"status": "cancelled", "error": None, "metrics": None, "progress": None}, "was cancelled"),
    ],
)
def test_a_job_that_is_not_completed_ends_the_run(
    fake: FakeStack, job: str, status: dict[str, Any], words: str
) -> None:
    running = {"status": "running", "progress": {"done": 1, "total": 2, "unit": "rows", "seconds_left": None}}
    fake.statuses[job] = [{"status": "scheduled"}, running, status]
    with pytest.raises(StepFailed, match=f"the job {job}.* {words}$"):
        run()
    assert fake.statuses[job] == []


@pytest.mark.parametrize(("em", "enough"), [(0.899, False), (0.9, True)])
def test_too_low_a_score_fails_the_run_after_its_report(
    fake: FakeStack, home: Path, shown: io.StringIO, em: float, enough: bool
) -> None:
    fake.statuses["evaluate-tuned"] = [completed(evaluated(em))]
    if enough:
        run()
    else:
        with pytest.raises(StepFailed, match=r"reached 0.899 exact match, less than 0.90"):
            run()
    assert len(list((home / "reports").iterdir())) == 1
    assert ["exact match, S-Labs test (240 rows)", "0.125", f"{em:.3f}", f"{em - 0.125:+.3f}"] in rows(shown)


@pytest.mark.parametrize("job", ["evaluate-base", "evaluate-tuned"])
def test_too_few_examples_fail_the_run(fake: FakeStack, job: str) -> None:
    fake.statuses[job] = [completed(evaluated(1.0, examples=199))]
    with pytest.raises(StepFailed, match="only 199 examples of the test split were evaluated, fewer than 200"):
        run()


def test_just_enough_examples(fake: FakeStack) -> None:
    fake.statuses["evaluate-tuned"] = [completed(evaluated(1.0, examples=200))]
    run()


def test_a_model_that_does_not_know_the_capital_fails_the_run(fake: FakeStack) -> None:
    fake.answer = "Lyon"
    with pytest.raises(StepFailed, match="the model answered 'Lyon'"):
        run()


def test_a_refused_request_fails_the_run(home: Path) -> None:
    reply = httpx.Response(409, text="taken", request=httpx.Request("POST", "http://stack/datasets/create"))
    with pytest.raises(StepFailed, match="POST /datasets/create answered 409: taken"):
        quickstart.answer_of(reply)
