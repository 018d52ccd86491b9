"""Benchmarks: lm-eval itself, with tasks of one's own, against the scripted engine; and the door that it asks at."""

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from stack import evaluations
from stack.api.evaluations import EvaluateBenchmarkRequest
from stack.context import Context
from stack.errors import BadInput, NotFound, StackError, StorageFull, TooManyRequests, Unavailable
from tests.asked_here import work_of
from tests.scripted_engine import ScriptedEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs import asking, benchmark_report, engine_door, evaluate_benchmark
    from jobs.kept_answers import KeptAnswers

WORDS = ["What", "is", "the", "capital", "of", "France", "?", "Paris", "a", "long", "answer", "in", "words"]
BOS = 2
MOST = 2**20
ASKING = """task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/capitals.json}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSING = """task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/capitals.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["Paris", "a long answer in words"]
doc_to_target: !function labels.label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


ALONE = """from pathlib import Path

from lm_eval.api.task import ConfigurableTask

DATA = Path(__file__).with_name("capitals.json")


def named(doc, results):
    return {"named": float(doc["answer"] in results[0])}


class Task(ConfigurableTask):
    def __init__(self):
        super().__init__(config={
            "task": "alone",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(DATA)}},
            "test_split": "test",
            "output_type": "generate_until",
            "generation_kwargs": {"until": ["\\n"], "max_gen_toks": 8},
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "process_results": named,
            "metric_list": [{"metric": "named", "aggregation": "mean", "higher_is_better": True}],
        })
"""


