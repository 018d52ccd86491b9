"""What asks models and memory banks for all sessions of a node.

Ray Serve's handles take more memory than all else of a session's actor, and so does LanceDB. So one actor of a node has
them (SharedEngine), and the actors of sessions ask it (ActorEngine). What a model streams does not pass through it, but
goes from the model's replica to the session's actor.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import ray
from ray.actor import exit_actor
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_apps.actor_calls import NAMESPACE, Call, Calls, answer_of
from stack.agentic_system.look_ups import LookUp
from stack.channel import Receiver, Target
from stack.config import ROOT, Config, EmbeddingModel, SequenceClassifier
from stack.context import Context
from stack.errors import Away
from stack.models import Classifiable, Embeddable, Embeddings, Ended, Endpoint, Model, Scores
from stack.serve_engine import ServeEngine, while_it_lasts

# For how long what is away is asked again, and how long after each time.
AWAY_S = 300.0
AGAIN_S = 1.0
CALLS = 10_000  # at once


class SharedEngine:
    """The actor: one on each node where sessions are, started by the first of their actors."""

    def __init__(self, config: Config) -> None:
        # It takes seconds, which the first request should not wait for.
        from ray import serve  # noqa: F401

        self._engine = ServeEngine()
        self._context = Context.open(config, self._engine)
        self._memory: Any = None
        self._opening = asyncio.Lock()
        self._calls = Calls()

    async def ready(self) -> None:
        with self._calls.one():
            pass

    async def answer(self, model: Model, endpoint: Endpoint, body: dict[str, Any]) -> bytes:
        with self._calls.one():
            async with aclosing(self._engine.generate(model, endpoint, body)) as items:
                return b"".join([item async for item in items])

    async def stream(self, model: Model, endpoint: Endpoint, body: dict[str, Any], target: Target) -> Ended:
        with self._calls.one():
            return await self._engine.relay(model, endpoint, body, target)

    async def embed(self, model: EmbeddingModel, texts: Sequence[Embeddable], truncate: bool) -> Embeddings:
        with self._calls.one():
            return await self._engine.embed(model, texts, truncate)

    async def classify(self, model: SequenceClassifier, inputs: Sequence[Classifiable], windows: bool) -> Scores:
        with self._calls.one():
            return await self._engine.classify(model, inputs, windows)

    async def retrieve(self, tenant: str, look_up: LookUp) -> dict[str, Any]:
        with self._calls.one():
            # What memory banks are made of is much to import, and many agents have none.
            from stack.agentic_system import retrieval
            from stack.memory_banks import serve_writer
            from stack.memory_banks.banks import Memory

            async with self._opening:
                if self._memory is None:
                    self._memory = Memory.open(self._context.config, await serve_writer.find())
            return await retrieval.retrieve(self._context.of_tenant(tenant), self._memory, look_up)

    async def leave(self) -> None:
        """Ends the actor, unless it has something to do."""
        if not self._calls.count:
            exit_actor()  # type: ignore[no-untyped-call]


class ActorEngine:
    """Implements stack.models.Engine by the SharedEngine of the node, and `retrieve` as look_ups.AskMemory has it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._shared: Any = None
        self._finding = asyncio.Lock()
        self._receiver = Receiver(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    async def ready(self) -> None:
        """Returns once the models can be asked."""
        await self._ask("ready")

    async def generate(self, model: Model, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        if not body.get("stream"):
            yield await self._ask("answer", model, endpoint, body)
            return
        patience = _Patience()
        has_ended = False
        while not has_ended:
            has_begun = False
            shared = await self._find()
            stream = await self._receiver.open()
            try:
                call = Call(shared.stream.remote(model, endpoint, body, stream.target))
                async with aclosing(while_it_lasts(call, stream, None)) as items:
                    async for item in items:
                        has_begun = True
                        yield item
                has_ended = True
            except (Away, ConnectionError, RayActorError) as error:
                if has_begun:
                    raise Away(f"the answer of the model {model.id!r} broke off") from error
                await self._wait(patience, shared, error)
            finally:
                self._receiver.close(stream)

    async def embed(self, model: EmbeddingModel, texts: Sequence[Embeddable], truncate: bool) -> Embeddings:
        embeddings: Embeddings = await self._ask("embed", model, texts, truncate)
        return embeddings

    async def classify(self, model: SequenceClassifier, inputs: Sequence[Classifiable], windows: bool) -> Scores:
        scores: Scores = await self._ask("classify", model, inputs, windows)
        return scores

    async def retrieve(self, context: Context, look_up: LookUp) -> dict[str, Any]:
        details: dict[str, Any] = await self._ask("retrieve", context.tenant, look_up)
        return details

    async def _ask(self, method: str, *arguments: Any) -> Any:
        patience = _Patience()
        while True:
            shared = await self._find()
            try:
                return await answer_of(getattr(shared, method).remote(*arguments))
            except (Away, RayActorError) as error:
                await self._wait(patience, shared, error)

    async def _find(self) -> Any:
        async with self._finding:
            if self._shared is None:
                self._shared = await asyncio.to_thread(_found_or_started, self._config)
            return self._shared

    async def _wait(self, patience: "_Patience", shared: Any, error: Exception) -> None:
        """Until it is asked again. Another SharedEngine is asked where this one has died. Raises Away at last."""
        if isinstance(error, RayActorError) and self._shared is shared:
            self._shared = None
        await patience.wait(error)


class _Patience:
    """With what is away: a stack that has just started deploys its models for minutes, and its turns go on at once."""

    def __init__(self) -> None:
        self._deadline = asyncio.get_running_loop().time() + AWAY_S

    async def wait(self, error: Exception) -> None:
        if asyncio.get_running_loop().time() > self._deadline:
            raise error if isinstance(error, Away) else Away("what asks the models does not answer") from error
        await asyncio.sleep(AGAIN_S)


def fingerprint(config: Config) -> str:
    """What tells actors of one config, and of code in one folder, from those of others."""
    return hashlib.sha256(f"{ROOT} {config.model_dump_json()}".encode()).hexdigest()[:16]


def _found_or_started(config: Config) -> Any:
    """The SharedEngine of this node."""
    node = ray.get_runtime_context().get_node_id()
    actor = ray.remote(SharedEngine).options(
        name=f"engine:{node}:{fingerprint(config)}", namespace=NAMESPACE, get_if_exists=True, lifetime="detached",
        num_cpus=0, max_concurrency=CALLS, enable_task_events=False,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )  # fmt: skip
    return actor.remote(config)
