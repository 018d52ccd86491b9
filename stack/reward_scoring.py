"""Scores of answers within their dialogs: by a reward model that was trained for it, or by a chat model as a judge."""

import asyncio
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stack.api.messages import Message
from stack.api.reward_scoring import (
    RewardScoringRequest,
    RewardScoringResponse,
    ScoredDialogGenerations,
    ScoredMessage,
)
from stack.batch_inference import AT_ONCE, PatientEngine
from stack.config import Judge, RewardModel
from stack.context import Context
from stack.datasets import plain
from stack.errors import BadInput, NotFound
from stack.prompt_formats import template_messages

# How many of the likeliest tokens an engine tells.
TOP_TOKENS = 20


async def score(context: Context, request: RewardScoringRequest) -> RewardScoringResponse:
    """The score of each generation as the next message of its dialog; those below the threshold are left out.

    Raises NotFound for an unknown model, BadInput for one that gives no rewards and, by its place, for a generation
    that cannot be scored, or of which a judge gives no rating, EngineFailed, Unavailable.
    """
    model = await context.models.find_reward_model(request.model)
    rows = await asyncio.to_thread(_rows, request)
    scores: list[float] = []
    if rows:
        scores = await (
            _judged(context, model, rows) if isinstance(model, Judge) else _classified(context, model, rows)
        )
    left = iter(scores)
    return RewardScoringResponse(
        scored_generations=[
            ScoredDialogGenerations(
                dialog=one.dialog, scored_generations=_passing(one.sampled_generations, left, request.threshold)
            )
            for one in request.dialog_generations
        ]
    )


async def rate(context: Context, judge: Judge, messages: list[dict[str, Any]]) -> float:
    """The rating that a judge expects of the last of messages in OpenAI's shape. Raises as `score` does."""
    return expected_rating(judge, await _first_tokens(context, judge, _question(judge, messages)))


async def prefer(context: Context, judge: Judge, messages: list[dict[str, Any]], first: str, second: str) -> float:
    """How probable a judge takes it, from 0 to 1, that the first of two answers to messages is the better one.

    It depends on their order too: ask both ways (Zheng et al. 2023, arXiv 2306.05685). Raises as `score` does.
    """
    tokens = await _first_tokens(context, judge, _choice(judge, messages, first, second))
    weights = _probabilities(tokens, ("A", "B"))
    if weights is None:
        raise BadInput(f"the judge {judge.id!r} prefers neither A nor B: it would begin with {_likely(tokens)}")
    return weights["A"]


def expected_rating(judge: Judge, top_tokens: list[dict[str, Any]]) -> float:
    """The mean of the ratings, weighted with the probabilities of their tokens among an answer's likeliest first ones.

    Raises BadInput where no rating is among them: so it is each time that the judge is asked.
    """
    weights = _probabilities(top_tokens, [str(rating) for rating in range(judge.lowest, judge.highest + 1)])
    if weights is None:
        ratings = f"{judge.lowest} to {judge.highest}"
        likely = _likely(top_tokens)
        raise BadInput(f"the judge {judge.id!r} gives no rating from {ratings}: it would begin with {likely}")
    return sum(int(rating) * weight for rating, weight in weights.items())


def _probabilities(top_tokens: list[dict[str, Any]], choices: Sequence[str]) -> dict[str, float] | None:
    """Those of some choices, among each other, by the tokens that say them; None where no token does."""
    weights = dict.fromkeys(choices, 0.0)
    for token in top_tokens:  # with a blank before it or without: both say it
        if (choice := token["token"].strip()) in weights:
            weights[choice] += math.exp(token["logprob"])
    total = sum(weights.values())
    return {choice: weight / total for choice, weight in weights.items()} if total else None


def _likely(top_tokens: list[dict[str, Any]]) -> str:
    return ", ".join(repr(token["token"]) for token in top_tokens[:3]) or "nothing"


@dataclass(frozen=True)
class _Row:
    """A generation at its place in the request, as the last of messages in OpenAI's shape."""

    place: str
    messages: list[dict[str, Any]]