def save_tokenizer(folder: Path, begins: bool = False, template: str | None = None) -> None:
    """A tokenizer of words, which may put a <s> before them, and have a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", "<s>", *WORDS]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokens = dict(unk_token="<unk>", eos_token="<eos>", bos_token="<s>")
    saved = PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **tokens)
    saved.save_pretrained(folder)


@pytest.fixture
def tasks(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with two tasks of one's own, their data beside them; and the model's tokenizer."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    save_tokenizer(home / "models" / "small")
    folder = home / "tasks"
    folder.mkdir()
    capitals = {"France": "Paris", "England": "London"}
    rows = [{"question": f"What is the capital of {name} ?", "answer": city} for name, city in capitals.items()]
    (folder / "capitals.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "capitals.yaml").write_text(ASKING.replace("FOLDER", str(folder)))
    (folder / "choices.yaml").write_text(CHOOSING.replace("FOLDER", str(folder)))
    (folder / "labels.py").write_text("def label(row):\n    return 0 if row['answer'] == 'Paris' else 1\n")
    return folder


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[KeptAnswers]:
    with KeptAnswers(tmp_path / "answers", MOST) as kept:
        yield kept


@pytest.fixture
def door(context: Context, kept: KeptAnswers) -> Iterator[engine_door.Door]:
    with engine_door.opened(context, kept) as door:
        yield door


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how long the door has waited: nobody does."""
    waited: list[float] = []

    async def pause(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(asking, "pause", pause)
    monkeypatch.setattr("stack.batch_inference.pause", pause)
    return waited


def request(*tasks: str, **changes: Any) -> EvaluateBenchmarkRequest:
    body = {"job_uuid": "benchmark-1", "tasks": tasks, "checkpoint": "small"} | changes
    return EvaluateBenchmarkRequest.model_validate(body)


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_lm_eval_runs_tasks_of_ones_own_against_the_engine(
    context: Context, engine: ScriptedEngine, tasks: Path, door: engine_door.Door, tmp_path: Path
) -> None:
    engine.tokens = ("Paris",)
    (results := tmp_path / "results").mkdir()
    found = evaluate_benchmark.run(door, context.models.get("small"), request("capitals", "choices"), [tasks])
    scores = evaluate_benchmark.scores(found)
    # The shorter continuation is the likelier one: each of its tokens is as likely as any other.
    assert (scores["capitals/exact_match"], scores["choices/acc"]) == (0.5, 0.5)
    assert "capitals/exact_match_stderr" in scores
    assert {one.endpoint for one in engine.asked} == {"completions"}
    assert {one.model.id for one in engine.asked} == {"small"}
    assert len(engine.asked) == 2 + 2 * 2
    assert found["configs"]["choices"]["metadata"]["pretrained"] == str(tasks.parent / "models" / "small")
    evaluate_benchmark._write(results, found)
    assert "|capitals|" in (results / "table.md").read_text()
    told = (results / "results.json").read_text()
    assert json.loads(told)["results"]["choices"]["acc,none"] == 0.5
    assert len((results / "samples_capitals.jsonl").read_text().splitlines()) == 2
    assert str(tasks.parent) not in told, "no tenant need know where the stack lies"
    assert not {"pretty_env_info", "upper_git_hash", "git_hash"} & set(json.loads(told))


@pytest.mark.filterwarnings("ignore")
def test_a_limit_is_of_the_examples_of_each_task(
    context: Context, engine: ScriptedEngine, tasks: Path, door: engine_door.Door
) -> None:
    engine.tokens = ("Paris",)
    found = evaluate_benchmark.run(door, context.models.get("small"), request("capitals", limit=1), [tasks])
    assert evaluate_benchmark.scores(found)["capitals/exact_match"] == 1
    assert len(engine.asked) == 1


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_refused_with_those_that_are_there(
    context: Context, tasks: Path, door: engine_door.Door
) -> None:
    with pytest.raises(BadInput, match="no task 'capitols'") as caught:
        evaluate_benchmark.run(door, context.models.get("small"), request("capitols"), [tasks])
    assert caught.value.message.endswith("of those in the stack's own folder tasks: capitals, choices")
    assert str(tasks.parent) not in caught.value.message


@pytest.mark.filterwarnings("ignore")
def test_a_task_is_added_with_one_python_file(
    context: Context, engine: ScriptedEngine, tasks: Path, door: engine_door.Door, tmp_path: Path
) -> None:
    engine.tokens = ("Paris",)
    (tasks / "alone.py").write_text(ALONE)
    for _ in range(2):  # another attempt finds what the first has made
        made = evaluate_benchmark.python_tasks(["alone", "capitals", "labels", "arc_easy"], tasks, tmp_path / "made")
    assert {file.name for file in made.iterdir()} == {"alone.py", "alone.yaml"}, "labels.py has functions of a task"
    found = evaluate_benchmark.run(door, context.models.get("small"), request("alone", "capitals"), [tasks, made])
    scores = evaluate_benchmark.scores(found)
    assert (scores["alone/named"], scores["capitals/exact_match"]) == (0.5, 0.5)
    (results := tmp_path / "results").mkdir()
    evaluate_benchmark._write(results, found)
    assert len((results / "samples_alone.jsonl").read_text().splitlines()) == 2


def test_a_python_file_that_is_none_is_refused(tasks: Path, tmp_path: Path) -> None:
    (tasks / "alone.py").write_text("class Task(:")
    with pytest.raises(
        BadInput, match=r"the task 'alone' cannot be read: alone\.py is no Python: invalid syntax"
    ) as caught:
        evaluate_benchmark.python_tasks(["alone"], tasks, tmp_path / "made")
    assert str(tasks) not in caught.value.message


def beginnings(engine: ScriptedEngine) -> set[tuple[int, ...]]:
    """The first two tokens of what the engine was asked."""
    return {tuple(one.body["prompt"][0][:2]) for one in engine.asked}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("begins", "first"), [(True, (BOS, 3)), (False, (3, 4))])
def test_a_prompt_begins_as_the_tokenizer_has_it(
    context: Context, engine: ScriptedEngine, tasks: Path, door: engine_door.Door, begins: bool, first: tuple[int, int]
) -> None:
    save_tokenizer(tasks.parent / "models" / "small", begins)
    evaluate_benchmark.run(door, context.models.get("small"), request("capitals", "choices"), [tasks])
    assert beginnings(engine) == {first}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("written", ["<s> ", ""])
