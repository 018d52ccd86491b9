"""Synthetic data of any size: what is accepted, and what a job makes of prompts, of seeds and of documents."""

import asyncio
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stack import datasets, jobs, made_datasets, post_training, synthetic_data_generation
from stack.api.datasets import CreateDatasetRequest
from stack.api.memory_banks import CreateMemoryBankRequest, InsertDocumentsRequest
from stack.api.post_training import PostTrainingRLHFRequest, PostTrainingSFTRequest
from stack.api.synthetic_data_generation import SyntheticDataJobRequest
from stack.api.wire import describe
from stack.batch_inference import RESULT_BYTES, TOKEN_BYTES
from stack.config import Config
from stack.context import Context
from stack.errors import (
    BadInput,
    Conflict,
    EngineFailed,
    NotFound,
    StackError,
    StorageFull,
    TooManyRequests,
    Unavailable,
)
from stack.memory_banks import banks
from stack.memory_banks.banks import Memory
from stack.memory_banks.writer import BankWriter
from stack.prompt_formats import template_messages
from tests import samples
from tests.conftest import CONFIG
from tests.memory import document
from tests.samples import dataset, write_rows
from tests.varied_engine import VariedEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs import asking
    from jobs import generate_synthetic_data as driver
    from tests.asked_here import lines, work_here, work_of

REWARD_MODELS = [{"kind": "classifier", "id": "reward", "path": "models/reward", "max_tokens": 2_000}]
PROMPTS = {"id": "text", "prompt": "text"}
DOCUMENT = "The Rhine rises in Switzerland. It is 1,230 km long. " * 3


@pytest.fixture
def engine() -> VariedEngine:
    """Its reward model counts the words of the answer and its dialog."""
    engine = VariedEngine()
    engine.logits_of = lambda text: [float(len(text.split()))]
    return engine


@pytest.fixture
def context(home: Path, store_url: str, engine: VariedEngine) -> Iterator[Context]:
    config = CONFIG | {"store": store_url, "reward_models": REWARD_MODELS, "max_dataset_bytes": 2**20}
    context = Context.open(Config.parse(config, "the tests' config"), engine=engine)
    yield context
    context.close()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, engine: VariedEngine, context: Context) -> None:
    async def no_pause(_: float) -> None:
        """Nobody waits."""

    monkeypatch.setattr(asking, "pause", no_pause)
    work_here(monkeypatch, engine, driver)


@pytest.fixture
def data(home: Path) -> dict[str, Any]:
    rows = [{"id": f"row-{number}", "prompt": f"question {number}"} for number in range(6)]
    return dataset(write_rows(home / "data" / "prompts.jsonl", rows), **PROMPTS)


def request(data: Any = None, **changes: Any) -> SyntheticDataJobRequest:
    body = {"job_uuid": "grow-1", "dataset": data, "filtering_function": "none", "num_generations": 6}
    return SyntheticDataJobRequest.model_validate(body | changes)


def grown(**changes: Any) -> SyntheticDataJobRequest:
    fields = {"source": "self_instruct", "seed_prompts": ["Name three rivers in France"], "num_prompts": 5}
    return request(**(fields | changes))


def run(context: Context, wanted: SyntheticDataJobRequest) -> dict[str, Any]:
    job = synthetic_data_generation.submit(context, wanted)
    with work_of(context, job) as work:
        outcome = driver.generate(work, SyntheticDataJobRequest.model_validate(job.request))
        work.reporter.metrics.flush()
    return outcome.result


def rows_of(context: Context, uuid: str = "grow-1") -> list[dict[str, Any]]:
    return datasets.preview(context, uuid, 100).rows


def file_of(result: dict[str, Any], name: str) -> Path:
    return Path(result["path"].removeprefix("file://")) / name


def test_a_generation_with_an_engine_of_its_own_takes_what_that_takes(context: Context, data: dict[str, Any]) -> None:
    job = synthetic_data_generation.submit(context, request(data, engine="own"))
    assert job.bundles == [{"CPU": 1.25}]
    accepted = SyntheticDataJobRequest.model_validate(job.request)
    assert synthetic_data_generation.own_model(context, accepted) == context.config.models[0]
    assert synthetic_data_generation.resources(context, accepted)["per_worker"] == {"CPU": 1.25}
    other = synthetic_data_generation.submit(context, request(data, job_uuid="other"))
    assert other.bundles == [{"CPU": 0.25}]


