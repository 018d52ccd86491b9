"""Evaluation: Ray Data asks the model that serves, and each answer is scored beside its reference.

    ray job submit -- python -m jobs.evaluate --config jobs/examples/evaluate.yaml

The file holds the body of POST /evaluate/question_answering/; jobs/evaluate_summarization.py and
jobs/evaluate_text_generation.py are the same of the other tasks. The scores become the job's metrics, and every
example with its output and scores a row of `examples.jsonl` and of `examples.parquet` among the artifacts, beside
`report.html`.

The model answers as it answers users: behind its shields. A question or an answer that they do not pass is an example
with an empty answer and the shield's reason. An example that gets no answer at all, asked several times, has failed:
its error stands in its row, and it counts in no score.
"""

import asyncio
import json
import math
import sys
import time
from asyncio import sleep as pause
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
import ray.data

from jobs import dataset_source, driver, evaluation_report, evaluation_results, scores
from jobs.evaluation_results import EXAMPLES_FILE, whole_lines
from jobs.reporter import resources
from stack import datasets, evaluations, function_calls, openai_chats, reward_scoring, safety
from stack.api.evaluations import AnyEvaluationRequest, EvaluateJudgedRequest, EvaluateQuestionAnsweringRequest
from stack.config import Config, Judge
from stack.context import Context
from stack.errors import BadInput, EngineFailed, ShieldViolation, StackError, TooManyRequests, Unavailable
from stack.inference import sampling_body

# How many questions one worker asks at once; the engine batches them.
BATCH_SIZE = 32
# How often something is asked that a model cannot answer for the moment.
TRIES = 6
# What may go well when it is asked again, and of that what is no fault of the question: another attempt may go well.
PASSING = (Unavailable, TooManyRequests, EngineFailed)
AWAY = (Unavailable.code, TooManyRequests.code)
T = TypeVar("T")