def test_a_chat_begins_once_whether_its_template_writes_that_or_not(
    context: Context, engine: ScriptedEngine, tasks: Path, door: engine_door.Door, written: str
) -> None:
    template = written + "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    save_tokenizer(tasks.parent / "models" / "small", begins=True, template=template)
    wanted = request("capitals", apply_chat_template=True)
    evaluate_benchmark.run(door, context.models.get("small"), wanted, [tasks])
    assert beginnings(engine) == {(BOS, 3)}


@pytest.mark.filterwarnings("ignore")
def test_a_benchmark_outlasts_a_model_that_is_away_for_a_while(
    context: Context, engine: ScriptedEngine, tasks: Path, door: engine_door.Door, pauses: list[float]
) -> None:
    engine.tokens = ("Paris",)
    faults: list[StackError] = [Unavailable("it starts", retry_after=30), TooManyRequests("full", retry_after=1)]
    engine.fail_for = lambda _: faults.pop() if faults else None
    found = evaluate_benchmark.run(door, context.models.get("small"), request("capitals"), [tasks])
    assert evaluate_benchmark.scores(found)["capitals/exact_match"] == 0.5
    assert sorted(pauses) == [1, 30]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Unavailable("the model is gone"), Unavailable),
        (TooManyRequests("the model is gone"), Unavailable),
        (BadInput("the model is gone"), BadInput),
    ],
)
def test_a_model_that_stays_away_loses_the_attempt_and_a_wrong_question_fails_the_job(
    context: Context, engine: ScriptedEngine, tasks: Path, door: engine_door.Door, fault: StackError, kind: Any
) -> None:
    engine.fail_for = lambda _: fault
    with pytest.raises(kind, match="the model is gone"):
        evaluate_benchmark.run(door, context.models.get("small"), request("capitals", limit=1), [tasks])


@pytest.mark.filterwarnings("ignore")
def test_another_attempt_at_a_benchmark_asks_nothing_that_was_answered(
    context: Context, engine: ScriptedEngine, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_benchmark.ray, "init", lambda: None)
    engine.tokens = ("Paris",)
    engine.fail_for = lambda body: Unavailable("away") if body.get("echo") else None
    wanted = request("capitals", "choices")
    job = evaluations.benchmark(context, wanted)
    with work_of(context, job) as work, pytest.raises(Unavailable):
        evaluate_benchmark.benchmark(work, wanted)
    engine.fail_for = lambda _: None
    engine.asked.clear()
    with work_of(context, job) as work:
        result = evaluate_benchmark.benchmark(work, wanted).result
    assert len(engine.asked) == 2 * 2
    assert all(one.body.get("echo") for one in engine.asked)
    assert {"report.html", "results.json", "table.md"} < {one["name"] for one in result["files"]}
    report = (Path(result["path"].removeprefix("file://")) / "report.html").read_text()
    for name, wrong in (("capitals/exact_match", "1"), ("choices/acc", "1")):
        worst = report.split(f"Worst examples by {name}")[1]
        assert f"<tr><td>{wrong}</td><td>0</td><td>What is the capital of England ?</td>" in worst


def test_answers_are_kept_by_what_was_asked(tmp_path: Path) -> None:
    file = tmp_path / "answers"
    with KeptAnswers(file, MOST) as kept:
        kept.add(["chat", {"a": 1, "b": 2}], b'{"answer": "\xc3\xa9"}')
        kept.add(["chat", {"a": 2}], b"x" * 100_000)
        assert kept.find(["chat", {"b": 2, "a": 1}]) == b'{"answer": "\xc3\xa9"}'
        kept.add(["completions", {"a": 2}], b"")
    whole = file.stat().st_size
    assert whole < 2_000
    with file.open("ab") as lines:
        lines.write(b"0" * 64 + b" half of a li")  # of a driver that was killed
    with KeptAnswers(file, MOST) as kept:
        assert (len(kept), file.stat().st_size) == (3, whole)
        assert kept.find(["chat", {"a": 2}]) == b"x" * 100_000
        assert kept.find(["completions", {"a": 2}]) == b""
        assert kept.find(["completions", {"a": 3}]) is None