def _rows(request: RewardScoringRequest) -> list[_Row]:
    rows = []
    for number, one in enumerate(request.dialog_generations):
        place = f"dialog_generations.{number}"
        dialog = [_plain(message, f"{place}.dialog.{index}") for index, message in enumerate(one.dialog)]
        for index, message in enumerate(one.sampled_generations):
            at = f"{place}.sampled_generations.{index}"
            rows.append(_Row(at, [*dialog, _plain(message, at)]))
    return rows


def _plain(message: Message, place: str) -> dict[str, Any]:
    try:
        return plain(message)
    except BadInput as error:
        raise BadInput(error.message, param=f"{place}.{error.param}") from error


async def _classified(context: Context, model: RewardModel, rows: list[_Row]) -> list[float]:
    """The scores of a trained reward model, which is asked once for all rows."""
    inputs = await asyncio.to_thread(lambda: [template_messages(model.prompt_format, row.messages) for row in rows])
    try:
        scores = await context.models.classify(model, inputs, windows=False)
    except BadInput as error:  # of one row: its index
        place = rows[int(error.param)].place if error.param else None
        raise BadInput(f"the generation with its dialog {error.message}", param=place) from error
    weights = model.weights_of(scores.labels)
    return [float(value) for value in scores.values.astype(float) @ weights]


async def _judged(context: Context, judge: Judge, rows: list[_Row]) -> list[float]:
    """The ratings that a judge expects. Whoever leaves takes all questions along."""
    is_patient = isinstance(context.engine, PatientEngine)
    patient = context if is_patient else replace(context, engine=PatientEngine(context.engine))
    slots = asyncio.Semaphore(AT_ONCE)

    async def ask(row: _Row) -> float:
        async with slots:
            try:
                return await rate(patient, judge, row.messages)
            except BadInput as error:
                error.param = row.place
                raise

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(row)) for row in rows]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    return [task.result() for task in tasks]


async def _first_tokens(context: Context, judge: Judge, question: str) -> list[dict[str, Any]]:
    """The likeliest tokens with which a judge would begin its answer."""
    body = dict(
        model=judge.model,
        messages=[dict(role="user", content=question)],
        max_tokens=1,
        temperature=0,
        logprobs=True,
        top_logprobs=TOP_TOKENS,
    )
    try:
        answer = json.loads(await context.models.answer("chat", body))
    except NotFound as error:
        raise NotFound(f"the judge {judge.id!r} has lost its model: {error.message}", param="model") from error
    except BadInput as error:  # too long, mostly
        raise BadInput(f"the judge {judge.id!r} cannot read it: {error.message}") from error
    positions = (answer["choices"][0].get("logprobs") or {}).get("content") or [{"top_logprobs": []}]
    top_tokens: list[dict[str, Any]] = positions[0]["top_logprobs"]
    return top_tokens


def _conversation(judge: Judge, dialog: Sequence[dict[str, Any]]) -> str:
    said = "\n\n".join(f"{message['role']}: {message['content']}" for message in dialog)
    return f"{judge.rubric}\n\n--- The conversation ---\n{said}"


def _question(judge: Judge, messages: list[dict[str, Any]]) -> str:
    *dialog, answer = template_messages("plain", messages)
    return (
        f"{_conversation(judge, dialog)}\n\n--- The answer to rate ---\n{answer['content']}\n\n"
        f"--- Your rating ---\nReply with one whole number from {judge.lowest} (worst) to {judge.highest} (best), and "
        "with nothing else."
    )


def _choice(judge: Judge, messages: list[dict[str, Any]], first: str, second: str) -> str:
    return (
        f"{_conversation(judge, template_messages('plain', messages))}\n\n--- Answer A ---\n{first}\n\n"
        f"--- Answer B ---\n{second}\n\n--- The better answer ---\nReply with one letter, A or B, and with nothing "
        "else."
    )


def _passing(generations: list[Message], scores: Iterator[float], threshold: float | None) -> list[ScoredMessage]:
    """The generations that pass, with their scores, which are the next ones of `scores`."""
    scored = [ScoredMessage(message=message, score=next(scores)) for message in generations]
    return [one for one in scored if threshold is None or one.score >= threshold]
