"""Batch inference of any size: what is accepted, and what a job makes of rows, answers, errors and lost attempts."""

import json
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray.exceptions import ActorDiedError

from stack import batch_inference, datasets, jobs
from stack.api.batch_inference import BatchInferenceJobRequest
from stack.api.datasets import CreateDatasetRequest
from stack.api.messages import MAX_CHARACTERS
from stack.api.wire import describe
from stack.config import Config
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound, StorageFull, TooManyRequests, Unavailable
from stack.store.jobs import NewJob
from tests import samples
from tests.conftest import CONFIG
from tests.ray_errors import in_a_ray_task
from tests.samples import dataset, write_rows
from tests.varied_engine import VariedEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs import asking
    from jobs import batch_inference as driver
    from jobs.driver import Outcome
    from tests.asked_here import lines, work_here, work_of

EMBEDDERS = [{"id": "embedder", "path": "models/embedder"}]
TEXTS = {"id": "text", "text": "text"}


@pytest.fixture
def engine() -> VariedEngine:
    engine = VariedEngine()
    engine.say = lambda body: f"To {(body.get('messages') or [{'content': body.get('prompt')}])[-1]['content']}"
    return engine


@pytest.fixture
def context(home: Path, store_url: str, engine: VariedEngine) -> Iterator[Context]:
    config = CONFIG | {"store": store_url, "embedding_models": EMBEDDERS, "max_dataset_bytes": 2**20}
    context = Context.open(Config.parse(config, "the tests' config"), engine=engine)
    yield context
    context.close()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, engine: VariedEngine, context: Context) -> None:
    async def no_pause(_: float) -> None:
        """Nobody waits."""

    monkeypatch.setattr(asking, "pause", no_pause)
    work_here(monkeypatch, engine, driver)


def texts(home: Path, count: int, **columns: str) -> dict[str, Any]:
    rows = [{"id": f"row-{number}", "text": f"text {number}"} for number in range(count)]
    return dataset(write_rows(home / "data" / "texts.jsonl", rows), **(columns or TEXTS))


def request(data: Any, **changes: Any) -> BatchInferenceJobRequest:
    body = {"job_uuid": "batch-1", "kind": "completion", "model": "small", "dataset": data}
    return BatchInferenceJobRequest.model_validate(body | changes)


def run(context: Context, wanted: BatchInferenceJobRequest) -> dict[str, Any]:
    job = batch_inference.submit(context, wanted)
    with work_of(context, job) as work:
        accepted = BatchInferenceJobRequest.model_validate(job.request)
        outcome = driver.answer_all(work, accepted)
        work.reporter.metrics.flush()
    return outcome.result


def ended(context: Context, wanted: BatchInferenceJobRequest) -> Outcome:
    """What a job has come to that cannot be completed."""
    job = batch_inference.submit(context, wanted)
    with work_of(context, job) as work:
        return driver.answer_all(work, BatchInferenceJobRequest.model_validate(job.request))


def rows_of(context: Context, uuid: str) -> list[dict[str, Any]]:
    return datasets.preview(context, uuid, 100).rows


def test_a_job_with_an_engine_of_its_own_takes_what_that_takes(context: Context, home: Path) -> None:
    job = batch_inference.submit(context, request(texts(home, 2), engine="own"))
    assert job.bundles == [{"CPU": 1.25}]
    again = batch_inference.submit(context, request(texts(home, 2), engine="own"))
    assert (again.id, again.bundles) == (job.id, job.bundles)
    accepted = BatchInferenceJobRequest.model_validate(job.request)
    assert batch_inference.resources(context, accepted) == {"workers": 1, "per_worker": {"CPU": 1.25}}
    assert batch_inference.submit(context, request(texts(home, 2), job_uuid="batch-2")).bundles == [{"CPU": 0.25}]


