"""The engine behind Ray Serve: each model of the config is an application of its name (serve_apps/llm.py)."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from stack.channel import Receiver, Stream, Target
from stack.config import EmbeddingModel, SequenceClassifier, ServedModel
from stack.errors import Away, EngineFailed, StackError, TooManyRequests, Unavailable
from stack.models import Classifiable, Embeddable, Embeddings, Ended, Endpoint, Failure, Model, Scores
from stack.serve_controller import Controller

# vLLM's error of a request to an engine whose process is gone; the gateway does not import vLLM.
_DEAD = "EngineDeadError"


class ServeEngine:
    """Implements stack.models.Engine."""

    def __init__(self, controller: Controller | None = None) -> None:
        self._controller = controller or Controller()
        self._handles: dict[str, Any] = {}
        self._receiver: Receiver | None = None

    async def generate(self, model: Model, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        async with self._our_errors(model.id, model.base):
            handle = await self._of(model)
            seconds = model.base.request_timeout_s
            if not body.get("stream"):
                yield await _answer(handle.answer.remote(endpoint, body), seconds)
                return
            async with aclosing(self._streamed(handle, endpoint, body, seconds)) as items:
                async for item in items:
                    yield item

    async def relay(self, model: Model, endpoint: Endpoint, body: dict[str, Any], target: Target) -> Ended:
        """Has an answer's events sent to where another process waits for them. Being cancelled cancels the request."""
        async with self._our_errors(model.id, model.base):
            ended = await _answer(
                (await self._of(model)).stream.remote(endpoint, body, target), model.base.request_timeout_s
            )
        assert isinstance(ended, Ended)
        return ended

    async def embed(self, model: EmbeddingModel, texts: Sequence[Embeddable], truncate: bool) -> Embeddings:
        async with self._our_errors(model.id, model):
            call = (await self._handle(model.id)).embed.remote(texts, truncate)
            answer = await _answer(call, model.request_timeout_s)
        assert isinstance(answer, Embeddings)
        return answer

    async def classify(self, model: SequenceClassifier, inputs: Sequence[Classifiable], windows: bool) -> Scores:
        async with self._our_errors(model.id, model):
            call = (await self._handle(model.id)).classify.remote(inputs, windows)
            answer = await _answer(call, model.request_timeout_s)
        assert isinstance(answer, Scores)
        return answer

    async def _streamed(
        self, handle: Any, endpoint: Endpoint, body: dict[str, Any], seconds: float
    ) -> AsyncGenerator[bytes]:
        """The events of an answer, which come by the receiver's connection while Serve's call lasts."""
        receiver = await self._open_receiver()
        stream = await receiver.open()
        try:
            call = handle.stream.remote(endpoint, body, stream.target)
            async with aclosing(while_it_lasts(call, stream, seconds)) as items:
                async for item in items:
                    yield item
        finally:
            receiver.close(stream)

    async def _open_receiver(self) -> Receiver:
        if self._receiver is None:
            import ray

            host = await asyncio.to_thread(ray.util.get_node_ip_address)
            # Another first request may have made one meanwhile.
            self._receiver = self._receiver or Receiver(host)
        return self._receiver

    @asynccontextmanager
    async def _our_errors(self, id: str, served: ServedModel) -> AsyncGenerator[None]:
        """Turns Ray's errors of a model's application into StackErrors."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import BackPressureError, RayServeException

        try:
            yield
        except BackPressureError as error:
            raise TooManyRequests(f"too many requests wait for the model {id!r}", retry_after=1) from error
        except (
            RayTaskError
        ) as error:  # before TimeoutError and others, which it may be too, where the replica raised it
            if type(error.cause).__name__ == _DEAD:
                raise Away(f"the engine of the model {id!r} has died and is replaced", retry_after=30) from error
            raise EngineFailed(f"the model {id!r} failed: {_first_line(error.cause)}") from error
        except TimeoutError as error:
            raise await self._too_late(id, served) from error
        except (RayError, RayServeException, ConnectionError) as error:
            raise Away(f"the model {id!r} cannot answer now: {_first_line(error)}") from error

    async def _too_late(self, id: str, served: ServedModel) -> Unavailable:
        """Why a model has not answered in time: it has no replica, or it takes too long. Raises Away."""
        application = (await self._controller.applications()).get(served.id)
        if application is None:
            return Away(f"the model {id!r} is not deployed", retry_after=30)
        deployments = application.deployments.values()
        if any(state == "RUNNING" for one in deployments for state in one.replica_states):
            return Unavailable(f"the model {id!r} has not answered within {served.request_timeout_s:g} s")
        if application.status == "DEPLOY_FAILED":
            return Unavailable(f"the model {id!r} cannot start: {_last_line(application.message)}", retry_after=30)
        if application.status == "UNHEALTHY":  # it has been well, and Serve starts it again
            return Away(
                f"the model {id!r} has lost its replicas, which are started again: {_last_line(application.message)}",
                retry_after=30,
            )
        return Away(f"the model {id!r} has no running replica yet; it is being started", retry_after=30)

    async def _of(self, model: Model) -> Any:
        handle = await self._handle(model.base.id)
        return handle.options(multiplexed_model_id=model.id) if model.is_adapter else handle

    async def _handle(self, application: str) -> Any:
        if application not in self._handles:
            self._handles[application] = await self._controller.handle(application)
        return self._handles[application]


async def _answer(call: Any, seconds: float) -> Any:
    """The one object that answers a request. Being cancelled meanwhile cancels the request."""
    try:
        async with asyncio.timeout(seconds):
            answer = await call
    except (asyncio.CancelledError, TimeoutError):
        call.cancel()
        raise
    if isinstance(answer, Failure):
        raise answer.error()
    return answer


async def while_it_lasts(call: Any, stream: Stream, seconds: float | None) -> AsyncGenerator[bytes]:
    """What comes of a stream until its call ends, or its time. Being closed before cancels the call.

    The call gives an Ended when it is awaited, and has a `cancel`.
    """
    end = asyncio.ensure_future(_end(call, stream))
    end.add_done_callback(lambda done: _tell(done, stream))
    # Whatever fails it, a client that does not read too, the engine need not go on.
    stream.when_failed = call.cancel
    loop = asyncio.get_running_loop()
    timer = loop.call_later(seconds, stream.fail, TimeoutError()) if seconds is not None else None
    try:
        async with aclosing(stream.items()) as items:
            async for item in items:
                yield item
    finally:
        if timer is not None:
            timer.cancel()
        if not end.done():
            call.cancel()
            end.cancel()


async def _end(call: Any, stream: Stream) -> None:
    """Waits for a streamed request's end, which says how many bytes were sent, and what broke it off."""
    ended = await call
    stream.finish(ended.sent, ended.failure.error() if ended.failure is not None else None)


def _tell(end: asyncio.Future[None], stream: Stream) -> None:
    """Fails a stream of whose end nothing more will be heard."""
    if end.cancelled():
        stream.fail(StackError("the request was cancelled within Ray Serve"))
    elif (error := end.exception()) is not None:
        stream.fail(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no reason is known"
