"""Evaluations: what is accepted, what is refused and why, and what a job has found."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stack import datasets, evaluations
from stack.api.datasets import CreateDatasetRequest
from stack.api.evaluations import EvaluateQuestionAnsweringRequest
from stack.api.wire import describe
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound, StackError, StorageFull
from tests import samples
from tests.samples import dataset, dialogs, evaluation, write_rows


@pytest.fixture
def data(context: Context, home: Path) -> dict[str, Any]:
    return dataset(write_rows(home / "data" / "test.jsonl", dialogs(4)))


def request(data: Any, **changes: Any) -> EvaluateQuestionAnsweringRequest:
    return EvaluateQuestionAnsweringRequest.model_validate(evaluation(data, **changes))


def refusal(context: Context, data: Any, **changes: Any) -> StackError:
    with pytest.raises(StackError) as caught:
        evaluations.question_answering(context, request(data, **changes))
    assert context.store.jobs.get("default", "evaluation-1") is None
    return caught.value


def add_adapter(context: Context, job_uuid: str, base: str = "small") -> None:
    samples.add_job(context.store, job_uuid, "supervised_fine_tune", model=base)
    samples.add_adapter(context.store, f"{base}:{job_uuid}", base, job_uuid)


def test_a_right_request_is_accepted_as_a_scheduled_job(context: Context, home: Path, data: dict[str, Any]) -> None:
    job = evaluations.question_answering(context, request(data))
    assert (job.uuid, job.kind, job.status) == ("evaluation-1", "evaluate", "scheduled")
    sha256 = hashlib.sha256((home / "data" / "test.jsonl").read_bytes()).hexdigest()
    assert EvaluateQuestionAnsweringRequest.model_validate(job.request) == request(data | {"sha256": sha256})


@pytest.mark.parametrize(
    ("checkpoint", "model"), [("small", "small"), ("small:tune-1", "small:tune-1"), ("tune-1", "small:tune-1")]
)
def test_a_checkpoint_is_a_model_or_the_job_that_made_one(context: Context, checkpoint: str, model: str) -> None:
    add_adapter(context, "tune-1")
    assert evaluations.model_of(context, checkpoint).id == model


@pytest.mark.parametrize("checkpoint", ["big", "tune-unfinished", "evaluation-0", "tune-of-big"])
def test_a_checkpoint_that_is_not_served_is_refused_with_the_models_there_are(
    context: Context, data: dict[str, Any], checkpoint: str
) -> None:
    samples.add_job(context.store, "tune-unfinished", "supervised_fine_tune", model="small")
    samples.add_job(context.store, "evaluation-0", "evaluate")
    add_adapter(context, "tune-of-big", base="big")
    error = refusal(context, data, checkpoint=checkpoint)
    assert isinstance(error, NotFound)
    assert checkpoint in error.message
    assert error.message.endswith("there are: small")


def test_an_unknown_checkpoint_is_told_with_its_field(context: Context, data: dict[str, Any]) -> None:
    assert refusal(context, data, checkpoint="big").param == "checkpoint"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": []}, ["metrics", "at least 1 item"]),
        ({"metrics": ["bleu"]}, ["metrics.0", "'em' or 'f1'", "'bleu'"]),
        ({"metrics": ["em", "f1", "em"]}, ["metrics", "at most 2"]),
        ({"job_uuid": "../a"}, ["job_uuid", "'../a'"]),
        ({"dataset": None}, ["dataset", "None"]),
        ({"dataset": "no/id"}, ["dataset", "'no/id'"]),
        ({"sampling_params": {"strategy": "beam"}}, ["sampling_params.strategy", "'greedy', 'top_p' or 'top_k'"]),
        ({"temperature": 1}, ["unknown key 'temperature'", "sampling_params"]),
    ],
    ids=str,
)
def test_a_request_of_the_wrong_shape_is_refused_with_what_is_allowed(
    changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValidationError) as caught:
        request("test", **changes)
    for word in words:
        assert word in describe(caught.value)


def test_sampling_that_no_model_can_do_is_refused_before_any_work(context: Context, data: dict[str, Any]) -> None:
    error = refusal(context, data, sampling_params={"strategy": "top_k"})
    assert isinstance(error, BadInput)
    assert error.param == "sampling_params.top_k"


def test_data_without_examples_is_refused(context: Context, home: Path) -> None:
    file = write_rows(home / "data" / "question.jsonl", [{"question": "a"}])
    error = refusal(context, dataset(file, question="text"))
    assert isinstance(error, BadInput)
    assert error.param == "dataset"
    assert "question (text)" in error.message


def test_unknown_data_is_refused_by_its_name(context: Context, home: Path) -> None:
    assert "'none'" in refusal(context, "none").message
    assert "none.jsonl" in refusal(context, dataset(home / "data" / "none.jsonl")).message


def test_the_same_request_again_is_the_same_job_even_when_its_data_is_gone(
    context: Context, home: Path, data: dict[str, Any]
) -> None:
    first = evaluations.question_answering(context, request(data))
    (home / "data" / "test.jsonl").unlink()
    assert evaluations.question_answering(context, request(data)) == first


def test_a_job_is_of_the_content_that_it_was_accepted_with(context: Context, home: Path, data: dict[str, Any]) -> None:
    """Its driver reads the job's request, and finds that content or says that it is another one."""
    file = home / "data" / "test.jsonl"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    accepted = request(evaluations.question_answering(context, request(data)).request["dataset"])
    assert datasets.resolve(context, accepted.dataset).sha256 == before
    write_rows(file, dialogs(5))
    with pytest.raises(Conflict, match="has changed") as caught:
        datasets.resolve(context, accepted.dataset)
    assert before in caught.value.message
    assert hashlib.sha256(file.read_bytes()).hexdigest() in caught.value.message