def test_answers_are_kept_as_far_as_there_is_room(tmp_path: Path) -> None:
    with KeptAnswers(tmp_path / "answers", 200) as kept:
        kept.add(["chat", {"a": 1}], b"first")
        with pytest.raises(StorageFull, match=r"1 answers take .* allowed: 200 bytes; ask for fewer tasks") as caught:
            kept.add(["chat", {"a": 2}], bytes(range(256)))
        assert (len(kept), kept.find(["chat", {"a": 2}])) == (1, None)
        kept.add(["chat", {"a": 3}], b"third")
    assert "set a lower limit" in caught.value.message
    with KeptAnswers(tmp_path / "answers", 200) as kept:
        assert kept.find(["chat", {"a": 3}]) == b"third"
        with pytest.raises(StorageFull):
            kept.add(["chat", {"a": 4}], b"fourth")


@pytest.mark.filterwarnings("ignore")
def test_a_benchmark_that_has_more_answers_than_there_is_room_for_ends_by_that(
    context: Context, tasks: Path, tmp_path: Path
) -> None:
    with KeptAnswers(tmp_path / "few", 100) as kept, engine_door.opened(context, kept) as door:
        with pytest.raises(StorageFull, match="0 answers take 0 bytes, and there are more; allowed: 100 bytes"):
            evaluate_benchmark.run(door, context.models.get("small"), request("capitals"), [tasks])
        assert isinstance(door.errors[0], StorageFull)


@pytest.mark.filterwarnings("ignore")
def test_a_benchmark_tells_how_many_of_its_questions_are_answered_and_keeps_what_there_is_room_for(
    context: Context, engine: ScriptedEngine, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_benchmark.ray, "init", lambda: None)
    monkeypatch.setattr(evaluate_benchmark, "NOTE_EVERY", 1)
    engine.tokens = ("Paris",)
    wanted = request("capitals", "choices")
    job = evaluations.benchmark(context, wanted)
    noted: list[tuple[int, int, str]] = []
    with work_of(context, job) as work:
        monkeypatch.setattr(
            work.reporter.metrics, "progress", lambda done, total, unit, _=None: noted.append((done, total, unit))
        )
        limited = replace(context, config=context.config.model_copy(update={"max_tenant_bytes": 100}))
        with pytest.raises(StorageFull, match="allowed: 100"):
            evaluate_benchmark.benchmark(replace(work, context=limited), wanted)
    assert [done for done, *_ in noted] == [1, 2, 3, 4, 5, 6, 6]
    # First those that are to be answered or those that are to be compared, then the others.
    assert {total for _, total, _ in noted} <= {2, 4, 6}
    assert noted[-1] == (6, 6, "answers")
    assert not context.artifacts.exists(evaluations.results_name("default", "benchmark-1"))


def test_the_report_has_each_score_with_its_interval(tmp_path: Path) -> None:
    figures = {"sums/acc": 0.5, "sums/acc_stderr": 0.1, "sums/<b>": 12.0, "sums/em,strict": 0.25}
    benchmark_report.write(tmp_path / "report.html", "small", figures | {"sums/em_stderr,strict": 0.05}, {})
    page = (tmp_path / "report.html").read_text()
    for name, *cells in (("acc", "0.5", "0.304", "0.696"), ("em,strict", "0.25", "0.152", "0.348")):
        assert f"<tr><td>sums/{name}</td>" + "".join(f"<td class=number>{one}</td>" for one in cells) in page
    assert "<tr><td>sums/&lt;b&gt;</td><td class=number>12</td><td class=number>–</td>" in page
    assert "stderr" not in page
    assert page.count("<svg") == 1


def sample(number: int, value: float, **changes: Any) -> dict[str, Any]:
    """A sample as lm-eval tells it."""
    told = {"doc_id": number, "arguments": [(f"{'before ' * 100}<b>{number}", {})], "target": "Paris"}
    return told | {"filtered_resps": ["Lyon"], "filter": "none", "metrics": ["em"], "em": value} | changes


