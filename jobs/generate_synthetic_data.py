"""Synthetic data of any size: Ray Data samples generations, has them scored, and what is chosen becomes a data set.

    ray job submit -- python -m jobs.generate_synthetic_data --config jobs/examples/generate_synthetic_data.yaml

The file holds the body of POST /synthetic_data_generation/jobs. The prompts are the rows of a data set, or grown from a
few seeds (self-instruct), or questions about documents. All that was generated is written down row by row, so a job
that was lost goes on with the rows that it has nothing of. At the end the filter chooses, and the data set is
registered; a sample of what was rejected, with the reasons, is `rejected.jsonl` among the artifacts.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray.data

from jobs import dataset_source, driver, grown_prompts
from jobs.asking import Asker, Failures, asked
from jobs.row_log import RowLog, fill, write_rows
from stack import datasets, jobs, made_datasets, question_pairs, synthetic_data_generation, synthetic_rows
from stack.api.messages import CompletionMessage, UserMessage
from stack.api.synthetic_data_generation import PromptSource, SyntheticDataJobRequest
from stack.datasets import DIALOG
from stack.question_pairs import Dropped, Pair, Passage
from stack.synthetic_data_generation import HISTOGRAM_BINS, Sampler
from stack.synthetic_rows import Chosen, Generation, Pairs, Rejection, Scored, ScoredPair

# How many of what was rejected are shown, for each reason.
MAX_SHOWN = 100
_TOKENS = ("prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class Prompts:
    """What is asked about: how to read the rows that are not answered yet, how many there are in all, and the hash of
    what they are read from."""

    rows: Callable[[], ray.data.Dataset]
    total: int
    sha256: str
    grown: Path | None = None


def generate(work: driver.Work, request: SyntheticDataJobRequest) -> driver.Outcome:
    """Samples generations to prompts, scores and filters them, and makes a data set of what is chosen."""
    context, started = work.context, time.time()
    request = synthetic_data_generation.with_models(context, request)
    log = RowLog(work.folder / "rows.jsonl")
    prompts = _prompts(work, request, log)
    if len(log.rows):
        print(f"going on from {len(log.rows)} of {prompts.total} rows")
    if len(log.rows) < prompts.total:
        failures = Failures(request.max_failed_rows, log.failed, log.first_error)
        told = (context.config.model_dump(mode="json"), context.tenant, failures, request.model_dump(mode="json"))
        asker = AskAboutDocuments if request.source == PromptSource.documents else Generate
        fill(log, asked(prompts.rows, asker, *told), prompts.total, work.reporter.metrics)
    return _outcome(work, request, prompts, log, started)


class Generate(Asker):
    """Samples and scores the generations to each row's dialog."""

    def __init__(self, config: dict[str, Any], tenant: str, failures: Failures, request: dict[str, Any]) -> None:
        super().__init__(config, tenant, failures)
        self._request = SyntheticDataJobRequest.model_validate(request)
        self._sampler = Sampler(self._context, self._request)

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        sampled = await self._sampler.sample(row, DIALOG.validate_python(value["dialog"]))
        told = {
            "generations": [one.model_dump(mode="json") for one in sampled.generations],
            "prompt_tokens": sampled.prompt_tokens,
            "completion_tokens": sampled.completion_tokens,
        }
        return {"result": json.dumps(told)}


class AskAboutDocuments(Generate):
    """Has questions asked about each row's text, passage by passage, and the answers scored that are grounded."""

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        pairs: list[ScoredPair] = []
        dropped: list[Dropped] = []
        tokens = dict.fromkeys(_TOKENS, 0)
        parts = question_pairs.passages(value["text"], self._request.passage_characters)
        for number, passage in enumerate(parts):
            found, bad = await self._pairs(f"{row}:{number}", number, passage, tokens)
            pairs += found
            dropped += bad
        told = {"pairs": [asdict(one) for one in pairs], "dropped": [asdict(one) for one in dropped], **tokens}
        return {"result": json.dumps(told)}

    async def _pairs(
        self, place: str, number: int, passage: Passage, tokens: dict[str, int]
    ) -> tuple[list[ScoredPair], list[Dropped]]:
        asks = [UserMessage(content=question_pairs.question(passage))]
        answers = await self._sampler.answers(place, asks, response_format=question_pairs.RESPONSE_FORMAT)
        for one in answers:
            tokens["prompt_tokens"] += one.prompt_tokens
            tokens["completion_tokens"] += one.completion_tokens
        read = [question_pairs.pair(str(one.message.content), passage) for one in answers]
        scored = [await self._scored(number, one) for one in read if isinstance(one, Pair)]
        return scored, [one for one in read if isinstance(one, Dropped)]

    async def _scored(self, passage: int, pair: Pair) -> ScoredPair:
        asks, answer = UserMessage(content=pair.question), CompletionMessage(content=pair.answer)
        (score,) = await self._sampler.scores([asks], [answer])
        return ScoredPair(passage=passage, score=score, **asdict(pair))


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
            self.counts["rows"] += len(chosen.rows)
            yield from chosen.rows

    def reject(self, one: Rejection) -> None:
        """Counts what was rejected, and shows the first of each reason."""
        name = f"rejected_{one.reason}"
        self.counts[name] += 1
        if self.counts[name] <= MAX_SHOWN:
            self.shown.append(one.shown())

    def totals(self) -> dict[str, float]:
        """The counts, and the mean of the scores where there are any."""
        found = {name: float(count) for name, count in self.counts.items()}
        scored = self.counts["generated"]
        return found | ({"mean_score": self.sum / scored} if scored else {})


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
    pairs = Pairs(row, value["id"], [ScoredPair(**one) for one in result["pairs"]])
    chosen = synthetic_rows.of_document(request, pairs)
    dropped = [Rejection(row, value["id"], one["reason"], one["text"]) for one in result["dropped"]]
    return Chosen(chosen.rows, [*dropped, *chosen.rejections])


