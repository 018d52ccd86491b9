"""Scores of answers within their dialogs: by a reward model that was trained for it, or by a chat model as a judge."""

import asyncio
import json
import math
from collections.abc import Iterator
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
from stack.errors import BadInput, EngineFailed, NotFound
from stack.prompt_formats import template_messages

# How many of the likeliest tokens an engine tells.
TOP_TOKENS = 20


async def score(context: Context, request: RewardScoringRequest) -> RewardScoringResponse:
    """The score of each generation as the next message of its dialog; those below the threshold are left out.

    Raises NotFound for an unknown model, BadInput for one that gives no rewards and, by its place, for a generation
    that cannot be scored, EngineFailed for a judge that gives no rating, Unavailable.
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


def expected_rating(judge: Judge, top_tokens: list[dict[str, Any]]) -> float:
    """The mean of the ratings, weighted with the probabilities of their tokens among an answer's likeliest first ones.

    Raises EngineFailed where no rating is among them.
    """
    weights = dict.fromkeys(range(judge.lowest, judge.highest + 1), 0.0)
    ratings = {str(rating): rating for rating in weights}
    for token in top_tokens:  # with a blank before it or without: both say the rating
        if (rating := ratings.get(token["token"].strip())) is not None:
            weights[rating] += math.exp(token["logprob"])
    total = sum(weights.values())
    if not total:
        likely = ", ".join(repr(token["token"]) for token in top_tokens[:3]) or "nothing"
        ratings_are = f"{judge.lowest} to {judge.highest}"
        raise EngineFailed(f"the judge {judge.id!r} gives no rating from {ratings_are}: it would begin with {likely}")
    return sum(rating * weight for rating, weight in weights.items()) / total


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
    patient = replace(context, engine=PatientEngine(context.engine))
    slots = asyncio.Semaphore(AT_ONCE)

    async def ask(row: _Row) -> float:
        async with slots:
            return await _rating(patient, judge, row)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(row)) for row in rows]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    return [task.result() for task in tasks]


async def _rating(context: Context, judge: Judge, row: _Row) -> float:
    body = dict(
        model=judge.model,
        messages=[dict(role="user", content=_question(judge, row.messages))],
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
        raise BadInput(f"the judge {judge.id!r} cannot read it: {error.message}", param=row.place) from error
    positions = (answer["choices"][0].get("logprobs") or {}).get("content") or [{"top_logprobs": []}]
    return expected_rating(judge, positions[0]["top_logprobs"])


def _question(judge: Judge, messages: list[dict[str, Any]]) -> str:
    *dialog, answer = template_messages("plain", messages)
    said = "\n\n".join(f"{message['role']}: {message['content']}" for message in dialog)
    return (
        f"{judge.rubric}\n\n--- The conversation ---\n{said}\n\n--- The answer to rate ---\n{answer['content']}\n\n"
        f"--- Your rating ---\nReply with one whole number from {judge.lowest} (worst) to {judge.highest} (best), and "
        "with nothing else."
    )


def _passing(generations: list[Message], scores: Iterator[float], threshold: float | None) -> list[ScoredMessage]:
    """The generations that pass, with their scores, which are the next ones of `scores`."""
    scored = [ScoredMessage(message=message, score=next(scores)) for message in generations]
    return [one for one in scored if threshold is None or one.score >= threshold]
