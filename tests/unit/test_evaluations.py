"""Evaluations: what is accepted, what is refused and why, and what a job has found."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from stack import datasets, evaluations
from stack.api.datasets import CreateDatasetRequest
from stack.api.evaluations import (
    EvaluateBenchmarkRequest,
    EvaluateFunctionCallingRequest,
    EvaluateJudgedRequest,
    EvaluateQuestionAnsweringRequest,
    EvaluateSummarizationRequest,
    EvaluateTextGenerationRequest,
)
from stack.api.jobs import JobEngine
from stack.api.wire import describe
from stack.config import Config
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound, StackError, StorageFull
from tests import samples
from tests.conftest import CONFIG
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


def test_an_evaluation_with_an_engine_of_its_own_takes_what_that_takes(context: Context, data: dict[str, Any]) -> None:
    add_adapter(context, "tune-1")
    wanted = request(data, checkpoint="tune-1", engine="own")
    assert evaluations.question_answering(context, wanted).bundles == [{"CPU": 1.25}]
    assert evaluations.own_model(context, wanted) == context.config.models[0]
    assert evaluations.resources(context, wanted)["per_worker"] == {"CPU": 1.25}
    assert evaluations.question_answering(context, request(data, job_uuid="other")).bundles == [{"CPU": 0.25}]


def test_a_benchmark_has_no_engine_of_its_own() -> None:
    with pytest.raises(ValidationError) as caught:
        EvaluateBenchmarkRequest(job_uuid="a", tasks=["gsm8k"], checkpoint="small", engine=JobEngine.own)
    assert describe(caught.value).startswith("engine: is 'own', but lm-eval asks the deployment that serves")


@pytest.mark.parametrize(
    ("checkpoint", "model"), [("small", "small"), ("small:tune-1", "small:tune-1"), ("tune-1", "small:tune-1")]
)
def test_a_checkpoint_is_a_model_or_the_job_that_made_one(context: Context, checkpoint: str, model: str) -> None:
    add_adapter(context, "tune-1")
    assert evaluations.model_of(context, checkpoint).id == model


def test_a_checkpoint_is_the_address_of_an_adapter_s_artifact(context: Context) -> None:
    add_adapter(context, "tune-1")
    address = context.artifacts.url("adapters/tune-1")
    assert address.startswith("file://")
    assert evaluations.model_of(context, address).id == "small:tune-1"


@pytest.mark.parametrize("checkpoint", ["whole-1", "file:///models/whole-1"])
def test_a_checkpoint_is_the_job_or_the_address_of_a_whole_model(context: Context, checkpoint: str) -> None:
    samples.add_trained(context.store, "small-whole-1")
    assert evaluations.model_of(context, checkpoint).id == "small-whole-1"


def test_a_checkpoint_that_is_not_the_served_one_is_refused_with_that(context: Context, data: dict[str, Any]) -> None:
    samples.add_trained(context.store, "small-whole-1")
    error = refusal(context, data, checkpoint="file:///models/whole-1/best")
    assert isinstance(error, BadInput)
    assert error.message.endswith("allowed: the last checkpoint, file:///models/whole-1")
    assert error.param == "checkpoint"


def test_a_reward_model_makes_no_text_to_evaluate(context: Context, data: dict[str, Any]) -> None:
    samples.add_trained_reward(context.store, "small-reward-1")
    error = refusal(context, data, checkpoint="small-reward-1")
    assert isinstance(error, BadInput)
    assert "gives scores and no text" in error.message


@pytest.mark.parametrize(
    "checkpoint", ["big", "tune-unfinished", "evaluation-0", "tune-of-big", "file:///adapters/none"]
)
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
        ({"max_failed_rows": -1}, ["max_failed_rows", "greater than or equal to 0", "-1"]),
        ({"checkpoint": ""}, ["checkpoint", "at least 1 character"]),
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


def judged(data: Any, **changes: Any) -> EvaluateJudgedRequest:
    body = evaluation(data, metrics=["rating", "win_rate"], judge="small", rubric="Good answers are brief.")
    return EvaluateJudgedRequest.model_validate(body | changes)


def test_a_judged_evaluation_is_a_job_with_a_judge(context: Context, data: dict[str, Any]) -> None:
    add_adapter(context, "tune-1")
    job = evaluations.judged(context, judged(data, opponent="tune-1"))
    assert job.kind == "evaluate_judged"
    judge = evaluations.judge_of(EvaluateJudgedRequest.model_validate(job.request))
    assert (judge.model, judge.rubric, judge.lowest, judge.highest) == ("small", "Good answers are brief.", 1, 5)


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"judge": "big"}, "judge", "there is no model 'big'"),
        ({"judge": "small-reward-1"}, "judge", "gives scores and no text"),
        ({"opponent": "big"}, "opponent", "'big' is not served"),
        ({"opponent": "small", "metrics": ["rating"]}, "opponent", "leave it out"),
    ],
)
def test_what_cannot_judge_or_be_compared_is_refused(
    context: Context, data: dict[str, Any], changes: dict[str, Any], param: str, words: str
) -> None:
    samples.add_trained_reward(context.store, "small-reward-1")
    with pytest.raises(StackError, match=words) as caught:
        evaluations.judged(context, judged(data, **changes))
    assert caught.value.param == param


def test_answers_are_compared_only_with_references_that_are_there(context: Context, home: Path) -> None:
    rows = [{"prompt": "a", "completion": ""}]
    data = dataset(write_rows(home / "data" / "a.jsonl", rows), prompt="text", completion="text")
    with pytest.raises(BadInput, match="row 1: the reference"):
        evaluations.judged(context, judged(data))
    evaluations.judged(context, judged(data, metrics=["rating"]))
    evaluations.judged(context, judged(data, opponent="small", job_uuid="other"))


def test_function_calls_are_read_and_become_questions(context: Context, home: Path) -> None:
    data = samples.function_calls(home / "data" / "calls.jsonl")
    wanted = EvaluateFunctionCallingRequest.model_validate(evaluation(data, metrics=["ast"]))
    assert evaluations.function_calling(context, wanted).kind == "evaluate_function_calling"
    checked = datasets.resolve(context, wanted.dataset)
    ((_, question),) = datasets.read_as(context, checked, evaluations.shape_of(wanted))
    assert question.id == "weather-1"
    assert question.functions is not None
    assert question.functions[0]["name"] == "get_weather"
    assert json.loads(question.answer) == [{"get_weather": {"city": ["Paris", "Paris, France"], "days": ["", 1]}}]


def test_data_that_is_not_of_function_calls_is_refused(context: Context, data: dict[str, Any]) -> None:
    wanted = EvaluateFunctionCallingRequest.model_validate(evaluation(data, metrics=["ast"]))
    with pytest.raises(BadInput, match="question, function, ground_truth of type json") as caught:
        evaluations.function_calling(context, wanted)
    assert caught.value.param == "dataset"


TASKS: list[tuple[Any, Any, list[str]]] = [
    (EvaluateSummarizationRequest, evaluations.summarization, ["rouge", "bleu"]),
    (EvaluateTextGenerationRequest, evaluations.text_generation, ["perplexity", "rouge", "bleu"]),
]


@pytest.mark.parametrize(("kind", "accept", "metrics"), TASKS)
def test_the_other_tasks_are_jobs_of_their_own(
    context: Context, data: dict[str, Any], kind: Any, accept: Any, metrics: list[str]
) -> None:
    job = accept(context, kind.model_validate(evaluation(data, metrics=metrics)))
    assert job.kind == f"evaluate_{kind.task}"
    assert job.request["metrics"] == metrics
    assert evaluations.job_status(context, "evaluation-1").kind == job.kind
    (entry,) = evaluations.list_jobs(context, job.kind, None, None, 10)
    assert entry.job_uuid == "evaluation-1"
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(evaluation(data, metrics=["em"]))
    assert all(metric in describe(caught.value) for metric in metrics)


@pytest.mark.parametrize(("kind", "accept", "metrics"), TASKS)
@pytest.mark.parametrize("is_registered", [True, False])
def test_a_reference_that_is_empty_is_refused_where_answers_need_one(
    context: Context, home: Path, kind: Any, accept: Any, metrics: list[str], is_registered: bool
) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}]
    data: Any = dataset(write_rows(home / "data" / "a.jsonl", rows), prompt="text", completion="text")
    evaluations.question_answering(context, request(data, job_uuid="of-questions"))
    if is_registered:
        datasets.create(context, CreateDatasetRequest.model_validate({"uuid": "a", "dataset": data}))
        data = "a"
    with pytest.raises(BadInput, match="row 2: the reference, which answers are compared with, is empty") as caught:
        accept(context, kind.model_validate(evaluation(data, metrics=metrics)))
    assert caught.value.param == "dataset"


@pytest.mark.parametrize("kind", ["text", "number"])
@pytest.mark.parametrize("is_registered", [True, False])
def test_rows_with_the_same_id_are_refused(context: Context, home: Path, kind: str, is_registered: bool) -> None:
    ids: list[Any] = ["a", "b", "a"] if kind == "text" else [1, 2, 1]
    rows = [{"id": one, "prompt": "a", "completion": "b"} for one in ids]
    data: Any = dataset(write_rows(home / "data" / "a.jsonl", rows), id=kind, prompt="text", completion="text")
    if is_registered:
        datasets.create(context, CreateDatasetRequest.model_validate({"uuid": "a", "dataset": data}))
        data = "a"
    error = refusal(context, data)
    assert isinstance(error, BadInput)
    assert error.message.startswith(f"the rows 1 and 3 have the same id, {str(ids[0])!r}")
    assert error.param == "dataset"


def test_an_id_that_is_no_name_is_refused(context: Context, home: Path) -> None:
    rows = [{"id": "x" * 1_001, "prompt": "a", "completion": "b"}]
    data = dataset(write_rows(home / "data" / "a.jsonl", rows), id="text", prompt="text", completion="text")
    error = refusal(context, data)
    assert isinstance(error, BadInput)
    assert "row 1: the id has 1001 characters; allowed: 1 to 1000" in error.message
    assert error.param == "dataset"


@pytest.mark.parametrize(
    ("columns", "values", "ids"),
    [
        ({"id": "text"}, ["x", "y"], ["x", "y"]),
        ({"id": "number"}, [7.0, 7.5], ["7", "7.5"]),
        ({"id": "json"}, ["x", "y"], ["x", "y"]),
        ({}, ["x", "y"], ["1", "2"]),
    ],
)
def test_an_example_has_the_id_of_its_row_or_its_number(
    context: Context, home: Path, columns: dict[str, str], values: list[Any], ids: list[str]
) -> None:
    rows = [{"id": one, "prompt": "a", "completion": "b"} for one in values]
    wanted = request(dataset(write_rows(home / "data" / "a.jsonl", rows), prompt="text", completion="text", **columns))
    checked = datasets.resolve(context, wanted.dataset)
    found = [question for _, question in datasets.read_as(context, checked, evaluations.shape_of(wanted))]
    assert [question.id for question in found] == ids
    assert [question.answer for question in found] == ["b", "b"]


def test_a_metric_that_is_asked_for_twice_is_refused(context: Context, data: dict[str, Any]) -> None:
    error = refusal(context, data, metrics=["em", "em"])
    assert isinstance(error, BadInput)
    assert error.message == "the metric 'em' is asked for twice; allowed: each once"


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
    """Three times the bytes of the data set, a part for each row with its answer, and the report: here about 300,000
    bytes."""
    rows = [{"prompt": "x" * 400, "completion": "y"} for _ in range(12)]
    data = dataset(write_rows(home / "data" / "a.jsonl", rows), prompt="text", completion="text")
    datasets.create(context, CreateDatasetRequest.model_validate({"uuid": "a", "dataset": data}))
    for reference in (data, "a"):
        for most, is_enough in ((270_000, False), (400_000, True)):
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


def test_answers_count_by_the_length_that_they_may_have_and_twice_with_an_opponents(
    context: Context, home: Path
) -> None:
    rows = [{"prompt": "x", "completion": "y"} for _ in range(10)]
    data = dataset(write_rows(home / "data" / "a.jsonl", rows), prompt="text", completion="text")

    def limited(most: int) -> Context:
        return replace(context, config=context.config.model_copy(update={"max_tenant_bytes": most}))

    def judged_by(uuid: str, max_tokens: int, **changes: Any) -> EvaluateJudgedRequest:
        return judged(data, job_uuid=uuid, sampling_params={"max_tokens": max_tokens}, **changes)

    # About 280,000 bytes, and with 1,000 tokens to a row 120,000 more; with those of an opponent 240,000.
    evaluations.judged(limited(350_000), judged_by("short", 8, opponent="small"))
    with pytest.raises(StorageFull, match="allowed: 350000"):
        evaluations.judged(limited(350_000), judged_by("long", 1_000))
    evaluations.judged(limited(450_000), judged_by("long", 1_000))
    with pytest.raises(StorageFull, match="allowed: 450000"):
        evaluations.judged(limited(450_000), judged_by("longer", 1_000, opponent="small"))


def test_a_perplexity_that_the_model_cannot_have_is_refused(context: Context, home: Path, data: dict[str, Any]) -> None:
    """Weights that are packed (GPTQ, AWQ) have other names, from which no layers follow."""
    evaluations.text_generation(context, text_generation(data, job_uuid="first"))
    packed = {"model.layers.0.mlp.up_proj.qweight": np.zeros((4, 4), np.int32)}
    save_file(packed, home / "models" / "small" / "model.safetensors")
    with pytest.raises(BadInput, match="the model 'small' serves adapters, and its weights do not tell") as caught:
        evaluations.text_generation(context, text_generation(data))
    assert caught.value.param == "metrics"
    evaluations.text_generation(context, text_generation(data, metrics=["rouge"], job_uuid="other"))
    model = CONFIG["models"][0] | {"adapters": 0}
    without = Config.parse(CONFIG | {"models": [model], "store": context.config.store}, "without adapters")
    evaluations.text_generation(replace(context, config=without), text_generation(data, job_uuid="without"))


def text_generation(data: Any, **changes: Any) -> EvaluateTextGenerationRequest:
    return EvaluateTextGenerationRequest.model_validate(evaluation(data, metrics=["perplexity"]) | changes)


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
