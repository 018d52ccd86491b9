"""An engine that answers in this process, with fixed texts and with faults on command."""

import asyncio
import hashlib
import json
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from stack.config import EmbeddingModel
from stack.errors import BadInput
from stack.models import Embeddable, Embeddings, Endpoint, Model

DIMENSIONS = 8
MAX_WORDS = 20

TOKENS = ("Paris", " is", " big.")
# The logarithms of the probabilities that are reported: the chosen token's, then those of other ones.
LOGPROBS = (-0.25, -1.5, -3.0)

# "error": a streamed error event. "break off": the stream ends without [DONE]. "hang": nothing comes any more.
Fault = BaseException | Literal["error", "break off", "hang"]


@dataclass(frozen=True)
class Asked:
    """What the engine was asked."""

    model: Model
    endpoint: Endpoint
    body: dict[str, Any]


@dataclass(frozen=True)
class AskedToEmbed:
    """What texts the engine was asked for the vectors of."""

    model: EmbeddingModel
    texts: list[Embeddable]
    truncate: bool


class ScriptedEngine:
    """Implements stack.models.Engine.

    Every answer consists of `tokens`. A `fault` happens after `fault_after` items, an exception by being raised.
    `asked` and `asked_to_embed` are the requests so far, and `closed_early` is set when a generation is closed or
    cancelled before its end.
    Generations are kept, so that none is closed by just being forgotten.
    """

    def __init__(self, tokens: tuple[str, ...] = TOKENS, finish_reason: str = "stop") -> None:
        self.tokens = tokens
        self.finish_reason = finish_reason
        self.fault: Fault | None = None
        self.fault_after = 0
        self.asked: list[Asked] = []
        self.asked_to_embed: list[AskedToEmbed] = []
        self.closed_early = threading.Event()
        self._generations: list[AsyncGenerator[bytes]] = []

    def fail(self, fault: Fault, after: int = 0) -> None:
        """Makes all further generations fail after so many items."""
        self.fault, self.fault_after = fault, after

    def generate(self, model: Model, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        self.asked.append(Asked(model, endpoint, body))
        self._generations.append(self._generate(endpoint, body))
        return self._generations[-1]

    async def _generate(self, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        items = list(self._events(endpoint, body) if body.get("stream") else self._whole(endpoint, body))
        left = len(items)
        try:
            for number, item in enumerate(items):
                if self.fault is not None and number == self.fault_after:
                    if isinstance(self.fault, BaseException):
                        raise self.fault
                    if self.fault == "break off":
                        return
                    if self.fault == "hang":
                        await asyncio.Event().wait()
                    yield _event({"error": {"message": "the engine died", "type": "InternalServerError", "code": 500}})
                    yield b"data: [DONE]\n\n"
                    return
                left -= 1
                yield item
        except (GeneratorExit, asyncio.CancelledError):
            if left:
                self.closed_early.set()
            raise

    def _whole(self, endpoint: Endpoint, body: dict[str, Any]) -> Iterator[bytes]:
        text = "".join(self.tokens)
        shape = {"message": {"role": "assistant", "content": text}} if endpoint == "chat" else {"text": text}
        choice = shape | {"index": 0, "finish_reason": self.finish_reason}
        usage = {"prompt_tokens": 7, "completion_tokens": len(self.tokens)}
        answer = {"id": "answer-1", "choices": [choice | _logprobs(endpoint, body, self.tokens)], "usage": usage}
        yield json.dumps(answer).encode()

    def _events(self, endpoint: Endpoint, body: dict[str, Any]) -> Iterator[bytes]:
        for token in self.tokens:
            shape = {"delta": {"content": token}} if endpoint == "chat" else {"text": token}
            choice = shape | {"index": 0, "finish_reason": None} | _logprobs(endpoint, body, (token,))
            yield _event({"id": "answer-1", "choices": [choice]})
        last: dict[str, Any] = {"delta": {}} if endpoint == "chat" else {"text": ""}
        end = _event({"id": "answer-1", "choices": [last | {"index": 0, "finish_reason": self.finish_reason}]})
        usage = _event({"id": "answer-1", "choices": [], "usage": {"completion_tokens": len(self.tokens)}})
        yield end + usage  # vLLM too sends several events at a time
        yield b"data: [DONE]\n\n"

    async def embed(self, model: EmbeddingModel, texts: Sequence[Embeddable], truncate: bool) -> Embeddings:
        """Vectors of length 1 that follow from the texts alone. A word is a token; more than MAX_WORDS are too many."""
        self.asked_to_embed.append(AskedToEmbed(model, list(texts), truncate))
        if isinstance(self.fault, BaseException):
            raise self.fault
        words = [text.split() if isinstance(text, str) else [str(token) for token in text] for text in texts]
        for index, one in enumerate(words):
            if len(one) > MAX_WORDS and not truncate:
                raise BadInput(f"text {index} has {len(one)} tokens; allowed: at most {MAX_WORDS}", param="input")
        vectors = [vector_of(" ".join(one[:MAX_WORDS])) for one in words]
        return Embeddings(np.array(vectors, dtype=np.float32), sum(len(one[:MAX_WORDS]) for one in words))


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _logprobs(endpoint: Endpoint, body: dict[str, Any], tokens: tuple[str, ...]) -> dict[str, Any]:
    """The logprobs of an answer, in vLLM's shape of each endpoint, if the request asks for them."""
    asked = body.get("logprobs")
    if asked is None or asked is False:  # 0 is a number of logprobs
        return {}
    if endpoint == "completions":
        tops = [_likeliest(token, max(1, asked)) for token in tokens]
        chosen = [LOGPROBS[0]] * len(tokens)
        return {"logprobs": {"tokens": list(tokens), "token_logprobs": chosen, "top_logprobs": tops}}
    positions = [
        {
            "token": token,
            "logprob": LOGPROBS[0],
            "top_logprobs": [
                {"token": likely, "logprob": value}
                for likely, value in _likeliest(token, body.get("top_logprobs", 0)).items()
            ],
        }
        for token in tokens
    ]
    return {"logprobs": {"content": positions}}


def _likeliest(token: str, count: int) -> dict[str, float]:
    return dict(list(zip((token, " other", " third"), LOGPROBS, strict=True))[:count])


def vector_of(text: str) -> list[float]:
    """The vector of a text of words with one blank between them."""
    numbers = [byte - 127.5 for byte in hashlib.sha256(text.encode()).digest()[:DIMENSIONS]]
    length = sum(number**2 for number in numbers) ** 0.5
    return [number / length for number in numbers]