def test_prompts_are_not_grown_by_an_engine_of_the_jobs_own() -> None:
    with pytest.raises(ValidationError) as caught:
        grown(engine="own")
    assert describe(caught.value).startswith("engine: is 'own', but prompts are grown before the job has an engine")


def test_the_best_of_k_become_a_data_set_to_learn_from(
    context: Context, data: dict[str, Any], engine: VariedEngine, here: None
) -> None:
    result = run(context, request(data))
    assert result["datasets"] == {"sft": "grow-1"}
    rows = {row["id"]: row for row in rows_of(context)}
    assert sorted(rows) == [f"row-{number}" for number in range(6)]
    for number in range(6):
        asked, answer = rows[f"row-{number}"]["dialog"]
        assert asked["content"] == f"question {number}"
        assert rows[f"row-{number}"]["score"] == len(answer["content"].split()) + 2
    assert len(engine.asked) == 36
    tune = samples.fine_tuning("grow-1", job_uuid="tune-1")
    assert post_training.supervised_fine_tune(context, PostTrainingSFTRequest.model_validate(tune)).uuid == "tune-1"


def test_the_best_and_the_worst_become_preferences_that_dpo_takes(
    context: Context, data: dict[str, Any], here: None
) -> None:
    run(context, request(data, output="preferences", output_dataset="pairs", min_margin=2.0))
    rows = rows_of(context, "pairs")
    assert rows
    for row in rows:
        assert row["chosen_score"] - row["rejected_score"] >= 2
        assert len(row["chosen"].split()) > len(row["rejected"].split())
    wanted = samples.preference_optimization("pairs", job_uuid="prefer-1")
    assert post_training.preference_optimize(context, PostTrainingRLHFRequest.model_validate(wanted)).uuid == "prefer-1"


def test_scored_dialogs_keep_what_the_filter_keeps(context: Context, data: dict[str, Any], here: None) -> None:
    run(context, request(data, output="scored", filtering_function="top_k", filter_k=2))
    for row in rows_of(context):
        assert len(row["generations"]) == 2
        assert row["dialog"][0]["content"].startswith("question")


def test_what_was_rejected_is_shown_and_counted(
    context: Context, data: dict[str, Any], engine: VariedEngine, here: None
) -> None:
    engine.refusals["question 3"] = BadInput("the prompt has 300 tokens; allowed: at most 256")
    result = run(context, request(data, threshold=5.0))
    rejected = lines(file_of(result, "rejected.jsonl"))
    (error,) = [one for one in rejected if one["reason"] == "error"]
    assert (error["row"], error["id"]) == (4, "row-3")
    assert "300 tokens" in error["text"]
    below = [one for one in rejected if one["reason"] == "below_threshold"]
    assert all(one["score"] < 5 for one in below)
    metrics = synthetic_data_generation.job_status(context, "grow-1").metrics
    assert metrics["rejected_error"] == metrics["failed"] == 1
    assert metrics["rejected_below_threshold"] == len(below)
    assert (metrics["prompts"], metrics["generated"]) == (6, 30)
    assert metrics["rows"] == len(rows_of(context))
    kept = sum(value for name, value in metrics.items() if name.startswith("rejected_")) - 1 + metrics["rows"]
    assert kept == 30, "every generation is in a row, or is rejected"
    statistics = json.loads(file_of(result, "statistics.json").read_text())
    assert sum(statistics["score_histogram"]["counts"]) == 30


def test_the_sample_of_what_was_rejected_is_bounded(
    context: Context, data: dict[str, Any], here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "MAX_SHOWN", 3)
    result = run(context, request(data, threshold=1e6))
    assert result["datasets"] == {}
    assert len(lines(file_of(result, "rejected.jsonl"))) == 3
    assert synthetic_data_generation.job_status(context, "grow-1").metrics["rejected_below_threshold"] == 36


def test_lineage_is_kept_with_the_data_set(context: Context, data: dict[str, Any], here: None) -> None:
    run(context, request(data))
    about = datasets.get(context, "grow-1").metadata
    job = context.store.jobs.get("default", "grow-1")
    assert about is not None
    assert job is not None
    assert about["prompts_sha256"] == job.request["dataset"]["sha256"]
    assert (about["model"], about["reward_model"], about["job_uuid"]) == ("small", "reward", "grow-1")
    assert (about["dataset"], about["seed_prompts_sha256"]) == (job.request["dataset"]["content_url"], None)
    assert about["parameters"]["num_generations"] == 6
    assert len(about["code_sha256"]) == 64


