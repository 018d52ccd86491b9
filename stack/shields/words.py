"""Shields that are chat models: the word that one answers with, and how likely the other one was."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stack.models import Endpoint, Models

# Of each token, as many likely ones are asked for as vLLM gives.
TOP = 20


@dataclass(frozen=True)
class Answer:
    """What a model answered, and the probability that its first word would begin as the unsafe word does."""

    text: str
    unsafe: float


async def ask(models: Models, endpoint: Endpoint, body: dict[str, Any], unsafe: str, safe: str) -> Answer:
    """A model's greedy answer to an OpenAI body. Raises as stack.models.Models.answer does."""
    wanted = dict(logprobs=True, top_logprobs=TOP) if endpoint == "chat" else dict(logprobs=TOP)
    given = json.loads(await models.answer(endpoint, body | wanted | {"temperature": 0, "stream": False}))
    choice = given["choices"][0]
    text = choice["message"]["content"] if endpoint == "chat" else choice["text"]
    return Answer(text or "", probability(_positions(endpoint, choice), unsafe, safe))


def probability(positions: Iterator[tuple[str, Mapping[str, float]]], unsafe: str, safe: str) -> float:
    """The probability of the unsafe word's first token, at the first position that is not blank; 0 without any.

    A position is the chosen token and the logarithms of the probabilities of likely tokens. A token counts that is a
    beginning of the unsafe word and none of the safe one, whatever its case.
    """
    for chosen, likely in positions:
        if chosen.strip():
            return min(1.0, sum(math.exp(value) for token, value in likely.items() if _begins(token, unsafe, safe)))
    return 0.0


def _begins(token: str, word: str, other: str) -> bool:
    part = token.strip().lower()
    return bool(part) and word.lower().startswith(part) and not other.lower().startswith(part)


def _positions(endpoint: Endpoint, choice: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float]]]:
    logprobs = choice.get("logprobs") or {}
    if endpoint == "chat":
        for one in logprobs.get("content") or ():
            likely = {other["token"]: other["logprob"] for other in one["top_logprobs"]}
            yield one["token"], likely | {one["token"]: one["logprob"]}
        return
    chosen = zip(logprobs.get("tokens") or (), logprobs.get("token_logprobs") or (), strict=True)
    for (token, value), top in zip(chosen, logprobs.get("top_logprobs") or (), strict=True):
        yield token, {**(top or {}), token: value}
