"""What becomes of Serve's calls: answers, streams beside them, their faults, and clients that leave. Without Ray."""

import asyncio
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError, RayTaskError

from stack.channel import Receiver, Sender, Target
from stack.config import LanguageModel
from stack.errors import Away, BadInput, EngineFailed, StackError, TooManyRequests, Unavailable
from stack.models import Ended, Failure, Model
from stack.serve_engine import ServeEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from ray.serve.exceptions import BackPressureError
    from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeStatus

SOON_S = 5.0
STREAMED = {"stream": True}
Work = Callable[..., Coroutine[Any, Any, Any]]


class Call:
    """What a handle gives: it can be awaited and cancelled."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._task = asyncio.ensure_future(work)
        self.cancelled = asyncio.Event()

    def __await__(self) -> Any:
        return self._task.__await__()

    def cancel(self) -> None:
        self.cancelled.set()
        self._task.cancel()


class Handle:
    """A deployment whose methods are given functions."""

    def __init__(self, **methods: Work) -> None:
        self._methods = methods
        self.calls: list[Call] = []
        self.multiplexed: list[str] = []

    def options(self, multiplexed_model_id: str) -> "Handle":
        self.multiplexed.append(multiplexed_model_id)
        return self

    def __getattr__(self, name: str) -> Any:
        work = self._methods[name]
        handle = self

        class Method:
            def remote(self, *args: Any) -> Call:
                handle.calls.append(Call(work(*args)))
                return handle.calls[-1]

        return Method()


def model(seconds: float = 60, adapter: bool = False) -> Model:
    served = LanguageModel(id="small", path="models/small", request_timeout_s=max(1, seconds))
    served = served.model_copy(update={"request_timeout_s": seconds})
    return Model("small:tuned" if adapter else "small", served, is_adapter=adapter)


@pytest.fixture
async def sender() -> AsyncIterator[Sender]:
    sender = Sender()
    yield sender
    sender.stop()


@pytest.fixture
async def engine() -> AsyncIterator[ServeEngine]:
    engine = ServeEngine()
    engine._receiver = Receiver("127.0.0.1")
    yield engine
    await engine._receiver.stop()


def asked(engine: ServeEngine, handle: Handle, body: dict[str, Any], of: Model | None = None) -> Any:
    engine._handles["small"] = handle
    return engine.generate(of or model(), "chat", body)


async def everything(items: Any) -> bytes:
    async with asyncio.timeout(SOON_S):
        return b"".join([item async for item in items])


def streaming(sender: Sender, *parts: bytes, then: Any = None) -> Work:
    """A replica's `stream` that sends these parts and then raises, returns, or does as told."""

    async def stream(endpoint: str, body: dict[str, Any], target: Target) -> Ended:
        outlet = await sender.open(target)
        for part in parts:
            await outlet.send(part)
        sent = sum(map(len, parts))
        if isinstance(then, BaseException):
            raise then
        if isinstance(then, Failure):
            return Ended(sent, then)
        if then is not None:
            await then
        return Ended(sent)

    return stream


async def test_a_whole_answer_is_one_call(engine: ServeEngine) -> None:
    async def answer(endpoint: str, body: dict[str, Any]) -> bytes:
        return f"{endpoint} {body}".encode()

    handle = Handle(answer=answer)
    assert await everything(asked(engine, handle, {"a": 1})) == b"chat {'a': 1}"
    assert handle.multiplexed == []
    await everything(asked(engine, handle, {}, model(adapter=True)))
    assert handle.multiplexed == ["small:tuned"]


async def test_a_stream_comes_beside_the_call(engine: ServeEngine, sender: Sender) -> None:
    handle = Handle(stream=streaming(sender, b"one ", b"two ", b"three"))
    assert await everything(asked(engine, handle, STREAMED)) == b"one two three"
    assert not handle.calls[0].cancelled.is_set()


async def test_a_refusal_has_its_own_status(engine: ServeEngine, sender: Sender) -> None:
    refusal = Failure(400, "too long", "messages")

    async def answer(*_: Any) -> Failure:
        return refusal

    with pytest.raises(BadInput, match="too long"):
        await everything(asked(engine, Handle(answer=answer), {}))
    with pytest.raises(BadInput, match="too long"):
        await everything(asked(engine, Handle(stream=streaming(sender, then=refusal)), STREAMED))


