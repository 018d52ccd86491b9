"""Evaluation: Ray Data asks the model that serves, and each answer is scored beside its reference.

    ray job submit -- python -m jobs.evaluate --config jobs/examples/evaluate.yaml

The file holds the body of POST /evaluate/question_answering/; jobs/evaluate_summarization.py and
jobs/evaluate_text_generation.py are the same of the other tasks. What comes of each question is written down as it
comes, so that a job that was lost goes on with the others. At the end the scores become the job's metrics, and every
example with its output and scores a row of `examples.jsonl` and of `examples.parquet` among the artifacts, beside
`report.html`.

The model answers as it answers users, by the deployment that serves or by an engine of the job's own: behind its
shields. A question or an answer that they do not pass is an example with an empty answer and the shield's reason. An
example that gets no answer at all has failed: its error stands in its row, and it counts in no score.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

from jobs import dataset_source, driver, evaluation_report, evaluation_results, made_data, scores
from jobs.asking import Asker, asked, patiently
from jobs.evaluation_results import EXAMPLES_FILE
from jobs.row_log import Bounds, RowLog, complete, write_rows
from stack import datasets, evaluations, function_calls, openai_chats, reward_scoring, safety
from stack.api.evaluations import AnyEvaluationRequest, EvaluateJudgedRequest, EvaluateQuestionAnsweringRequest
from stack.config import Judge, LanguageModel
from stack.context import Context
from stack.datasets import Checked
from stack.errors import BadInput, ShieldViolation
from stack.inference import sampling_body
from stack.models import Model


def question_answering(work: driver.Work, request: EvaluateQuestionAnsweringRequest) -> driver.Outcome:
    """Asks a model every question of a data set and scores its answers against the expected ones."""
    return evaluate(work, request)


def evaluate(work: driver.Work, request: AnyEvaluationRequest) -> driver.Outcome:
    """Asks a model all examples of a data set, scores what it says, and publishes the results."""
    context = work.context
    model = evaluations.model_of(context, request.checkpoint)
    checked = datasets.resolve(context, request.dataset)
    wanted, log = _wanted(context, request), RowLog(work.folder / "rows.jsonl")
    rows = partial(dataset_source.rows, context, checked, evaluations.shape_of(request), but=log.rows)
    body = dict(sampling_body(request.sampling_params), model=model.id, stream=False)
    told = (context.config.model_dump(mode="json"), context.tenant, body, wanted)
    own, bounds = evaluations.own_model(context, request), Bounds(request.max_failed_rows)
    problem = made_data.problem_of(
        lambda: complete(log, lambda: asked(rows, Ask, *told, own=own), checked.rows, work.reporter.metrics, bounds)
    )
    if log.failed == checked.rows:
        problem = f"all {checked.rows} rows have failed; the first of them: {log.first_error}"
    return _outcome(work, request, model, wanted, checked, log, problem)


@dataclass(frozen=True)
class Wanted:
    """What is asked beside the questions themselves: how likely the references are, and a judge, who rates answers or
    compares them with those of the model `opponent`, or else with the references. With `rouge` an answer must not be
    too long for it."""

    rouge: bool = False
    likelihoods: bool = False
    judge: Judge | None = None
    rates: bool = False
    compares: bool = False
    opponent: str | None = None


class Ask(Asker):
    """Asks each row's question, and what is wanted beside it. What is not wanted has no key in the result."""

    harmless: ClassVar[dict[str, Any]] = {
        "messages": [{"role": "user", "content": "Hello"}], "answer": "Hello", "functions": [],
    }  # fmt: skip

    def __init__(
        self,
        config: dict[str, Any],
        tenant: str,
        body: dict[str, Any],
        wanted: Wanted,
        own: LanguageModel | None = None,
    ) -> None:
        super().__init__(config, tenant, own)
        self._body = body
        self._wanted = wanted

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        return {"result": json.dumps(await self._result(value))}

    async def _result(self, question: dict[str, Any]) -> dict[str, Any]:
        messages, reference, functions = question["messages"], question["answer"], question["functions"]
        found: dict[str, Any] = {"started": time.time()}
        found |= await self._models(messages, functions)
        if self._wanted.rouge:
            scores.require_rouge(reference, found["answer"])
        if self._wanted.likelihoods:
            logprobs = await self._logprobs(messages, reference)
            found |= dict(nll=-math.fsum(logprobs), reference_tokens=len(logprobs))
        if (judge := self._wanted.judge) is not None:
            found |= await self._judged(judge, messages, found["answer"], reference)
        return found | {"ended": time.time()}

    async def _models(self, messages: list[dict[str, Any]], functions: list[dict[str, Any]] | None) -> dict[str, Any]:
        """What the model answers; nothing, and the shield's reason, where its shields do not pass it."""
        found: dict[str, Any] = dict(answer="", shield_violation="", prompt_tokens=0, completion_tokens=0)
        if functions:
            found["calls"] = []
        try:
            given = json.loads(await self._answer(self._body["model"], messages, functions))
        except ShieldViolation as error:
            return found | dict(shield_violation=error.message)
        found |= {name: given["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
        if functions:  # beside the text: one that only looks like calls is none
            found["calls"] = function_calls.calls_of(_message(given))
        return found | dict(answer=_text_of(given))

    async def _answer(
        self, model: str, messages: list[dict[str, Any]], functions: list[dict[str, Any]] | None = None
    ) -> bytes:
        body = dict(self._body, model=model, messages=messages)
        if functions:
            with_tools = dict(body, tools=function_calls.tools(functions))
            return await patiently(lambda: openai_chats.answer(self._context, with_tools))
        return await patiently(lambda: safety.answer(self._context, "chat", body, messages))

    async def _judged(
        self, judge: Judge, messages: list[dict[str, Any]], answer: str, reference: str
    ) -> dict[str, Any]:
        """What a judge says of an answer, in both orders where it compares it with another one."""
        found: dict[str, Any] = {}
        if self._wanted.rates:
            said = [*messages, dict(role="assistant", content=answer)]
            found["rating"] = await patiently(lambda: reward_scoring.rate(self._context, judge, said))
        if self._wanted.compares:
            other = reference
            if (opponent := self._wanted.opponent) is not None:
                other = found["opponent_answer"] = await self._opponents(opponent, messages)
            prefer = partial(reward_scoring.prefer, self._context, judge, messages)
            found["shown_first"] = await patiently(lambda: prefer(answer, other))
            found["shown_second"] = 1 - await patiently(lambda: prefer(other, answer))
        return found

    async def _opponents(self, opponent: str, messages: list[dict[str, Any]]) -> str:
        """What the opponent answers; nothing where its shields do not pass it."""
        try:
            return _text_of(json.loads(await self._answer(opponent, messages)))
        except ShieldViolation:
            return ""

    async def _logprobs(self, messages: list[dict[str, Any]], reference: str) -> list[float]:
        """The log probability of each token of the reference, as the answer to these messages.

        It is that of a prompt which ends with the reference: the tokens behind those of the messages alone, which must
        be the same before it.
        """
        prompt = (await self._read(messages))["prompt_token_ids"]
        answered = [*messages, dict(role="assistant", content=reference)]
        whole = await self._read(answered, add_generation_prompt=False, continue_final_message=True, prompt_logprobs=0)
        if whole["prompt_token_ids"][: len(prompt)] != prompt:
            raise BadInput(
                "the prompt has other tokens where the reference follows, by the model's chat template or its "
                "tokenizer, so that the reference has no perplexity"
            )
        positions = (whole["prompt_logprobs"] or [])[len(prompt) :]
        logprobs = [one["logprob"] for position in positions for one in position.values()]
        if not logprobs:
            raise BadInput("the reference has no tokens behind the prompt's, so that it has no perplexity")
        return logprobs

    async def _read(self, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """What the engine itself, past the shields, tells of messages as a prompt: a token must be made for it."""
        asks = dict(messages=messages, max_tokens=1, temperature=0, stream=False, return_token_ids=True)
        body = dict(asks, model=self._body["model"], **more)
        told: dict[str, Any] = json.loads(await patiently(lambda: self._context.models.answer("chat", body)))
        return told


def _text_of(given: dict[str, Any]) -> str:
    """What an answer says; of one that calls functions, these."""
    message = _message(given)
    if calls := function_calls.calls_of(message):
        return function_calls.written(calls)
    return str(message["content"] or "")


def _message(given: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = given["choices"][0]["message"]
    return message


def _wanted(context: Context, request: AnyEvaluationRequest) -> Wanted:
    if not isinstance(request, EvaluateJudgedRequest):
        return Wanted(rouge="rouge" in request.metrics, likelihoods="perplexity" in request.metrics)
    return Wanted(
        judge=evaluations.judge_of(request),
        rates="rating" in request.metrics,
        compares="win_rate" in request.metrics,
        opponent=evaluations.model_of(context, request.opponent).id if request.opponent is not None else None,
    )


def _outcome(
    work: driver.Work,
    request: AnyEvaluationRequest,
    model: Model,
    wanted: Wanted,
    checked: Checked,
    log: RowLog,
    problem: str | None,
) -> driver.Outcome:
    """Publishes the examples and what they come to. Where there is a problem, they are a part of all or none of them
    has scores: they are published alone."""
    results = made_data.results_folder(work)
    file, scorers = results / EXAMPLES_FILE, scores.scorers(request.metrics)
    write_rows(file, (scored(line, scorers) for line in log))
    evaluation_results.write_parquet(file, request.metrics)
    found: dict[str, Any] = {}
    about: dict[str, Any] = {"model": model.id}
    if problem is None:
        summary = evaluation_results.summarize(request, file, model.id, checked.sha256, log.seconds, wanted.opponent)
        evaluation_report.write(results / "report.html", file, summary)
        work.reporter.metrics.log(0, summary.figures().items())
        found, about = summary.kept(), about | summary.figures()
    name = evaluations.results_name(work.job.tenant, work.job.uuid)
    files = driver.publish(work, name, results)
    kept = {"path": work.context.artifacts.url(name), "files": [asdict(one) for one in files], **found}
    return driver.Outcome(kept, driver.artifact_row(work, name, "metric", files, about), problem=problem)


# What the results say of a row beside its question and its scores, and what of one that failed.
_FAILED: dict[str, Any] = dict(
    answer="", shield_violation="", prompt_tokens=0, completion_tokens=0, started=None, ended=None
)


def scored(line: dict[str, Any], scorers: list[scores.Scorer]) -> dict[str, Any]:
    """A row of the log as it stands among the results: with its question, its reference and, if it has not failed, its
    scores."""
    question, result, error = line["value"], line["result"] or _FAILED, line["error"]
    kept = {"row": line["row"], "id": question["id"], "messages": question["messages"], "expected": question["answer"]}
    kept |= {"error": error["message"] if error else ""} | {name: result[name] for name in _FAILED}
    if error:
        return kept
    for score in scorers:
        kept |= score(question["answer"], result["answer"])
    if question["functions"]:
        expected = json.loads(question["answer"])
        kept["ast"] = float(function_calls.match(question["functions"], result["calls"], expected))
    if "nll" in result:
        kept |= scores.perplexity(result["nll"], result["reference_tokens"])
    if "shown_first" in result:
        kept |= scores.win_rate(result["shown_first"], result["shown_second"])
    return kept | {name: result[name] for name in ("rating", "opponent_answer") if name in result}


if __name__ == "__main__":
    sys.exit(
        driver.run(
            EvaluateQuestionAnsweringRequest, evaluations.question_answering, evaluations.resources, question_answering
        )
    )