def question_answering(work: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
    """Asks a model every question of a data set and scores its answers against the expected ones."""
    return evaluate(work, request)


def evaluate(work: driver.Work, request: AnyEvaluationRequest) -> driver.Outcome:
    """Asks a model all examples of a data set, scores what it says, and publishes the results."""
    context, job = work.context, work.job
    model = evaluations.model_of(context, request.checkpoint)
    checked = datasets.resolve(context, request.dataset)
    shape = evaluations.shape_of(request)
    # Read through before any question is asked, so that what is wrong is found first.
    total = sum(1 for _ in datasets.read_as(context, checked, shape))
    results = work.folder / "results"
    results.mkdir(exist_ok=True)
    file = results / EXAMPLES_FILE
    answered = evaluation_results.keep_answered(file)  # by an attempt that was lost
    if answered:
        print(f"going on from {len(answered)} of {total} examples")
    if len(answered) < total:
        body = dict(sampling_body(request.sampling_params), model=model.id, stream=False)
        answers = dataset_source.rows(context, checked, shape, but=answered).map_batches(
            Ask,
            fn_constructor_args=(context.config.model_dump(mode="json"), job.tenant, body, _wanted(context, request)),
            batch_size=BATCH_SIZE,
            concurrency=1,
            num_cpus=evaluations.ASKER_CPUS,
        )
        _score(work, request, answers, total, file)
    summary = evaluation_results.summarize(request, file, model.id, checked.sha256)
    evaluation_results.write_parquet(file, request.metrics)
    evaluation_report.write(results / "report.html", file, summary)
    work.reporter.metrics.log(0, summary.figures().items())
    work.reporter.metrics.progress(total, total, "examples", 0)
    name = evaluations.results_name(job.tenant, job.uuid)
    files = driver.publish(work, name, results)
    kept = {"path": context.artifacts.url(name), "files": [asdict(one) for one in files], **summary.kept()}
    return driver.Outcome(
        kept, driver.artifact_row(work, name, "metric", files, {"model": model.id, **summary.figures()})
    )


@dataclass(frozen=True)
class Wanted:
    """What is asked beside the questions themselves: how likely the references are, and a judge, who rates answers or
    compares them with those of the model `opponent`, or else with the references."""

    likelihoods: bool = False
    judge: Judge | None = None
    rates: bool = False
    compares: bool = False
    opponent: str | None = None


class Ask:
    """A worker of Ray Data that asks the questions of a batch side by side, and what is wanted beside them."""

    def __init__(self, config: dict[str, Any], tenant: str, body: dict[str, Any], wanted: Wanted) -> None:
        self._context = Context.open(Config.parse(config, "config")).of_tenant(tenant)
        self._body = body
        self._wanted = wanted

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        answers = await asyncio.gather(*(self._ask(json.loads(value)) for value in batch["value"]))
        yield dict(batch) | {name: [answer[name] for answer in answers] for name in answers[0]}

    async def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        messages, reference, functions = question["messages"], question["answer"], question["functions"]
        found: dict[str, Any] = dict(answer="", shield_violation="", error="", error_code="", **_NOT_WANTED)
        found |= dict(prompt_tokens=0, completion_tokens=0, started=time.time())
        try:
            given = json.loads(await _patiently(lambda: self._answer(self._body["model"], messages, functions)))
            found["answer"] = _text_of(given)
            found |= {name: given["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
            if self._wanted.likelihoods:
                logprobs = await _patiently(lambda: self._logprobs(messages, reference, found["prompt_tokens"]))
                found |= dict(nll=-math.fsum(logprobs), reference_tokens=len(logprobs))
            if (judge := self._wanted.judge) is not None:
                found |= await self._judged(judge, messages, found["answer"], reference)
        except ShieldViolation as error:
            found["shield_violation"] = error.message
        except StackError as error:
            found |= dict(answer="", error=error.message, error_code=error.code)
        return found | {"ended": time.time()}

    async def _answer(
        self, model: str, messages: list[dict[str, Any]], functions: list[dict[str, Any]] | None = None
    ) -> bytes:
        body = dict(self._body, model=model, messages=messages)
        if functions:
            return await openai_chats.answer(self._context, dict(body, tools=function_calls.tools(functions)))
        return await safety.answer(self._context, "chat", body, messages)

    async def _judged(
        self, judge: Judge, messages: list[dict[str, Any]], answer: str, reference: str
    ) -> dict[str, Any]:
        """What a judge says of an answer, in both orders where it compares it with another one."""
        found: dict[str, Any] = {}
        if self._wanted.rates:
            said = [*messages, dict(role="assistant", content=answer)]
            found["rating"] = await _patiently(lambda: reward_scoring.rate(self._context, judge, said))
        if self._wanted.compares:
            other = reference
            if (opponent := self._wanted.opponent) is not None:
                other = found["opponent_answer"] = await self._opponents(opponent, messages)
            prefer = partial(reward_scoring.prefer, self._context, judge, messages)
            found["shown_first"] = await _patiently(lambda: prefer(answer, other))
            found["shown_second"] = 1 - await _patiently(lambda: prefer(other, answer))
        return found

    async def _opponents(self, opponent: str, messages: list[dict[str, Any]]) -> str:
        """What the opponent answers; nothing where its shields do not pass it."""
        try:
            return _text_of(json.loads(await _patiently(lambda: self._answer(opponent, messages))))
        except ShieldViolation:
            return ""

    async def _logprobs(self, messages: list[dict[str, Any]], reference: str, prompt_tokens: int) -> list[float]:
        """The log probability of each token of the reference, as the answer to these messages.

        It is that of a prompt which ends with the reference: the tokens behind those of the messages alone.
        """
        body = dict(
            model=self._body["model"],
            messages=[*messages, dict(role="assistant", content=reference)],
            add_generation_prompt=False,
            continue_final_message=True,
            prompt_logprobs=0,
            max_tokens=1,
            temperature=0,
            stream=False,
        )
        positions = json.loads(await self._context.models.answer("chat", body))["prompt_logprobs"] or []
        logprobs = [one["logprob"] for position in positions[prompt_tokens:] for one in position.values()]
        if not logprobs:
            raise BadInput("the reference has no tokens behind the prompt's, so that it has no perplexity")
        return logprobs


# What stands in the columns of what is not wanted, or could not be had.
_NOT_WANTED = dict(
    nll=math.nan, reference_tokens=0, rating=math.nan, shown_first=math.nan, shown_second=math.nan, opponent_answer=""
)


def _text_of(given: dict[str, Any]) -> str:
    """What an answer says; of one that calls functions, these."""
    message = given["choices"][0]["message"]
    if calls := message.get("tool_calls"):
        return function_calls.written(calls)
    return str(message["content"] or "")


def _wanted(context: Context, request: AnyEvaluationRequest) -> Wanted:
    if not isinstance(request, EvaluateJudgedRequest):
        return Wanted(likelihoods="perplexity" in request.metrics)
    return Wanted(
        judge=evaluations.judge_of(request),
        rates="rating" in request.metrics,
        compares="win_rate" in request.metrics,
        opponent=evaluations.model_of(context, request.opponent).id if request.opponent is not None else None,
    )


async def _patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """What is asked for; it is asked for again while a replica is being replaced, say, or a queue is full."""
    for _ in range(TRIES - 1):
        try:
            return await ask()
        except PASSING as error:
            await pause(error.retry_after or 1)
    return await ask()


def _score(work: driver.Work, request: AnyEvaluationRequest, answers: ray.data.Dataset, total: int, file: Path) -> None:
    """Scores the answers as they come, and adds each to the file. Raises when too many examples have failed."""
    scorers = scores.scorers(request.metrics)
    before = done = sum(1 for _ in whole_lines(file))
    failed = 0
    first, process = time.time(), psutil.Process()
    with file.open("a") as lines:
        for row in _rows(answers):
            lines.write(json.dumps(scored(row, scorers)) + "\n")
            done += 1
            if row["error"]:
                failed += 1
                print(f"row {row['row']} failed: {row['error']}", file=sys.stderr, flush=True)
                require_few(failed, total, request.max_failed_share, row)
            if done % BATCH_SIZE == 0:
                lines.flush()
                print(f"{done} of {total} examples", flush=True)
                speed = (done - before) / (time.time() - first)
                work.reporter.metrics.log(done, [("examples_per_second", speed), *resources(process).items()])
                work.reporter.metrics.progress(done, total, "examples", (total - done) / speed)


def scored(row: dict[str, Any], scorers: list[scores.Scorer]) -> dict[str, Any]:
    """An answered row as it stands among the results: with its question, its reference and, if it has not failed, its
    scores."""
    question = json.loads(row["value"])
    kept = {name: value for name, value in row.items() if name != "value" and name not in _NOT_WANTED}
    kept |= {"id": question["id"], "messages": question["messages"], "expected": question["answer"]}
    if row["error"]:
        return kept
    for score in scorers:
        kept |= score(question["answer"], row["answer"])
    if question["functions"]:
        calls, expected = function_calls.calls_in(row["answer"]), json.loads(question["answer"])
        kept["ast"] = float(function_calls.match(question["functions"], calls, expected))
    if not math.isnan(row["nll"]):
        kept |= scores.perplexity(row["nll"], row["reference_tokens"])
    if not math.isnan(row["rating"]):
        kept["rating"] = row["rating"]
    if not math.isnan(row["shown_first"]):
        kept |= scores.win_rate(row["shown_first"], row["shown_second"])
    return kept | ({"opponent_answer": row["opponent_answer"]} if row["opponent_answer"] else {})


def require_few(failed: int, total: int, share: float, last: dict[str, Any]) -> None:
    """Raises when more examples have failed than may: Unavailable where the last could not be asked at all."""
    if failed <= share * total:
        return
    message = f"{failed} of {total} examples have failed; allowed: max_failed_share, {share:g}, of them"
    raise (Unavailable if last["error_code"] in AWAY else BadInput)(
        f"{message}; the last, row {last['row']}: {last['error']}"
    )


def _rows(answers: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    for row in answers.iter_rows():
        yield {name: value.item() if hasattr(value, "item") else value for name, value in row.items()}


if __name__ == "__main__":
    sys.exit(
        driver.run(
            EvaluateQuestionAnsweringRequest, evaluations.question_answering, evaluations.resources, question_answering
        )
    )
