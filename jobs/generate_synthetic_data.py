"""Synthetic data of any size: Ray Data samples generations, has them scored, and what is chosen becomes a data set.

    ray job submit -- python -m jobs.generate_synthetic_data --config jobs/examples/generate_synthetic_data.yaml

The file holds the body of POST /synthetic_data_generation/jobs. The prompts are the rows of a data set, or grown from a
few seeds (self-instruct), or questions about documents: those of a data set or of a memory bank. All that was generated
is written down row by row, so a job that was lost goes on with the rows that it has nothing of. At the end the filter
chooses, and the data set is registered; a sample of what was rejected, with the reasons, is `rejected.jsonl` among the
artifacts.
"""

import asyncio
import hashlib
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import ray.data

from jobs import bank_source, dataset_source, driver, grown_prompts, made_data
from jobs.asking import Asker, asked, patiently
from jobs.made_data import MadeData
from jobs.row_log import Bounds, RowLog, complete, text_of, write_rows
from stack import datasets, jobs, made_datasets, question_pairs, synthetic_data_generation, synthetic_rows
from stack.api.messages import CompletionMessage, UserMessage
from stack.api.synthetic_data_generation import PromptSource, SyntheticDataJobRequest
from stack.config import LanguageModel
from stack.context import Context
from stack.dataset_files import MAX_ROW_BYTES
from stack.datasets import DIALOG
from stack.errors import StackError
from stack.memory_banks import banks, ingestion
from stack.memory_banks.documents import text_in
from stack.memory_banks.rows import StoredDocument
from stack.memory_banks.tables import Tables
from stack.prompt_rows import Text
from stack.question_pairs import Dropped, Pair, Passage
from stack.synthetic_data_generation import Sampler, histogram, sampled
from stack.synthetic_rows import Chosen, Generation, Pairs, Rejection, Scored, ScoredPair

