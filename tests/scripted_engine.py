"""An engine that answers in this process, with fixed texts and with faults on command."""

import asyncio
import hashlib
import json
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Literal

import numpy as np

from serve_apps.scripted_answers import DONE, TOKENS, Answer, answer_to, error_event
from stack.config import EmbeddingModel, SequenceClassifier
from stack.errors import BadInput
from stack.models import Classifiable, Embeddable, Embeddings, Endpoint, Model, Scores

DIMENSIONS = 8
MAX_WORDS = 20

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


@dataclass(frozen=True)
class AskedToClassify:
    """What inputs the engine was asked for the logits of."""

    model: SequenceClassifier
    inputs: list[Classifiable]
    windows: bool


class ScriptedEngine:
    """Implements stack.models.Engine.

    Every answer consists of `tokens`, but for those choices of one that have others in `tokens_of`, by their indices.
    A `fault` happens after `fault_after` items, an exception by being raised; what `fail_for` makes of a single
    request's body is raised at once.
    `asked`, `asked_to_embed` and `asked_to_classify` are the requests so far, and `closed_early` is set when a
    generation is closed or cancelled before its end.
    A classifier has `labels`, and a window of words gets the logits that `logits_of` gives to it.
    Generations are kept, so that none is closed by just being forgotten.
    """

    def __init__(self, tokens: tuple[str, ...] = TOKENS, finish_reason: str = "stop") -> None:
        self.tokens = tokens
        self.tokens_of: dict[int, tuple[str, ...]] = {}
        self.finish_reason = finish_reason
        self.stop_reason: int | str | None = None
        self.fault: Fault | None = None
        self.fault_after = 0
        self.fail_for: Callable[[dict[str, Any]], BaseException | None] = lambda body: None
        self.asked: list[Asked] = []
        self.asked_to_embed: list[AskedToEmbed] = []
        self.asked_to_classify: list[AskedToClassify] = []
        self.labels: tuple[str, ...] = ("score",)
        self.logits_of: Callable[[str], list[float]] = lambda text: [float(len(text))]
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
        answer = answer_to(endpoint, body, self.tokens, self.finish_reason, self.stop_reason)
        items = self._items(answer, bool(body.get("stream")))
        left = len(items)
        if (fault := self.fail_for(body)) is not None:
            raise fault
        try:
            for number, item in enumerate(items):
                if self.fault is not None and number == self.fault_after:
                    if isinstance(self.fault, BaseException):
                        raise self.fault
                    if self.fault == "break off":
                        return
                    if self.fault == "hang":
                        await asyncio.Event().wait()
                    yield error_event("the engine died").encode()
                    yield DONE.encode()
                    return
                left -= 1
                yield item.encode()
        except (GeneratorExit, asyncio.CancelledError):
            if left:
                self.closed_early.set()
            raise

    def _items(self, answer: Answer, is_stream: bool) -> list[str]:
        if not self.tokens_of:
            return list(answer.events()) if is_stream else [json.dumps(answer.whole())]
        own = [self.tokens_of.get(index, self.tokens) for index in range(answer.choices)]
        alone = [replace(answer, tokens=tokens, choices=1) for tokens in own]
        if not is_stream:
            choices = [one.whole()["choices"][0] | {"index": index} for index, one in enumerate(alone)]
            return [json.dumps(answer.whole() | {"choices": choices})]
        streams = [
            [event.replace('"index":0', f'"index":{index}') for event in one.events() if event != DONE]
            for index, one in enumerate(alone)
        ]
        return ["".join(events) for events in zip_longest(*streams, fillvalue="")] + [DONE]

    async def embed(self, model: EmbeddingModel, texts: Sequence[Embeddable], truncate: bool) -> Embeddings:
        """Vectors of length 1 that follow from the texts alone. A word is a token; more than MAX_WORDS are too many."""
        self.asked_to_embed.append(AskedToEmbed(model, list(texts), truncate))
        await self._fail()
        words = [text.split() if isinstance(text, str) else [str(token) for token in text] for text in texts]
        for index, one in enumerate(words):
            if len(one) > MAX_WORDS and not truncate:
                raise BadInput(f"text {index} has {len(one)} tokens; allowed: at most {MAX_WORDS}")
        vectors = [vector_of(" ".join(one[:MAX_WORDS])) for one in words]
        return Embeddings(np.array(vectors, dtype=np.float32), sum(len(one[:MAX_WORDS]) for one in words))

    async def classify(self, model: SequenceClassifier, inputs: Sequence[Classifiable], windows: bool) -> Scores:
        """The logits of `logits_of`. A word is a token; of messages, the contents alone count."""
        self.asked_to_classify.append(AskedToClassify(model, list(inputs), windows))
        await self._fail()
        values, of = [], []
        for index, text in enumerate(inputs):
            words = (text if isinstance(text, str) else " ".join(one["content"] for one in text)).split(" ")
            if len(words) > model.max_tokens and not windows:
                raise BadInput(f"has {len(words)} tokens; allowed: at most {model.max_tokens}", param=str(index))
            half = model.max_tokens // 2
            for start in range(0, max(1, len(words) - half), half):
                values.append(self.logits_of(" ".join(words[start : start + model.max_tokens])))
                of.append(index)
        return Scores(np.array(values, dtype=np.float32), np.array(of), self.labels, len(" ".join(map(str, inputs))))

    async def _fail(self) -> None:
        if isinstance(self.fault, BaseException):
            raise self.fault
        if self.fault == "hang":
            try:
                await asyncio.Event().wait()
            finally:
                self.closed_early.set()


def vector_of(text: str) -> list[float]:
    """The vector of a text of words with one blank between them."""
    numbers = [byte - 127.5 for byte in hashlib.sha256(text.encode()).digest()[:DIMENSIONS]]
    length = sum(number**2 for number in numbers) ** 0.5
    return [number / length for number in numbers]
