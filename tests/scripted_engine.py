"""An engine that answers in this process, with fixed texts and with faults on command."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from stack.models import Endpoint, Model

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


class ScriptedEngine:
    """Implements stack.models.Engine.

    Every answer consists of `tokens`. A `fault` happens after `fault_after` items, an exception by being raised.
    `asked` are the requests so far, and `closed_early` is set when a generation is closed or cancelled before its end.
    Generations are kept, so that none is closed by just being forgotten.
    """

    def __init__(self, tokens: tuple[str, ...] = TOKENS, finish_reason: str = "stop") -> None:
        self.tokens = tokens
        self.finish_reason = finish_reason
        self.fault: Fault | None = None
        self.fault_after = 0
        self.asked: list[Asked] = []
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