# How many of what was rejected are shown, for each reason.
MAX_SHOWN = 100
# How many documents of a bank are read at once, of up to 32 MiB each.
READ_AT_ONCE = 8
_TOKENS = ("prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class Prompts:
    """What is asked about: how to read the rows that are not answered yet, how many there are in all, and the hash of
    what they are read from; or, of prompts that were grown, the file with all that was proposed."""

    rows: Callable[[], ray.data.Dataset]
    total: int
    sha256: str = ""
    grown: Path | None = None


def generate(work: driver.Work, request: SyntheticDataJobRequest) -> driver.Outcome:
    """Samples generations to prompts, scores and filters them, and makes a data set of what is chosen."""
    context = work.context
    request = synthetic_data_generation.with_models(context, request)
    log = RowLog(work.folder / "rows.jsonl", partial(size_of, request))
    prompts = _prompts(work, request, log)
    told = (context.config.model_dump(mode="json"), context.tenant, request.model_dump(mode="json"))
    asker = AskAboutPassages if request.source == PromptSource.documents else Generate
    own = synthetic_data_generation.own_model(context, request)
    bounds = Bounds(request.max_failed_rows, context.config.max_dataset_bytes)
    metrics = work.reporter.metrics

    def ask_all() -> None:
        log.require_within(bounds)  # what could not be read has failed already
        complete(log, lambda: asked(prompts.rows, asker, *told, own=own), prompts.total, metrics, bounds)

    problem = made_data.problem_of(ask_all)
    return _outcome(work, request, prompts, log, problem)


class Generate(Asker):
    """Samples and scores the generations to each row's dialog."""

    harmless: ClassVar[dict[str, Any]] = {"dialog": [{"role": "user", "content": "Hello"}]}

    def __init__(
        self, config: dict[str, Any], tenant: str, request: dict[str, Any], own: LanguageModel | None = None
    ) -> None:
        super().__init__(config, tenant, own)
        self._request = SyntheticDataJobRequest.model_validate(request)
        self._sampler = Sampler(self._context, self._request)

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        dialog = DIALOG.validate_python(value["dialog"])
        answers = await patiently(lambda: self._sampler.answers(row, dialog))
        messages = [one.message for one in answers]
        # What was sampled is not sampled again while the reward model is away.
        found = sampled(answers, await patiently(lambda: self._sampler.scores(dialog, messages)))
        told = {
            "generations": [one.model_dump(mode="json") for one in found.generations],
            "prompt_tokens": found.prompt_tokens,
            "completion_tokens": found.completion_tokens,
        }
        return {"result": json.dumps(told)}


class AskAboutPassages(Generate):
    """Has questions asked about each row's passage of a document, and the answers scored that are grounded."""

    harmless: ClassVar[dict[str, Any]] = asdict(Passage("The Rhine rises in Switzerland.", 0))

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        passage = Passage(**value)
        asks = [UserMessage(content=question_pairs.question(passage))]
        shape = question_pairs.RESPONSE_FORMAT
        answers = await patiently(lambda: self._sampler.answers(row, asks, response_format=shape))
        read = [question_pairs.pair(str(one.message.content), passage) for one in answers]
        scored = await asyncio.gather(*(self._scored(one) for one in read if isinstance(one, Pair)))
        told = {
            "pairs": [asdict(one) for one in scored],
            "dropped": [asdict(one) for one in read if isinstance(one, Dropped)],
            "prompt_tokens": sum(one.prompt_tokens for one in answers),
            "completion_tokens": sum(one.completion_tokens for one in answers),
        }
        return {"result": json.dumps(told)}

    async def _scored(self, pair: Pair) -> ScoredPair:
        asks, answer = UserMessage(content=pair.question), CompletionMessage(content=pair.answer)
        (score,) = await patiently(lambda: self._sampler.scores([asks], [answer]))
        return ScoredPair(score=score, **asdict(pair))


@dataclass
class Tally:
    """What has come of all rows: the rows of the data set one by one, and meanwhile the counts and the rejections."""

    request: SyntheticDataJobRequest
    counts: Counter[str] = field(default_factory=Counter)
    shown: list[dict[str, Any]] = field(default_factory=list)
    lowest: float = float("inf")
    greatest: float = float("-inf")
    sum: float = 0.0

    def rows(self, log: RowLog) -> Iterator[dict[str, Any]]:
        """The rows of the data set, in the order in which they were generated."""
        for line in log:
            if (error := line["error"]) is not None:
                self.reject(Rejection(line["row"], line["value"]["id"], "error", error["message"]))
                continue
            for name in _TOKENS:
                self.counts[name] += line["result"][name]
            for score in scores_of(line):
                self.counts["generated"] += 1
                self.lowest, self.greatest = min(self.lowest, score), max(self.greatest, score)
                self.sum += score
            chosen = chosen_of(self.request, line)
            for one in chosen.rejections:
                self.reject(one)
            for row in chosen.rows:
                if len(text_of(row)) > MAX_ROW_BYTES:
                    too_large = Rejection(line["row"], line["value"]["id"], "too_large", "")
                    self.reject(too_large, synthetic_rows.generations_in(row))
                    continue
                self.counts["rows"] += 1
                yield row

    def reject(self, one: Rejection, generations: int = 1) -> None:
        """Counts what was rejected, so many generations at once, and shows the first of each reason."""
        name = f"rejected_{one.reason}"
        if self.counts[name] < MAX_SHOWN:
            self.shown.append(one.shown())
        self.counts[name] += generations

    def totals(self) -> dict[str, float]:
        """The counts, and the mean of the scores where there are any."""
        found = {name: float(count) for name, count in self.counts.items()}
        scored = self.counts["generated"]
        return found | ({"mean_score": self.sum / scored} if scored else {})

    def histogram(self, log: RowLog) -> dict[str, list[float]] | None:
        """How the scores lie; None where there are none."""
        if not self.counts["generated"]:
            return None
        scores = (score for line in log if line["error"] is None for score in scores_of(line))
        return histogram(scores, self.lowest, self.greatest)


def scores_of(line: dict[str, Any]) -> list[float]:
    """The scores of what was generated for a row that has not failed."""
    result = line["result"]
    return [one["score"] for one in result.get("generations", result.get("pairs", ()))]


def chosen_of(request: SyntheticDataJobRequest, line: dict[str, Any]) -> Chosen:
    """What becomes of a row that has not failed."""
    row, value, result = line["row"], line["value"], line["result"]
    if request.source != PromptSource.documents:
        generations = [Generation(one["message"], one["score"]) for one in result["generations"]]
        return synthetic_rows.of_prompt(request, Scored(row, value["id"], value["dialog"], generations))
    pairs = [ScoredPair(**one) for one in result["pairs"]]
    chosen = synthetic_rows.of_passage(request, Pairs(row, value["id"], value["number"], pairs))
    dropped = [Rejection(row, value["id"], one["reason"], one["text"]) for one in result["dropped"]]
    return Chosen(chosen.rows, [*dropped, *chosen.rejections])


def size_of(request: SyntheticDataJobRequest, line: dict[str, Any]) -> int:
    """How many bytes the rows have that come of a line."""
    return 0 if line["error"] is not None else sum(len(text_of(row)) for row in chosen_of(request, line).rows)


def _prompts(work: driver.Work, request: SyntheticDataJobRequest, log: RowLog) -> Prompts:
    if request.source == PromptSource.self_instruct:
        file = grown_prompts.grow(work, request, log)
        total = sum(1 for _ in grown_prompts.prompts(file))
        return Prompts(partial(grown_prompts.rows, file, log.rows), total, grown=file)
    if request.bank_id is not None:
        file = work.folder / "passages.jsonl"
        total = asyncio.run(bank_source.copy(file, _passages(work.context, request, request.bank_id)))
        bank_source.note_errors(file, log)
        return Prompts(partial(bank_source.rows, file, log.rows), total, made_datasets.sha256(file))
    assert request.dataset is not None
    checked = datasets.resolve(work.context, request.dataset)
    shape, split, total = synthetic_data_generation.shape_of(request), None, checked.rows
    if request.source == PromptSource.documents:
        split = partial(question_pairs.passages, most=request.passage_characters)
        total = sum(1 for _ in dataset_source.numbered(work.context, checked, shape, split))
    rows = partial(dataset_source.rows, work.context, checked, shape, but=log.rows, split=split)
    return Prompts(rows, total, checked.sha256)


async def _passages(context: Context, request: SyntheticDataJobRequest, bank_id: str) -> AsyncIterator[dict[str, Any]]:
    """The passages of all documents of a bank; of one that cannot be read, why."""
    bank = ingestion.require_documents(context, bank_id, "bank_id")
    async for batch in _batches(banks.all_documents(Tables(context.config), bank)):
        for document, text in zip(batch, await _texts(context, batch), strict=True):
            if isinstance(text, StackError):
                error = {"code": text.code, "message": text.message, "type": text.type, "param": None}
                yield {"value": {"id": document.document_id}, "error": error}
                continue
            for passage in question_pairs.passages(Text(document.document_id, text), request.passage_characters):
                yield {"value": asdict(passage)}


async def _batches(documents: AsyncIterator[StoredDocument]) -> AsyncIterator[list[StoredDocument]]:
    """Documents in lists of READ_AT_ONCE."""
    batch: list[StoredDocument] = []
    async for document in documents:
        batch.append(document)
        if len(batch) == READ_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


async def _texts(context: Context, documents: Sequence[StoredDocument]) -> list[str | StackError]:
    """The texts of documents as they are read, in which chunks have their places too."""

    async def text(document: StoredDocument) -> str | StackError:
        try:
            return await text_in(context, banks.given(document))
        except StackError as error:
            return error

    return await asyncio.gather(*map(text, documents))


def _outcome(
    work: driver.Work,
    request: SyntheticDataJobRequest,
    prompts: Prompts,
    log: RowLog,
    problem: str | None,
) -> driver.Outcome:
    tally, file, results = Tally(request), work.folder / "data.jsonl", made_data.results_folder(work)
    if (grown := prompts.grown) is not None:
        prompts = replace(prompts, sha256=grown_prompts.publish(grown, results / "prompts.jsonl"))
        for one in grown_prompts.dropped(grown):
            tally.reject(Rejection(0, "", one.reason or "", one.prompt, of=one.of))
    write_rows(file, tally.rows(log))
    lineage = _lineage(request, prompts)
    (name,) = made_datasets.names_of(jobs.GENERATE, request.model_dump(mode="json"))
    data = MadeData(request.output.value, name, file, synthetic_rows.columns(request))
    registered = made_data.register(work, [data], lineage, results, problem)
    totals = {"rows": 0.0, "generated": 0.0, **tally.totals(), "prompts": float(prompts.total)}
    totals |= {"failed": float(log.failed), "seconds": log.seconds}
    work.reporter.metrics.log(0, totals.items())
    print(f"{totals['rows']:.0f} rows of {prompts.total} prompts" + ("" if registered.datasets else ": no data set"))
    write_rows(results / "rejected.jsonl", tally.shown)
    about = lineage | {"datasets": registered.datasets, "totals": totals, "score_histogram": tally.histogram(log)}
    (results / "statistics.json").write_text(json.dumps(about, indent=2))
    return made_data.outcome(work, jobs.GENERATIONS, results, registered, about)


def _lineage(request: SyntheticDataJobRequest, prompts: Prompts) -> dict[str, Any]:
    left_out = {"dataset", "bank_id", "seed_prompts", "job_uuid", "model", "reward_model", "priority"}
    return {
        "job_uuid": request.job_uuid,
        "kind": jobs.GENERATE,
        "model": request.model,
        "reward_model": request.reward_model,
        "dataset": None if request.dataset is None else made_datasets.address_of(request.dataset),
        "bank_id": request.bank_id,
        "seed_prompts_sha256": _hash_of(request.seed_prompts) if request.seed_prompts else None,
        "prompts_sha256": prompts.sha256,
        "parameters": request.model_dump(mode="json", exclude=left_out),
        "code_sha256": made_datasets.code_version(),
    }


def _hash_of(texts: Sequence[str]) -> str:
    """The SHA-256 of texts as JSON."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()


if __name__ == "__main__":
    resources, submit = synthetic_data_generation.resources, synthetic_data_generation.submit
    sys.exit(driver.run(SyntheticDataJobRequest, submit, resources, generate))