def test_the_worker_is_told_of_the_jobs_own_model(
    context: Context, home: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, owns = driver.asked, []

    def noted(*arguments: Any, own: Any) -> Any:
        owns.append(own)
        return asked(*arguments)

    monkeypatch.setattr(driver, "asked", noted)
    run(context, request(texts(home, 2), engine="own"))
    run(context, request(texts(home, 2), job_uuid="batch-2"))
    assert owns == [context.config.models[0], None]


def test_every_row_of_a_data_set_is_answered_by_its_id(context: Context, home: Path, here: None) -> None:
    result = run(context, request(texts(home, 10)))
    assert result["datasets"] == {"answers": "batch-1.answers"}
    found = {row["id"]: row for row in rows_of(context, "batch-1.answers")}
    assert {name: row["answer"] for name, row in found.items()} == {f"row-{n}": f"To text {n}" for n in range(10)}
    assert found["row-3"]["stop_reason"] == "end_of_turn"
    assert (found["row-3"]["prompt_tokens"], found["row-3"]["completion_tokens"]) == (7, 1)


def test_chats_are_asked_with_all_their_messages_but_the_last_answer(
    context: Context, home: Path, engine: VariedEngine, here: None
) -> None:
    data = dataset(write_rows(home / "data" / "dialogs.jsonl", samples.dialogs(2)))
    run(context, request(data, kind="chat_completion", sampling_params={"max_tokens": 5}))
    assert [row["id"] for row in rows_of(context, "batch-1.answers")] == ["1", "2"]
    assert engine.asked[0].body["messages"] == samples.DIALOG[:2]
    assert engine.asked[0].body["max_tokens"] == 5


def test_texts_are_embedded(context: Context, home: Path, engine: VariedEngine, here: None) -> None:
    result = run(context, request(texts(home, 3), kind="embeddings", model="embedder"))
    found = rows_of(context, result["datasets"]["answers"])
    assert [row["id"] for row in found] == ["row-0", "row-1", "row-2"]
    assert all(len(row["embedding"]) == 8 for row in found)
    assert {one.truncate for one in engine.asked_to_embed} == {False}


def test_rows_that_fail_become_a_data_set_of_errors(
    context: Context, home: Path, engine: VariedEngine, here: None
) -> None:
    engine.refusals["text 4"] = BadInput("the prompt has 300 tokens; allowed: at most 256")
    result = run(context, request(texts(home, 6)))
    assert result["datasets"] == {"answers": "batch-1.answers", "errors": "batch-1.errors"}
    assert rows_of(context, "batch-1.errors") == [
        {"id": "row-4", "row": 5, "code": "bad_input", "message": "the prompt has 300 tokens; allowed: at most 256"}
    ]
    assert [row["id"] for row in rows_of(context, "batch-1.answers")] == [f"row-{n}" for n in (0, 1, 2, 3, 5)]


def test_a_row_over_the_bounds_of_a_request_fails_alone(context: Context, home: Path, here: None) -> None:
    rows = [{"id": "long", "text": "x" * (MAX_CHARACTERS + 1)}, {"id": "short", "text": "x"}]
    data = dataset(write_rows(home / "data" / "texts.jsonl", rows), **TEXTS)
    config = context.config.model_copy(update={"max_dataset_bytes": 2**22})
    run(replace(context, config=config), request(data))
    (error,) = rows_of(context, "batch-1.errors")
    assert (error["id"], error["code"]) == ("long", "bad_input")
    assert [row["id"] for row in rows_of(context, "batch-1.answers")] == ["short"]


def test_an_answer_that_no_data_set_can_hold_is_a_row_that_has_failed(
    context: Context, home: Path, engine: VariedEngine, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "MAX_ANSWER_BYTES", 150)
    engine.say = lambda body: "漢" * (40 if body["prompt"] == "text 1" else 1)
    run(context, request(texts(home, 2)))
    (error,) = rows_of(context, "batch-1.errors")
    assert (error["id"], error["code"]) == ("row-1", "too_large")


def test_a_full_queue_is_waited_for_by_embeddings_too(
    context: Context, home: Path, engine: VariedEngine, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def no_pause(seconds: float) -> None:
        waits.append(seconds)
        engine.fault = None

    monkeypatch.setattr("stack.batch_inference.pause", no_pause)
    engine.fail(TooManyRequests("full", retry_after=1))
    result = run(context, request(texts(home, 1), kind="embeddings", model="embedder"))
    assert result["datasets"] == {"answers": "batch-1.answers"}
    assert waits == [1]


def test_chats_with_tools_and_logprobs_are_answered_as_by_the_request_of_the_kind(
    context: Context, home: Path, engine: VariedEngine, here: None
) -> None:
    engine.say = lambda _: json.dumps({"name": "weather", "parameters": {"city": "Paris"}})
    data = dataset(write_rows(home / "data" / "dialogs.jsonl", samples.dialogs(1)))
    tool = {"tool_name": "weather", "parameters": {"city": {"param_type": "string"}}}
    wanted = {"tools": [tool], "tool_choice": "required", "logprobs": {"top_k": 1}}
    run(context, request(data, kind="chat_completion", **wanted))
    (row,) = rows_of(context, "batch-1.answers")
    (call,) = row["tool_calls"]
    assert (call["tool_name"], call["arguments"]) == ("weather", {"city": "Paris"})
    assert len(row["logprobs"]) == 1
    assert engine.asked[0].body["logprobs"] is True


def test_an_attachment_is_read_with_its_chat(context: Context, home: Path, engine: VariedEngine, here: None) -> None:
    attached = {"role": "user", "content": ["Read: ", {"content": "It rains.", "mime_type": "text/plain"}]}
    data = dataset(write_rows(home / "data" / "dialogs.jsonl", [{"dialog": [attached]}]))
    run(context, request(data, kind="chat_completion"))
    assert "It rains." in engine.asked[0].body["messages"][0]["content"]


def test_answers_that_no_data_set_can_hold_together_are_kept_as_an_artifact(
    context: Context, home: Path, engine: VariedEngine, here: None
) -> None:
    engine.say = lambda _: "word " * 200
    config = context.config.model_copy(update={"max_dataset_bytes": 2_000})
    job = batch_inference.submit(context, request(texts(home, 10)))
    with work_of(replace(context, config=config), job) as work:
        outcome = driver.answer_all(work, BatchInferenceJobRequest.model_validate(job.request))
    assert outcome.problem is not None
    assert "allowed: max_dataset_bytes, 2000" in outcome.problem
    assert outcome.result["datasets"] == {}
    names = {file["name"] for file in outcome.result["files"]}
    assert names == {"answers.jsonl", "lineage.json"}
    assert context.store.datasets.get("default", "batch-1.answers") is None


def test_rows_that_all_fail_have_no_answers_but_errors(
    context: Context, home: Path, engine: VariedEngine, here: None
) -> None:
    engine.refusals["text"] = BadInput("no")
    assert run(context, request(texts(home, 3)))["datasets"] == {"errors": "batch-1.errors"}


def test_more_failed_rows_than_allowed_fail_the_job_by_the_first_and_what_was_answered_is_kept(
    context: Context, home: Path, engine: VariedEngine, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.row_log.WRITE_ROWS", 4)
    for number in (1, 2, 3):
        engine.refusals[f"text {number}"] = BadInput("the prompt is too long")
    outcome = ended(context, request(texts(home, 8), max_failed_rows=2))
    assert outcome.problem is not None
    assert "allowed: max_failed_rows, 2; the first of them: row 2: the prompt is too long" in outcome.problem
    assert outcome.result["datasets"] == {}
    folder = Path(outcome.result["path"].removeprefix("file://"))
    assert [row["id"] for row in lines(folder / "answers.jsonl")] == ["row-0"]
    assert [row["id"] for row in lines(folder / "errors.jsonl")] == ["row-1", "row-2", "row-3"]
    assert context.store.datasets.get("default", "batch-1.answers") is None


def test_what_was_answered_is_kept_where_a_worker_fails_by_a_mistake_of_ours(
    context: Context, home: Path, here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    really_asked = driver.asked

    def asked(*given: Any, **named: Any) -> Iterator[dict[str, Any]]:
        with closing(really_asked(*given, **named)) as rows:
            yield from islice(rows, 5)
        raise in_a_ray_task(TypeError("'int' object is not iterable"))

    monkeypatch.setattr(driver, "asked", asked)
    outcome = ended(context, request(texts(home, 8)))
    assert outcome.problem == "TypeError: 'int' object is not iterable"
    assert "Traceback" in capsys.readouterr().err
    assert outcome.result["datasets"] == {}
    folder = Path(outcome.result["path"].removeprefix("file://"))
    assert [row["id"] for row in lines(folder / "answers.jsonl")] == [f"row-{number}" for number in range(5)]


def test_a_worker_that_was_lost_with_its_node_does_not_fail_the_job(
    context: Context, home: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*given: Any, **named: Any) -> Iterator[dict[str, Any]]:
        raise in_a_ray_task(ActorDiedError())
        yield {}

    monkeypatch.setattr(driver, "asked", asked)
    with pytest.raises(ActorDiedError):
        ended(context, request(texts(home, 8)))


def test_a_job_that_was_lost_goes_on_with_the_rows_that_it_has_not(
    context: Context, home: Path, engine: VariedEngine, here: None
) -> None:
    engine.away_after = 4
    wanted = request(texts(home, 10))
    with pytest.raises(Unavailable, match="row 5: the model is being started"):
        run(context, wanted)
    engine.away_after = None
    before = len(engine.asked)
    run(context, wanted)
    again = [one.body["prompt"] for one in engine.asked[before:]]
    assert again == [f"text {number}" for number in range(4, 10)], "batches are of four rows here"
    assert sorted(row["id"] for row in rows_of(context, "batch-1.answers")) == [f"row-{n}" for n in range(10)]


def test_the_seconds_of_a_job_are_those_of_all_its_attempts(
    context: Context, home: Path, engine: VariedEngine, here: None
) -> None:
    engine.away_after = 4
    with pytest.raises(Unavailable):
        run(context, request(texts(home, 10)))
    engine.away_after = None
    (jobs.work_folder("default", "batch-1") / "rows.seconds").write_text("1000.5")
    run(context, request(texts(home, 10)))
    assert 1_000.5 < batch_inference.job_status(context, "batch-1").metrics["seconds"] < 1_100


def test_what_was_made_says_where_it_comes_from_and_what_it_took(context: Context, home: Path, here: None) -> None:
    result = run(context, request(texts(home, 4)))
    about = datasets.get(context, "batch-1.answers").metadata
    assert about is not None
    assert (about["job_uuid"], about["model"], about["kind"]) == ("batch-1", "small", "batch_inference")
    job = context.store.jobs.get("default", "batch-1")
    assert job is not None
    assert about["prompts_sha256"] == job.request["dataset"]["sha256"]
    assert about["dataset"] == job.request["dataset"]["content_url"]
    assert about["parameters"]["kind"] == "completion"
    assert len(about["code_sha256"]) == 64
    metrics = batch_inference.job_status(context, "batch-1").metrics
    assert (metrics["rows"], metrics["failed"], metrics["completion_tokens"]) == (4, 0, 4)
    (file,) = result["files"]
    kept = json.loads((Path(result["path"].removeprefix("file://")) / file["name"]).read_text())
    assert kept["datasets"] == {"answers": "batch-1.answers"}
    assert kept["totals"]["rows"] == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "chat"}, ["'chat_completion', 'completion' or 'embeddings', not 'chat'"]),
        ({"kind": "embeddings", "sampling_params": {"max_tokens": 5}}, ["sampling_params cannot be used"]),
        ({"tools": [{"tool_name": "weather"}]}, ["tools cannot be used with the kind 'completion'", "chat_completion"]),
        ({"kind": "embeddings", "logprobs": {}}, ["logprobs cannot be used with the kind 'embeddings'"]),
        ({"kind": "chat_completion", "tool_choice": "required"}, ["tool_choice is 'required', but there are no tools"]),
        ({"truncate": True}, ["truncate cannot be used with the kind 'completion'"]),
        ({"max_failed_rows": -1}, ["max_failed_rows", "not -1"]),
        ({"job_uuid": "x" * 81}, ["job_uuid", "80"]),
        ({"dataset": None}, ["dataset"]),
        ({"engine": "mine"}, ["'serving' or 'own', not 'mine'"]),
        (
            {"kind": "embeddings", "engine": "own"},
            ["engine: is 'own'", "allowed with the kind 'embeddings': 'serving'"],
        ),
        ({"motor": "own"}, ["unknown key 'motor'"]),
    ],
    ids=str,
)
def test_a_wrong_job_is_refused_with_what_is_allowed(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        request("texts", **changes)
    for word in words:
        assert word in describe(caught.value)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"model": "big"}, NotFound, "there is no model 'big'"),
        ({"model": "embedder"}, BadInput, "makes embeddings and no text"),
        ({"kind": "embeddings"}, BadInput, "models for that: embedder"),
        ({"kind": "chat_completion"}, BadInput, "prompts stand in one column of type dialog"),
        ({"sampling_params": {"strategy": "top_k"}}, BadInput, "needs a top_k"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_before_any_work(
    context: Context, home: Path, changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        batch_inference.submit(context, request(texts(home, 2), **changes))
    assert context.store.jobs.get("default", "batch-1") is None


def test_rows_of_the_same_id_are_refused(context: Context, home: Path) -> None:
    rows = [{"id": "a", "text": "b"}] * 2
    data = dataset(write_rows(home / "data" / "texts.jsonl", rows), **TEXTS)
    with pytest.raises(BadInput, match="the rows 1 and 2 have the same id, 'a'"):
        batch_inference.submit(context, request(data))


def test_an_empty_data_set_is_refused(context: Context, home: Path) -> None:
    with pytest.raises(BadInput, match="has no rows"):
        batch_inference.submit(context, request(texts(home, 0)))


def test_a_job_does_not_write_over_a_data_set(context: Context, home: Path) -> None:
    data = texts(home, 2)
    datasets.create(context, CreateDatasetRequest.model_validate({"uuid": "batch-1.errors", "dataset": data}))
    with pytest.raises(Conflict, match=r"'batch-1.errors' already; choose another job_uuid"):
        batch_inference.submit(context, request(data))


def test_a_job_whose_name_was_taken_since_does_not_begin(context: Context, home: Path) -> None:
    data = texts(home, 2)
    job = batch_inference.submit(context, request(data))
    accepted = BatchInferenceJobRequest.model_validate(job.request)
    assert batch_inference.resources(context, accepted)["workers"] == 1
    datasets.create(context, CreateDatasetRequest.model_validate({"uuid": "batch-1.answers", "dataset": data}))
    with pytest.raises(Conflict, match=r"'batch-1.answers' already, which this job has not made"):
        batch_inference.resources(context, accepted)


def test_the_same_request_again_is_the_same_job(context: Context, home: Path) -> None:
    first = batch_inference.submit(context, request(texts(home, 2)))
    assert batch_inference.submit(context, request(texts(home, 2))) == first
    with pytest.raises(Conflict, match="'batch-1'"):
        batch_inference.submit(context, request(texts(home, 2), max_failed_rows=5))


def test_a_batch_that_a_release_without_own_engines_has_accepted_may_be_sent_again(
    context: Context, home: Path
) -> None:
    body = batch_inference.submit(context, request(texts(home, 2))).request
    accepted = {name: value for name, value in body.items() if name != "engine"} | {"job_uuid": "batch-0"}
    kind = jobs.BATCH_INFERENCE
    job, _ = context.store.jobs.add(NewJob("default", "batch-0", kind, accepted, kind), max_waiting=10)
    assert batch_inference.submit(context, request(texts(home, 2), job_uuid="batch-0")) == job
    with pytest.raises(Conflict, match="'batch-0'"):
        batch_inference.submit(context, request(texts(home, 2), job_uuid="batch-0", engine="own"))


def test_answers_that_would_not_fit_are_refused(context: Context, home: Path) -> None:
    config = context.config.model_copy(update={"max_tenant_bytes": 2_000})
    limited = Context(config, context.store, context.artifacts, context.engine, context.principal)
    with pytest.raises(StorageFull, match="allowed: 2000"):
        batch_inference.submit(limited, request(texts(home, 10)))
    with pytest.raises(StorageFull, match="allowed: 2000"):
        batch_inference.resources(limited, request(texts(home, 10)))
    assert batch_inference.resources(context, request(texts(home, 10)))["workers"] == 1


@pytest.mark.parametrize(("dimensions", "taken"), [(384, 384), (3_072, 3_072), (None, batch_inference.DIMENSIONS)])
def test_vectors_need_the_room_of_their_dimensions(
    context: Context, home: Path, monkeypatch: pytest.MonkeyPatch, dimensions: int | None, taken: int
) -> None:
    needed: list[int] = []
    monkeypatch.setattr("stack.quotas.require_room_for_job", lambda _, kept, temporary, work: needed.append(kept))
    (model,) = context.config.embedding_models
    model = model.model_copy(update={"dimensions": dimensions})
    config = context.config.model_copy(update={"embedding_models": [model]})
    wanted = request(texts(home, 10), kind="embeddings", model="embedder")
    batch_inference.submit(replace(context, config=config), wanted)
    assert needed == [10 * (taken * batch_inference.NUMBER_BYTES + batch_inference.RESULT_BYTES)]


def test_a_batch_is_found_by_its_uuid_alone(context: Context, home: Path) -> None:
    batch_inference.submit(context, request(texts(home, 2)))
    assert [one.job_uuid for one in batch_inference.list_jobs(context, None, None, None, 10)] == ["batch-1"]
    assert batch_inference.job_status(context, "batch-1").status == "scheduled"
    assert batch_inference.job_artifacts(context, "batch-1").datasets == {}
    samples.add_job(context.store, "evaluation-1")
    with pytest.raises(NotFound):
        batch_inference.job_status(context, "evaluation-1")


def test_results_are_json(context: Context, home: Path, here: None) -> None:
    result = run(context, request(texts(home, 2)))
    assert json.loads(json.dumps(result)) == result