def test_the_report_shows_how_the_examples_spread_and_the_worst_of_each_task(tmp_path: Path) -> None:
    capitals = [sample(number, float(number % 2)) for number in range(30)]
    words = [
        sample(number, 0.0, metrics=["all", "wrong"], all=(1, 2), wrong=number, filter="strict") for number in range(3)
    ]
    found = {"samples": {"capitals": capitals, "words": words}, "higher_is_better": {"words": {"wrong": False}}}
    benchmark_report.write(tmp_path / "report.html", "small", {"capitals/em": 0.5}, found)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2
    for name in ("capitals/em", "words/wrong,strict"):
        assert f"<!-- {name} -->" in page, "a histogram is drawn of it"
    worst, others = page.split("Worst examples by capitals/em")[1].split("Worst examples by words/wrong,strict")
    assert re.findall(r"<tr><td>(\d+)</td><td>(\d)</td>", worst) == [(str(2 * n), "0") for n in range(10)]
    assert re.findall(r"<tr><td>(\d+)</td><td>(\d)</td>", others) == [("2", "2"), ("1", "1"), ("0", "0")]
    assert "before &lt;b&gt;18</td><td>Paris</td><td>Lyon</td>" in worst
    assert "are shown" not in page


def test_the_report_says_what_it_leaves_out(tmp_path: Path) -> None:
    found = {"samples": {f"task-{number}": [sample(0, 1.0)] for number in range(31)}}
    benchmark_report.write(tmp_path / "report.html", "small", {}, found)
    page = (tmp_path / "report.html").read_text()
    assert page.count("Worst examples") == 30
    assert ("Of 31 scores the first 30 are shown" in page, "Of 31 tasks the first 30 are shown" in page) == (True, True)


def test_the_door_opens_to_nobody_without_its_key(door: engine_door.Door, engine: ScriptedEngine) -> None:
    url = f"{door.url}/v1/completions"
    body = {"model": "small", "prompt": "a"}
    assert httpx.post(url, json=body).status_code == 401
    assert httpx.post(url, json=body, headers={"Authorization": "Bearer other"}).status_code == 401
    assert engine.asked == []
    assert httpx.post(url, json=body, headers=door.headers).json()["choices"][0]["text"] == "Paris is big."
    assert httpx.post(url, json=body | {"model": "big"}, headers=door.headers).status_code == 404
    assert door.url.startswith("http://127.0.0.1:")


def test_a_closed_door_is_closed(context: Context, kept: KeptAnswers) -> None:
    with engine_door.opened(context, kept) as door:
        pass
    with pytest.raises(httpx.ConnectError):
        httpx.post(f"{door.url}/v1/completions", json={}, headers=door.headers)


def test_a_benchmark_is_accepted_as_a_job(context: Context) -> None:
    job = evaluations.benchmark(context, request("capitals"))
    assert (job.kind, job.bundles) == ("evaluate_benchmark", [])
    assert evaluations.benchmark(context, request("capitals")) == job
    assert evaluations.job_status(context, "benchmark-1").status == "scheduled"


def test_a_benchmark_of_what_is_not_served_is_refused(context: Context) -> None:
    with pytest.raises(NotFound) as caught:
        evaluations.benchmark(context, request("capitals", checkpoint="big"))
    assert caught.value.param == "checkpoint"


def test_a_benchmark_needs_room_for_its_answers_too(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []
    monkeypatch.setattr("stack.quotas.require_room_for_job", lambda _, kept, temporary, work: needed.append(temporary))
    evaluations.resources_of_benchmark(context, request("capitals"))
    assert needed == [evaluations.BENCHMARK_BYTES + evaluations.ANSWERS_BYTES]


def test_a_benchmark_asks_no_more_than_lm_eval_can_hold() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 100000"):
        request("capitals", limit=100_001)
    assert request("capitals").limit == 20_000, "what no limit is set for has one"


@pytest.mark.parametrize("task", ["", "../a", "a b", "/etc/passwd", "a,b"])
def test_a_task_is_a_name_and_no_path(task: str) -> None:
    with pytest.raises((ValueError, StackError), match=r"tasks\.0"):
        request(task)
