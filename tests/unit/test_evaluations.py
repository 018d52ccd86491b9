"""Evaluations: what is accepted, what is refused and why, and what a job has found."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stack import evaluations
from stack.api.evaluations import EvaluateQuestionAnsweringRequest
from stack.api.wire import describe
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound, StackError
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


def test_a_right_request_is_accepted_as_a_scheduled_job(context: Context, data: dict[str, Any]) -> None:
    job = evaluations.question_answering(context, request(data))
    assert (job.uuid, job.kind, job.status) == ("evaluation-1", "evaluate", "scheduled")
    assert EvaluateQuestionAnsweringRequest.model_validate(job.request) == request(data)


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
