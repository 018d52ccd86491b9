"""An engine of a job's own, in the worker of Ray Data that asks about the rows.

It is the server that Ray Serve hosts (serve_apps/llm.py), without Ray Serve: so what is asked and answered is the same
to the letter, with tools, grammars, logprobs, adapters and what is refused. The processors of ray.data.llm start such
an engine too, but take prompts and give texts.

Nobody else asks it, and the model needs no replica that serves. It starts with the first question, which takes as long
as a replica's start. If it dies, all that it was asked has no answer, and another one starts with the next question.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from stack import engines
from stack.config import EmbeddingModel, LanguageModel, SequenceClassifier
from stack.errors import BadInput, EngineFailed, Unavailable
from stack.models import Classifiable, Embeddable, Embeddings, Endpoint, Engine, Failure, Model, Scores

if TYPE_CHECKING:
    from serve_apps.llm import LLM


class EngineDied(Unavailable):
    """An engine has died while it was asked. It may have been of the question: then another one dies of it, too."""


@dataclass(frozen=True)
class Started:
    """A server whose engine has started, and the adapters that it has loaded or is loading."""

    server: "LLM"
    adapters: dict[str, asyncio.Task[None]] = field(default_factory=dict)


class OwnEngine:
    """Implements stack.models.Engine: the model `own` and its adapters are asked here, all else of `others`.

    `artifacts` is the address at which adapters lie. Answers do not come as streams.
    """

    def __init__(self, own: LanguageModel, artifacts: str, others: Engine) -> None:
        self._own = own
        self._artifacts = artifacts
        self._others = others
        self._start: asyncio.Task[Started] | None = None

    async def generate(self, model: Model, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        if model.base.id != self._own.id:
            async with aclosing(self._others.generate(model, endpoint, body)) as items:
                async for item in items:
                    yield item
        elif body.get("stream"):
            raise BadInput("a job's own engine does not stream; allowed: stream false", param="stream")
        else:
            yield await self._answer(model, endpoint, body)

    async def embed(self, model: EmbeddingModel, texts: Sequence[Embeddable], truncate: bool) -> Embeddings:
        return await self._others.embed(model, texts, truncate)

    async def classify(self, model: SequenceClassifier, inputs: Sequence[Classifiable], windows: bool) -> Scores:
        return await self._others.classify(model, inputs, windows)

    async def _answer(self, model: Model, endpoint: Endpoint, body: dict[str, Any]) -> bytes:
        from vllm.exceptions import VLLMServerError
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._start is None:
            self._start = asyncio.create_task(self._started())
        start, seconds = self._start, self._own.request_timeout_s
        # Whoever leaves meanwhile does not take it from the others.
        started = await asyncio.shield(start)
        try:
            async with asyncio.timeout(seconds):
                if model.is_adapter:
                    await _load(started, model.id)
                answer = await started.server.answer(endpoint, body)
        except TimeoutError as error:
            raise Unavailable(f"the model {model.id!r} has not answered within {seconds:g} s") from error
        except EngineDeadError as error:
            if self._start is start:  # of all that were asked, the first to find it out
                self._start = None
                started.server.close()
            raise EngineDied(f"the job's own engine of the model {self._own.id!r} has died") from error
        except VLLMServerError as error:
            raise EngineFailed(f"the model {model.id!r} failed: {error}") from error
        if isinstance(answer, Failure):
            raise answer.error()
        return answer

    async def _started(self) -> Started:
        # Not by whoever only means to ask: it takes vLLM seconds to be imported.
        from serve_apps.llm import LLM

        print(f"starting an engine of the model {self._own.id!r}", flush=True)
        try:
            return Started(await LLM.here(self._own, self._artifacts))
        except (RuntimeError, TimeoutError) as error:  # its process has died, for want of memory say
            told = str(error) or type(error).__name__
            raise Unavailable(f"the job's own engine of {self._own.id!r} has not started: {told}") from error


async def _load(started: Started, adapter: str) -> None:
    if adapter not in started.adapters:
        started.adapters[adapter] = asyncio.create_task(started.server.load_adapter(adapter))
    await asyncio.shield(started.adapters[adapter])


@contextmanager
def room_for(own: LanguageModel | None) -> Iterator[dict[str, Any]]:
    """Ray's options for a worker that asks: with an engine of its own, room for that is reserved while this lasts, and
    the worker is put beside the engine's first one, as Ray Serve does it."""
    if own is None:
        yield {}
        return
    if not ray.is_initialized():
        ray.init()
    group = placement_group(engines.bundles_of_job(own), strategy=engines.strategy(own))
    try:
        ray.get(group.ready())
        where = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
        yield dict(scheduling_strategy=where, runtime_env=dict(env_vars=engines.environment(own)))
    finally:
        remove_placement_group(group)