def test_a_job_that_was_lost_goes_on_and_comes_to_the_same(
    context: Context, data: dict[str, Any], engine: VariedEngine, here: None
) -> None:
    run(context, request(data, job_uuid="whole"))
    whole = sorted(rows_of(context, "whole"), key=lambda row: str(row["id"]))
    before = len(engine.asked)
    engine.away_after = engine.answers + 24
    with pytest.raises(Unavailable, match="row 5"):
        run(context, request(data))
    engine.away_after = None
    run(context, request(data))
    assert sorted(rows_of(context), key=lambda row: str(row["id"])) == whole
    answered = [one.body["messages"][-1]["content"] for one in engine.asked[before:]]
    assert answered.count("question 0") == 6, "of the rows that were written none is asked again"


def test_what_was_sampled_is_not_sampled_again_while_the_reward_model_is_away(
    context: Context, data: dict[str, Any], engine: VariedEngine, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, tries = engine.classify, []

    async def away_at_first(*given: Any) -> Any:
        tries.append(1)
        if len(tries) <= 3:
            raise Unavailable("it is being started")
        return await really(*given)

    monkeypatch.setattr(engine, "classify", away_at_first)
    run(context, request(data))
    assert len(engine.asked) == 36
    assert len(rows_of(context)) == 6


def test_a_reward_model_that_is_down_is_named_and_no_fault_of_the_job(
    context: Context, data: dict[str, Any], engine: VariedEngine, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any) -> Any:
        raise Unavailable("it is being started")

    monkeypatch.setattr(engine, "classify", away)
    with pytest.raises(Unavailable, match="row 1: the reward model 'reward' cannot score now"):
        run(context, request(data))


def proposal(body: dict[str, Any]) -> str:
    """Another prompt for each seed where prompts are asked for; words else."""
    if "Come up with" not in body["messages"][-1]["content"]:
        return "word " * (body["seed"] % 7 + 1)
    letters = re.sub(r"\d", lambda digit: "qwertyuiop"[int(digit[0])] * 3 + " ", str(body["seed"]))
    return f"1. {letters}"


def test_prompts_are_grown_from_seeds_and_answered(context: Context, engine: VariedEngine, here: None) -> None:
    engine.say = proposal
    result = run(context, grown())
    rows = rows_of(context)
    assert len(rows) == 5
    assert len({row["dialog"][0]["content"] for row in rows}) == 5
    assert "Name three rivers in France" not in {row["dialog"][0]["content"] for row in rows}
    assert result["datasets"] == {"sft": "grow-1"}


def test_near_duplicates_of_seeds_are_rejected_and_shown(context: Context, engine: VariedEngine, here: None) -> None:
    def say(body: dict[str, Any]) -> str:
        return proposal(body) + "\n2. Name three rivers in France!"

    engine.say = say
    result = run(context, grown())
    rejected = lines(file_of(result, "rejected.jsonl"))
    duplicates = [one for one in rejected if one["reason"] == "duplicate"]
    assert {one["text"] for one in duplicates} == {"Name three rivers in France!"}
    assert {one["of"] for one in duplicates} == {"Name three rivers in France"}


def test_the_prompts_that_were_grown_are_kept_and_known_by_their_hash(
    context: Context, engine: VariedEngine, here: None
) -> None:
    engine.say = proposal
    result = run(context, grown(output="scored"))
    kept = lines(file_of(result, "prompts.jsonl"))
    asked = {row["id"]: row["dialog"][0]["content"] for row in rows_of(context)}
    assert {row["id"]: row["prompt"] for row in kept} == asked
    about = datasets.get(context, "grow-1").metadata
    assert about is not None
    assert about["prompts_sha256"] == made_datasets.sha256(file_of(result, "prompts.jsonl"))
    assert len(about["seed_prompts_sha256"]) == 64


def test_a_prompt_that_was_cut_off_is_not_grown(context: Context, engine: VariedEngine, here: None) -> None:
    engine.say, engine.finish_reason = proposal, "length"
    with pytest.raises(BadInput, match="has proposed no prompt of use"):
        run(context, grown())


def test_prompts_that_were_grown_before_an_attempt_was_lost_are_not_grown_again(
    context: Context, engine: VariedEngine, here: None
) -> None:
    engine.say = proposal
    engine.away_after = 16  # as many as one round asks for
    with pytest.raises(Unavailable):
        run(context, grown(num_prompts=4))
    asked = [one for one in engine.asked if "Come up with" in one.body["messages"][-1]["content"]]
    engine.away_after = None
    seconds = jobs.work_folder("default", "grow-1") / "rows.seconds"
    assert float(seconds.read_text()) > 0
    seconds.write_text("1000.5")
    run(context, grown(num_prompts=4))
    assert synthetic_data_generation.job_status(context, "grow-1").metrics["seconds"] > 1_000.5
    again = [one for one in engine.asked if "Come up with" in one.body["messages"][-1]["content"]]
    assert len(again) == len(asked)
    assert len(rows_of(context)) == 4


def test_a_model_that_proposes_nothing_of_use_fails_the_job(context: Context, engine: VariedEngine, here: None) -> None:
    engine.say = lambda _: "No idea"
    with pytest.raises(BadInput, match="the model 'small' has proposed no prompt of use"):
        run(context, grown())


def test_a_question_that_fails_costs_no_prompt_that_was_grown(
    context: Context, engine: VariedEngine, here: None
) -> None:
    asked: list[str] = []

    def say(body: dict[str, Any]) -> str:
        question = body["messages"][-1]["content"]
        if "Come up with" in question:
            asked.append(question)
            if len(asked) == 2:
                raise BadInput("the prompt has 300 tokens")
        return proposal(body)

    engine.say = say
    run(context, grown(num_prompts=20))
    assert len(asked) > 16, "there is another round"
    assert len(rows_of(context)) == 20


@pytest.mark.parametrize("error", [BadInput("the prompt has 300 tokens"), EngineFailed("it ran out of memory")])
def test_where_no_prompt_is_grown_the_last_error_is_told(
    context: Context, engine: VariedEngine, here: None, error: StackError
) -> None:
    engine.refusals["Come up with"] = error
    with pytest.raises(BadInput, match=f"no prompt of use.*; the last question that failed: {error.message}"):
        run(context, grown())


@pytest.mark.parametrize("error", [Unavailable("it starts"), TooManyRequests("its queue is full")])
def test_a_model_that_is_away_while_prompts_are_grown_loses_the_attempt(
    context: Context, engine: VariedEngine, here: None, monkeypatch: pytest.MonkeyPatch, error: StackError
) -> None:
    monkeypatch.setattr("stack.batch_inference.PATIENCE_S", 0)
    engine.refusals["Come up with"] = error
    with pytest.raises(Unavailable, match=error.message):
        run(context, grown())


def documents(home: Path, *texts: str) -> dict[str, Any]:
    rows = [{"id": f"doc-{number}", "text": text} for number, text in enumerate(texts)]
    return dataset(write_rows(home / "data" / "documents.jsonl", rows), id="text", text="text")


def pair_of(body: dict[str, Any]) -> str:
    """A pair that cites the text, one that makes its quote up, or no pair, by the seed."""
    quotes = ["It is 1,230 km long.", "It is 5 km long indeed."]
    if body["seed"] % 3 == 2:
        return "I do not know."
    return json.dumps(
        {"question": f"How long is it? {body['seed']}", "answer": "It is.", "quote": quotes[body["seed"] % 3]}
    )


def test_documents_become_questions_with_answers_that_cite_them(
    context: Context, home: Path, engine: VariedEngine, here: None
) -> None:
    engine.say = pair_of
    wanted = request(documents(home, DOCUMENT, DOCUMENT), source="documents", num_generations=12)
    result = run(context, wanted)
    rows = rows_of(context)
    assert rows
    for row in rows:
        assert DOCUMENT[int(row["start"]) : int(row["end"])] == row["quote"] == "It is 1,230 km long."
        assert row["document"] in ("doc-0", "doc-1")
        assert row["dialog"][0]["content"].startswith("How long is it?")
    rejected = lines(file_of(result, "rejected.jsonl"))
    assert {one["reason"] for one in rejected} == {"ungrounded", "unreadable"}
    assert len(rows) + len(rejected) == 24
    assert "response_format" in engine.asked[0].body


def test_long_documents_are_read_in_passages(context: Context, home: Path, engine: VariedEngine, here: None) -> None:
    text = "".join(f"The river {number} rises here. It is 1,230 km long. " for number in range(20))
    engine.say = pair_of
    run(context, request(documents(home, text), source="documents", num_generations=3, passage_characters=200))
    seen = [one.body["messages"][-1]["content"] for one in engine.asked]
    assert len(set(seen)) >= len(text) // 200
    assert len(seen) == 3 * len(set(seen))
    assert synthetic_data_generation.job_status(context, "grow-1").metrics["prompts"] == len(set(seen))
    rows = rows_of(context)
    assert len({row["start"] for row in rows}) > 1
    for row in rows:
        assert text[int(row["start"]) : int(row["end"])] == row["quote"]


def test_a_passage_that_fails_costs_nothing_of_its_document(
    context: Context, home: Path, engine: VariedEngine, here: None
) -> None:
    text = "".join(f"The river {number} rises here. It is 1,230 km long. " for number in range(20))
    engine.say = lambda body: pair_of(body | {"seed": 0})
    engine.refusals["river 10"] = BadInput("the prompt has 300 tokens; allowed: at most 256")
    data = documents(home, text)
    result = run(context, request(data, source="documents", num_generations=1, passage_characters=200))
    (error,) = [one for one in lines(file_of(result, "rejected.jsonl")) if one["reason"] == "error"]
    assert error["id"] == "doc-0"
    metrics = synthetic_data_generation.job_status(context, "grow-1").metrics
    assert (metrics["failed"], metrics["rows"]) == (1, metrics["prompts"] - 1)
    assert len({row["id"] for row in rows_of(context)}) == metrics["rows"]


def test_a_document_that_was_begun_goes_on_with_the_passages_that_are_left(
    context: Context, home: Path, engine: VariedEngine, here: None
) -> None:
    text = "".join(f"The river {number} rises here. It is 1,230 km long. " for number in range(40))
    engine.say = pair_of
    engine.away_after = 4
    wanted = request(documents(home, text), source="documents", num_generations=1, passage_characters=200)
    with pytest.raises(Unavailable, match="row 5"):
        run(context, wanted)
    engine.away_after = None
    before = engine.answers
    run(context, wanted)
    prompts = synthetic_data_generation.job_status(context, "grow-1").metrics["prompts"]
    assert engine.answers - before == prompts - 4


def bank_of(context: Context, *documents: Any) -> str:
    """The id of a bank with these documents."""
    memory = Memory.open(context.config, BankWriter(context.config, context.store))
    wanted = CreateMemoryBankRequest.model_validate({"name": "a", "config": {"type": "keyvalue"}})
    bank_id = asyncio.run(banks.create(context, wanted)).bank_id
    if documents:
        body = InsertDocumentsRequest.model_validate({"bank_id": bank_id, "documents": list(documents)})
        asyncio.run(banks.insert(context, memory, body))
    return bank_id


def test_documents_of_a_memory_bank_become_questions_with_answers_that_cite_them(
    context: Context, home: Path, engine: VariedEngine, here: None
) -> None:
    engine.say = lambda body: pair_of(body | {"seed": 0})
    text = "".join(f"The river {number} rises here. It is 1,230 km long. " for number in range(20))
    html = "<h1>Rivers</h1><p>The Rhine rises here. <b>It is</b> 1,230 km long.</p>"
    bank_id = bank_of(context, document("long", text), document("page", html, "text/html"))
    wanted = request(bank_id=bank_id, source="documents", num_generations=1, passage_characters=200)
    run(context, wanted)
    rows = rows_of(context)
    cited = [row for row in rows if row["document"] == "long"]
    assert len({row["start"] for row in cited}) > 1
    assert all(text[int(row["start"]) : int(row["end"])] == row["quote"] for row in cited)
    assert [row["document"] for row in rows].count("page") <= 1, "its markup may break the quote"
    about = datasets.get(context, "grow-1").metadata
    assert about is not None
    assert (about["bank_id"], about["dataset"], len(about["prompts_sha256"])) == (bank_id, None, 64)
    assert "bank_id" not in about["parameters"]


def test_a_document_of_a_memory_bank_that_cannot_be_read_is_a_row_that_has_failed(
    context: Context, home: Path, engine: VariedEngine, here: None
) -> None:
    engine.say = lambda body: pair_of(body | {"seed": 0})
    (home / "data").mkdir(exist_ok=True)
    file = home / "data" / "rhine.txt"
    file.write_text(DOCUMENT)
    given = document("gone", {"uri": f"file://{file}"})
    bank_id = bank_of(context, given, document("here", DOCUMENT))
    file.unlink()
    result = run(context, request(bank_id=bank_id, source="documents", num_generations=1))
    limited = request(bank_id=bank_id, source="documents", job_uuid="grow-2", max_failed_rows=0)
    job = synthetic_data_generation.submit(context, limited)
    with work_of(context, job) as work:
        outcome = driver.generate(work, SyntheticDataJobRequest.model_validate(job.request))
    (error,) = [one for one in lines(file_of(result, "rejected.jsonl")) if one["reason"] == "error"]
    assert error["id"] == "gone"
    assert {row["document"] for row in rows_of(context)} == {"here"}
    assert outcome.problem is not None
    assert outcome.problem.startswith("row 1: ")


def test_a_job_about_a_memory_bank_that_was_lost_goes_on_with_what_the_bank_had(
    context: Context, home: Path, engine: VariedEngine, here: None
) -> None:
    engine.say = pair_of
    engine.away_after = 4
    bank_id = bank_of(context, *(document(f"d{number}", DOCUMENT) for number in range(9)))
    wanted = request(bank_id=bank_id, source="documents", num_generations=1)
    with pytest.raises(Unavailable, match="row 5"):
        run(context, wanted)
    context.store.memory_banks.delete("default", bank_id)
    engine.away_after = None
    before = engine.answers
    run(context, wanted)
    assert engine.answers - before == 5
    assert synthetic_data_generation.job_status(context, "grow-1").metrics["prompts"] == 9


def test_a_memory_bank_without_documents_or_of_another_tenant_is_refused(context: Context) -> None:
    bank_id = bank_of(context)
    with pytest.raises(BadInput, match="has no documents"):
        synthetic_data_generation.submit(context, request(bank_id=bank_id, source="documents"))
    with pytest.raises(NotFound, match="no memory bank"):
        synthetic_data_generation.submit(context.of_tenant("acme"), request(bank_id=bank_id, source="documents"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "documents"}, "dataset or bank_id is required with the source 'documents'"),
        (
            {"source": "dataset", "dataset": "texts", "bank_id": "bank-1"},
            "bank_id cannot be used with the source 'dataset'",
        ),
        (
            {"source": "documents", "bank_id": "bank-1", "dataset": "texts"},
            "there are dataset and bank_id; allowed: one of them",
        ),
    ],
    ids=str,
)
def test_documents_have_one_source(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        request(**changes)
    assert words in describe(caught.value)


def test_rows_that_no_data_set_can_hold_are_rejected(
    context: Context, data: dict[str, Any], engine: VariedEngine, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "MAX_ROW_BYTES", 400)
    engine.say = lambda body: "word " * (200 if body["messages"][-1]["content"] == "question 3" else 1)
    result = run(context, request(data))
    (rejected,) = [one for one in lines(file_of(result, "rejected.jsonl")) if one["reason"] == "too_large"]
    assert rejected["id"] == "row-3"
    assert len(rows_of(context)) == 5


@pytest.mark.parametrize(
    ("changes", "of_each"),
    [
        ({"output": "sft"}, 1),
        ({"output": "preferences"}, 2),
        ({"output": "scored"}, 6),
        ({"output": "scored", "filtering_function": "top_k", "filter_k": 2}, 2),
    ],
    ids=str,
)
def test_each_generation_of_a_row_that_no_data_set_can_hold_is_counted(
    context: Context,
    data: dict[str, Any],
    here: None,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    of_each: int,
) -> None:
    monkeypatch.setattr(driver, "MAX_ROW_BYTES", 10)
    run(context, request(data, **changes))
    metrics = synthetic_data_generation.job_status(context, "grow-1").metrics
    rejected = {name: value for name, value in metrics.items() if name.startswith("rejected_")}
    assert metrics["rows"] == 0
    assert rejected["rejected_too_large"] == 6 * of_each
    assert sum(rejected.values()) == metrics["generated"] == 36


def test_what_cannot_be_registered_is_kept_as_an_artifact_and_the_job_has_failed(
    context: Context, data: dict[str, Any], here: None
) -> None:
    job = synthetic_data_generation.submit(context, request(data, output_dataset="mine"))
    datasets.create(context, CreateDatasetRequest.model_validate({"uuid": "mine", "dataset": data}))
    with work_of(context, job) as work:
        outcome = driver.generate(work, SyntheticDataJobRequest.model_validate(job.request))
    assert outcome.problem == "there is a data set 'mine' already, which this job has not made"
    assert (outcome.result["datasets"], len(lines(file_of(outcome.result, "sft.jsonl")))) == ({}, 6)
    problem = outcome.problem
    assert context.store.jobs.complete(job.id, 1, outcome.result, artifact=outcome.artifact, problem=problem)
    failed = synthetic_data_generation.job_status(context, "grow-1")
    assert failed.status == "failed"
    assert failed.error == f"{problem}; what was made is kept as the artifact 'generations/grow-1'"
    told = synthetic_data_generation.job_artifacts(context, "grow-1")
    assert "sft.jsonl" in {file.name for file in told.files}


def test_more_failed_rows_than_allowed_fail_the_job_and_what_was_generated_is_kept(
    context: Context, data: dict[str, Any], engine: VariedEngine, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.row_log.WRITE_ROWS", 4)
    for number in (2, 3):
        engine.refusals[f"question {number}"] = BadInput("the prompt is too long")
    job = synthetic_data_generation.submit(context, request(data, max_failed_rows=1))
    with work_of(context, job) as work:
        outcome = driver.generate(work, SyntheticDataJobRequest.model_validate(job.request))
    assert outcome.problem is not None
    assert "allowed: max_failed_rows, 1; the first of them: row 3: the prompt is too long" in outcome.problem
    assert outcome.result["datasets"] == {}
    assert [row["id"] for row in lines(file_of(outcome.result, "sft.jsonl"))] == ["row-0", "row-1"]
    reasons = {one["id"]: one["reason"] for one in lines(file_of(outcome.result, "rejected.jsonl"))}
    assert (reasons["row-2"], reasons["row-3"]) == ("error", "error")


# What is accepted


def test_a_right_request_is_accepted_with_the_models_that_it_means(context: Context, data: dict[str, Any]) -> None:
    job = synthetic_data_generation.submit(context, request(data))
    assert (job.uuid, job.kind, job.status) == ("grow-1", "generate_synthetic_data", "scheduled")
    assert (job.request["model"], job.request["reward_model"]) == ("small", "reward")
    assert synthetic_data_generation.submit(context, request(data)) == job
    assert synthetic_data_generation.submit(context, request(data, model="small")) == job
    with pytest.raises(Conflict, match="'grow-1'"):
        synthetic_data_generation.submit(context, request(data, seed=1))


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"model": "big"}, NotFound, "there is no model 'big'"),
        ({"reward_model": "big"}, NotFound, "there is no reward model 'big'; there are: reward"),
        ({"source": "documents"}, None, ""),
        ({"sampling_params": {"strategy": "top_k"}}, BadInput, "needs a top_k"),
        ({"dataset": "none"}, NotFound, "'none'"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_before_any_work(
    context: Context, data: dict[str, Any], changes: dict[str, Any], kind: type[Exception] | None, words: str
) -> None:
    if kind is None:  # a text called prompt is a text as well
        assert synthetic_data_generation.submit(context, request(data, **changes)).uuid == "grow-1"
        return
    with pytest.raises(kind, match=words):
        synthetic_data_generation.submit(context, request(data, **changes))
    assert context.store.jobs.get("default", "grow-1") is None


def test_other_columns_empty_sets_and_ids_that_stand_twice_are_refused(context: Context, home: Path) -> None:
    file = write_rows(home / "data" / "a.jsonl", [{"question": "a"}])
    with pytest.raises(BadInput, match="prompts stand in one column of type dialog"):
        synthetic_data_generation.submit(context, request(dataset(file, question="text")))
    file = write_rows(home / "data" / "b.jsonl", [])
    with pytest.raises(BadInput, match="has no rows"):
        synthetic_data_generation.submit(context, request(dataset(file, prompt="text")))
    file = write_rows(home / "data" / "c.jsonl", [{"id": "a", "prompt": "b"}] * 2)
    with pytest.raises(BadInput, match="the rows 1 and 2 have the same id, 'a'"):
        synthetic_data_generation.submit(context, request(dataset(file, **PROMPTS)))


def test_a_data_set_of_the_name_is_a_conflict(context: Context, data: dict[str, Any]) -> None:
    datasets.create(context, CreateDatasetRequest.model_validate({"uuid": "pairs", "dataset": data}))
    with pytest.raises(Conflict, match="'pairs' already; choose another output_dataset"):
        synthetic_data_generation.submit(context, request(data, output_dataset="pairs"))


def test_two_jobs_cannot_make_the_same_data_set(context: Context, data: dict[str, Any]) -> None:
    synthetic_data_generation.submit(context, request(data, output_dataset="pairs"))
    with pytest.raises(Conflict, match="the job 'grow-1' is going to make a data set 'pairs'") as caught:
        synthetic_data_generation.submit(context, request(data, job_uuid="grow-2", output_dataset="pairs"))
    assert caught.value.param == "output_dataset"
    assert context.store.jobs.get("default", "grow-2") is None


@pytest.mark.parametrize("source", ["dataset", "documents", "self_instruct"])
def test_generations_that_would_not_fit_are_refused(context: Context, home: Path, source: str) -> None:
    wanted = grown() if source == "self_instruct" else request(documents(home, DOCUMENT * 30), source=source)
    if source == "dataset":
        rows = write_rows(home / "data" / "p.jsonl", [{"prompt": "a" * 400}] * 12)
        wanted = request(dataset(rows, prompt="text"))
    limited = replace(context, config=context.config.model_copy(update={"max_tenant_bytes": 10_000}))
    with pytest.raises(StorageFull, match="allowed: 10000"):
        synthetic_data_generation.submit(limited, wanted)
    accepted = SyntheticDataJobRequest.model_validate(synthetic_data_generation.submit(context, wanted).request)
    with pytest.raises(StorageFull, match="allowed: 10000"):
        synthetic_data_generation.resources(limited, accepted)
    assert synthetic_data_generation.resources(context, accepted)["workers"] == 1


@pytest.mark.parametrize(
    ("changes", "of_each"),
    [
        ({"output": "sft"}, 1),
        ({"output": "preferences"}, 2),
        ({"output": "scored"}, 6),
        ({"output": "scored", "filtering_function": "top_k", "filter_k": 3}, 3),
        ({"output": "scored", "filtering_function": "top_k", "filter_k": 64}, 6),
        ({"output": "sft", "source": "documents"}, 6),
    ],
    ids=str,
)
def test_room_is_needed_for_what_is_kept_alone(
    context: Context, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], of_each: int
) -> None:
    needed: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "stack.quotas.require_room_for_job", lambda _, kept, temporary, work: needed.append((kept, temporary))
    )
    synthetic_data_generation.submit(context, request(data, **changes))
    ((kept, temporary),) = needed
    generation = 512 * TOKEN_BYTES + RESULT_BYTES
    assert of_each * 6 * generation <= kept < (of_each * 6 + 1) * generation
    assert temporary >= kept + 36 * generation


def test_a_generation_is_found_by_its_uuid_alone(context: Context, data: dict[str, Any]) -> None:
    synthetic_data_generation.submit(context, request(data))
    listed = synthetic_data_generation.list_jobs(context, None, None, None, 10)
    assert [one.job_uuid for one in listed] == ["grow-1"]
    assert synthetic_data_generation.job_artifacts(context, "grow-1").datasets == {}
    samples.add_job(context.store, "evaluation-1")
    for look in (synthetic_data_generation.job_status, synthetic_data_generation.job_artifacts):
        with pytest.raises(NotFound):
            look(context, "evaluation-1")


def test_dialogs_that_are_learned_are_what_templates_take(context: Context, data: dict[str, Any], here: None) -> None:
    run(context, request(data))
    (row, *_) = rows_of(context)
    messages = [datasets.plain(one) for one in datasets.DIALOG.validate_python(row["dialog"])]
    assert template_messages("plain", messages)[-1]["role"] == "assistant"