def test_the_same_request_is_the_same_job_with_and_without_its_hash(
    context: Context, home: Path, data: dict[str, Any]
) -> None:
    first = evaluations.question_answering(context, request(data))
    sha256 = hashlib.sha256((home / "data" / "test.jsonl").read_bytes()).hexdigest()
    write_rows(home / "data" / "test.jsonl", dialogs(5))
    assert evaluations.question_answering(context, request(data)) == first
    assert evaluations.question_answering(context, request(data | {"sha256": sha256})) == first
    with pytest.raises(Conflict, match="'evaluation-1'"):
        evaluations.question_answering(context, request(data | {"sha256": "0" * 64}))


def test_content_of_another_hash_than_is_asked_for_is_refused(context: Context, data: dict[str, Any]) -> None:
    error = refusal(context, data | {"sha256": "0" * 64})
    assert isinstance(error, Conflict)
    assert error.param == "dataset"
    assert "0" * 64 in error.message


def test_results_that_would_not_fit_are_refused_when_the_job_is_accepted_and_when_it_starts(
    context: Context, home: Path
) -> None:
    """Twice the bytes of the data set, and a part for each row: here about 25,000 bytes."""
    rows = [{"prompt": "x" * 400, "completion": "y"} for _ in range(12)]
    data = dataset(write_rows(home / "data" / "a.jsonl", rows), prompt="text", completion="text")
    datasets.create(context, CreateDatasetRequest.model_validate({"uuid": "a", "dataset": data}))
    for reference in (data, "a"):
        for most, is_enough in ((15_000, False), (40_000, True)):
            limited = replace(context, config=context.config.model_copy(update={"max_tenant_bytes": most}))
            wanted = request(reference, job_uuid=f"evaluation-{len(str(reference))}")
            if is_enough:
                assert evaluations.resources(limited, wanted)["workers"] == 1
                evaluations.question_answering(limited, wanted)
                continue
            with pytest.raises(StorageFull, match=f"allowed: {most}"):
                evaluations.resources(limited, wanted)
            with pytest.raises(StorageFull, match=f"allowed: {most}"):
                evaluations.question_answering(limited, wanted)
            assert context.store.jobs.get("default", wanted.job_uuid) is None


def test_another_request_with_the_same_uuid_is_a_conflict(context: Context, data: dict[str, Any]) -> None:
    evaluations.question_answering(context, request(data))
    with pytest.raises(Conflict, match="'evaluation-1'"):
        evaluations.question_answering(context, request(data, metrics=["em"]))


def test_a_uuid_of_a_fine_tuning_is_a_conflict(context: Context, data: dict[str, Any]) -> None:
    add_adapter(context, "evaluation-1")
    with pytest.raises(Conflict):
        evaluations.question_answering(context, request(data))


def test_a_completed_evaluation_tells_its_scores_and_files(context: Context, data: dict[str, Any]) -> None:
    evaluations.question_answering(context, request(data))
    assert evaluations.job_status(context, "evaluation-1").metrics == {}
    assert evaluations.job_artifacts(context, "evaluation-1").path is None
    samples.start(context.store, "evaluation-1")
    progress = {"done": 4, "total": 4, "unit": "examples", "seconds_left": 0}
    samples.report(context.store, "evaluation-1", progress, [("em", 0, 0.75), ("examples", 0, 4.0)])
    file = {"name": "examples.jsonl", "bytes": 9, "sha256": "0" * 64}
    samples.complete(context.store, "evaluation-1", {"path": "file:///evaluations/evaluation-1", "files": [file]})
    status = evaluations.job_status(context, "evaluation-1")
    assert (status.status, status.metrics) == ("completed", {"em": 0.75, "examples": 4.0})
    artifacts = evaluations.job_artifacts(context, "evaluation-1")
    assert artifacts.path == "file:///evaluations/evaluation-1"
    assert [one.model_dump() for one in artifacts.files] == [file]


def test_jobs_of_other_kinds_are_not_found(context: Context) -> None:
    add_adapter(context, "tune-1")
    for look in (evaluations.job_status, evaluations.job_artifacts):
        with pytest.raises(NotFound, match="'tune-1'"):
            look(context, "tune-1")


def test_results_are_kept_under_the_jobs_uuid() -> None:
    assert evaluations.results_name("default", "evaluation-1") == "evaluations/evaluation-1"


def test_a_models_id_goes_before_a_jobs(context: Context) -> None:
    samples.add_job(context.store, "small", "supervised_fine_tune", model="small")
    assert evaluations.model_of(context, "small").is_adapter is False
