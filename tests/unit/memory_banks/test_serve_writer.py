"""What the writer behind Serve answers, and what its failures are to who calls it."""

import asyncio
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from stack.errors import Conflict, StackError, Superseded, Unavailable
from stack.memory_banks import serve_writer
from stack.memory_banks.serve_writer import ServeWriter
from stack.store import MemoryBank, now

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from ray import serve
    from ray.serve.exceptions import BackPressureError, RayServeException

BANK = MemoryBank("bank-1", "default", "a", None, {"type": "keyvalue"}, None, bytes=0, created_at=now())


class Call:
    """A call of a deployment, which gives something, fails, or (None) never ends."""

    def __init__(self, result: Any) -> None:
        self.result = result
        self.is_cancelled = False

    def remote(self, *_: Any) -> "Call":
        return self

    def __await__(self) -> Any:
        return self._end().__await__()

    async def _end(self) -> Any:
        if isinstance(self.result, BaseException):
            raise self.result
        if self.result is None:
            await asyncio.Event().wait()
        return self.result

    def cancel(self) -> None:
        self.is_cancelled = True


class Handle:
    def __init__(self, result: Any) -> None:
        self.write = self.delete = self.drop = Call(result)


def raised(error: Exception) -> BaseException:
    """How Ray raises what an actor has raised."""
    told: BaseException = RayTaskError("delete", "its traceback", error, "ray", 1, "127.0.0.1").as_instanceof_cause()
    return told


async def test_an_answer_is_handed_on() -> None:
    assert await ServeWriter(Handle(["a"])).delete(BANK, ["a", "b"]) == ["a"]


async def test_an_error_of_the_stack_is_itself_again() -> None:
    error = Conflict("it is taken", param="documents")
    with pytest.raises(StackError) as told:
        await ServeWriter(Handle(raised(error))).write(BANK, [], replace=False)
    assert (type(told.value), told.value.message, told.value.param) == (Conflict, "it is taken", "documents")


async def test_the_successor_of_a_writer_that_was_replaced_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_writer, "AGAIN_S", 0.0)
    replaced = Call(raised(Superseded("another one has taken over; repeat it")))
    handle = Handle(None)
    ways = iter([replaced, replaced, Call(["a"])])
    handle.delete = SimpleNamespace(remote=lambda *_: next(ways))  # type: ignore[assignment]
    assert await ServeWriter(handle).delete(BANK, ["a"]) == ["a"]
    monkeypatch.setattr(serve_writer, "SECONDS", -1.0)
    ways = iter([replaced])
    with pytest.raises(Superseded, match="repeat it"):
        await ServeWriter(handle).delete(BANK, ["a"])


@pytest.mark.parametrize("error", [TimeoutError("of its own"), ConnectionError("of its own"), RuntimeError("odd")])
async def test_another_error_within_the_writer_stays_one(error: Exception) -> None:
    with pytest.raises(RayTaskError, match="its traceback"):
        await ServeWriter(Handle(raised(error))).drop(BANK)


@pytest.mark.parametrize(
    "error",
    [ActorDiedError(), BackPressureError(256, 256), RayServeException("no replica"), ConnectionError("gone")],
    ids=lambda error: type(error).__name__,
)
async def test_a_writer_that_is_away_or_has_too_much_to_do_is_unavailable(error: Exception) -> None:
    with pytest.raises(Unavailable, match="repeat it"):
        await ServeWriter(Handle(error)).delete(BANK, ["a"])


async def test_a_writer_that_does_not_answer_is_unavailable_and_its_call_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve_writer, "SECONDS", 0.01)
    handle = Handle(None)
    with pytest.raises(Unavailable, match="not answered"):
        await ServeWriter(handle).delete(BANK, ["a"])
    assert handle.delete.is_cancelled


async def test_who_leaves_cancels_the_call() -> None:
    handle = Handle(None)
    asked = asyncio.create_task(ServeWriter(handle).delete(BANK, ["a"]))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert handle.delete.is_cancelled


async def test_a_job_finds_the_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def get(*names: Any) -> Handle:
        asked.append(names)
        return Handle(["a"])

    monkeypatch.setattr(serve, "get_deployment_handle", get)
    assert await (await serve_writer.find()).delete(BANK, ["a"]) == ["a"]
    assert asked == [("MemoryWriter", "gateway")]


async def test_a_writer_that_is_not_deployed_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(*_: Any) -> Handle:
        raise RayServeException("there is no such application")

    monkeypatch.setattr(serve, "get_deployment_handle", get)
    with pytest.raises(Unavailable, match="not deployed") as told:
        await serve_writer.find()
    assert told.value.retry_after == 30