def histogram(log: RowLog, lowest: float, greatest: float) -> dict[str, list[float]]:
    """How the scores lie between the lowest and the greatest: the `counts` between each two of the `edges`."""
    counts = [0.0] * HISTOGRAM_BINS
    width = (greatest - lowest) / HISTOGRAM_BINS or 1.0
    for line in log:
        for score in scores_of(line) if line["error"] is None else ():
            counts[min(int((score - lowest) / width), HISTOGRAM_BINS - 1)] += 1
    return {"edges": [lowest + width * number for number in range(HISTOGRAM_BINS + 1)], "counts": counts}


def _prompts(work: driver.Work, request: SyntheticDataJobRequest, log: RowLog) -> Prompts:
    if request.source == PromptSource.self_instruct:
        file = grown_prompts.grow(work, request)
        total = sum(1 for _ in grown_prompts.prompts(file))
        return Prompts(partial(grown_prompts.rows, file, log.rows), total, made_datasets.sha256(file), file)
    assert request.dataset is not None
    checked = datasets.resolve(work.context, request.dataset)
    shape = synthetic_data_generation.shape_of(request)
    rows = partial(dataset_source.rows, work.context, checked, shape, but=log.rows)
    return Prompts(rows, checked.rows, checked.sha256)


def _outcome(
    work: driver.Work, request: SyntheticDataJobRequest, prompts: Prompts, log: RowLog, started: float
) -> driver.Outcome:
    tally, file = Tally(request), work.folder / "data.jsonl"
    for one in grown_prompts.dropped(prompts.grown) if prompts.grown else ():
        tally.reject(Rejection(0, "", one.reason or "", one.prompt))
    write_rows(file, tally.rows(log))
    lineage = _lineage(request, prompts)
    name, kinds = synthetic_data_generation.dataset_name(request), synthetic_rows.columns(request)
    found = made_datasets.register(work.context, name, file, kinds, lineage)
    made = {} if found is None else {request.output.value: found.uuid}
    totals = {"rows": 0.0, "generated": 0.0, **tally.totals(), "prompts": float(prompts.total)}
    totals |= {"failed": float(log.failed), "seconds": time.time() - started}
    work.reporter.metrics.log(0, totals.items())
    print(f"{totals['rows']:.0f} rows of {prompts.total} prompts" + ("" if made else ": no data set is made of none"))
    results = work.folder / "results"
    results.mkdir(exist_ok=True)
    write_rows(results / "rejected.jsonl", tally.shown)
    scores = histogram(log, tally.lowest, tally.greatest) if tally.counts["generated"] else None
    about = lineage | {"datasets": made, "totals": totals, "score_histogram": scores}
    (results / "statistics.json").write_text(json.dumps(about, indent=2))
    artifact = jobs.artifact_name(work.job.tenant, jobs.GENERATIONS, work.job.uuid)
    files = driver.publish(work, artifact, results)
    kept = {"path": work.context.artifacts.url(artifact), "files": [asdict(one) for one in files], "datasets": made}
    return driver.Outcome(kept, driver.artifact_row(work, artifact, "dataset", files, about))


def _lineage(request: SyntheticDataJobRequest, prompts: Prompts) -> dict[str, Any]:
    left_out = {"dataset", "seed_prompts", "job_uuid", "model", "reward_model", "priority"}
    return {
        "job_uuid": request.job_uuid,
        "kind": jobs.GENERATE,
        "model": request.model,
        "reward_model": request.reward_model,
        "prompts_sha256": prompts.sha256,
        "parameters": request.model_dump(mode="json", exclude=left_out),
        "code_sha256": made_datasets.code_version(),
    }


if __name__ == "__main__":
    resources, submit = synthetic_data_generation.resources, synthetic_data_generation.submit
    sys.exit(driver.run(SyntheticDataJobRequest, submit, resources, generate))