async def test_what_came_before_a_failure_is_there(engine: ServeEngine, sender: Sender) -> None:
    items = asked(engine, Handle(stream=streaming(sender, b"a" * 1_000, then=Failure(500, "it died"))), STREAMED)
    assert await anext(items) == b"a" * 1_000
    with pytest.raises(EngineFailed, match="it died"):
        await anext(items)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (RayActorError(), Unavailable),
        (BackPressureError(9, 9), TooManyRequests),
        (RayTaskError("stream", "Traceback", ValueError("wrong")), EngineFailed),
        (RayTaskError("stream", "Traceback", TimeoutError("in the replica")).as_instanceof_cause(), EngineFailed),
        (ConnectionError("reset"), Unavailable),
        (asyncio.CancelledError(), StackError),
    ],
    ids=["dead", "full", "raised", "timed out in the replica", "connection", "cancelled"],
)
async def test_a_fault_of_the_call_ends_the_stream(
    engine: ServeEngine, sender: Sender, fault: BaseException, error: type[StackError]
) -> None:
    with pytest.raises(error):
        await everything(asked(engine, Handle(stream=streaming(sender, then=fault)), STREAMED))


async def test_a_dead_engine_is_away_until_another_one_has_followed(engine: ServeEngine) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what vLLM warns of as it is imported
        from vllm.v1.engine.exceptions import EngineDeadError

    async def die(*_: object) -> None:
        raise RayTaskError("answer", "Traceback", EngineDeadError())

    with pytest.raises(Unavailable, match="'small' has died") as caught:
        await everything(asked(engine, Handle(answer=die), {}))
    assert caught.value.retry_after == 30


async def test_a_client_that_leaves_cancels_the_call(engine: ServeEngine, sender: Sender) -> None:
    handle = Handle(stream=streaming(sender, b"one", then=asyncio.Event().wait()))
    items = asked(engine, handle, STREAMED)
    assert await anext(items) == b"one"
    await items.aclose()
    assert handle.calls[0].cancelled.is_set()
    assert engine._receiver is not None
    assert engine._receiver._streams == {}

    waiting = Handle(answer=lambda *_: asyncio.Event().wait())
    task = asyncio.create_task(everything(asked(engine, waiting, {})))
    while not waiting.calls:  # noqa: ASYNC110  # the handle has no event to wait for
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert waiting.calls[0].cancelled.is_set()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_takes_too_long_is_given_up(
    engine: ServeEngine, sender: Sender, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    async def too_late(*_: Any) -> Unavailable:
        return Unavailable("not within the time")

    monkeypatch.setattr(engine, "_too_late", too_late)
    forever = asyncio.Event()
    handle = Handle(
        answer=lambda *_: forever.wait(), stream=streaming(sender, b"one", then=forever.wait() if stream else None)
    )
    with pytest.raises(Unavailable, match="not within the time"):
        await everything(asked(engine, handle, {"stream": stream}, model(seconds=0.05)))
    assert handle.calls[0].cancelled.is_set()


@pytest.mark.parametrize(
    ("status", "replicas", "passes", "told"),
    [
        (ApplicationStatus.RUNNING, {"RUNNING": 1}, False, "has not answered within 0.05 s"),
        (ApplicationStatus.DEPLOYING, {"STARTING": 1}, True, "has no running replica yet"),
        (ApplicationStatus.DEPLOY_FAILED, {}, False, "cannot start: No GPU."),
        # It has been well: its node was lost, say, with all of its replicas.
        (ApplicationStatus.UNHEALTHY, {"STARTING": 2}, True, "has lost its replicas, which are started again: No GPU."),
    ],
)
async def test_a_model_without_a_replica_says_whether_one_comes(
    engine: ServeEngine,
    monkeypatch: pytest.MonkeyPatch,
    status: ApplicationStatus,
    replicas: dict[str, int],
    passes: bool,
    told: str,
) -> None:
    deployment = SimpleNamespace(replica_states=replicas)
    application = ApplicationStatusOverview(status, "Seen:\nNo GPU.", 0.0, {"LLM": deployment})
    monkeypatch.setattr(ray.serve, "status", lambda: ServeStatus(applications={"small": application}))
    forever = asyncio.Event()
    with pytest.raises(Unavailable, match=told) as caught:
        await everything(asked(engine, Handle(answer=lambda *_: forever.wait()), {}, model(seconds=0.05)))
    assert isinstance(caught.value, Away) == passes


async def test_a_client_that_does_not_read_does_not_hold_the_engine(engine: ServeEngine, sender: Sender) -> None:
    handle = Handle(stream=streaming(sender, b"one", then=asyncio.Event().wait()))
    items = asked(engine, handle, STREAMED, model(seconds=0.05))
    assert await anext(items) == b"one"
    # Nobody asks for more, and yet the call ends with the model's time.
    await asyncio.wait_for(handle.calls[0].cancelled.wait(), SOON_S)
    await items.aclose()


async def test_a_call_that_cannot_be_made_leaves_no_stream(engine: ServeEngine) -> None:
    with pytest.raises(KeyError):
        await everything(asked(engine, Handle(), STREAMED))
    assert engine._receiver is not None
    assert engine._receiver._streams == {}


async def test_first_requests_at_once_have_one_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    engine = ServeEngine()
    receivers = await asyncio.gather(*(engine._open_receiver() for _ in range(5)))
    assert len(set(map(id, receivers))) == 1
