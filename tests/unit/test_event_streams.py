"""Streams of events that say nothing for long: they are kept alive."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from serve_apps.routes import common
from serve_apps.routes.common import kept_alive
from stack.errors import Unavailable


class Slow:
    """Two events, the second of which comes when it is let, and an end or an error."""

    def __init__(self) -> None:
        self.goes_on = asyncio.Event()
        self.error: Unavailable | None = None
        self.is_closed = False

    async def events(self) -> AsyncGenerator[bytes]:
        try:
            yield b"data: 1\n\n"
            await self.goes_on.wait()
            yield b"data: 2\n\n"
            if self.error is not None:
                raise self.error
        finally:
            self.is_closed = True


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    monkeypatch.setattr(common, "ALIVE_S", 0.01)
    return Slow()


async def test_a_stream_without_events_says_that_it_goes_on(slow: Slow) -> None:
    got: list[bytes] = []
    async for event in kept_alive(slow.events()):
        got.append(event)
        if len(got) == 4:
            slow.goes_on.set()
    assert got[0] == b"data: 1\n\n"
    assert got[-1] == b"data: 2\n\n"
    assert {line[:1] for line in got[1:-1]} == {b":"}, "which clients pass over"
    assert slow.is_closed


async def test_its_error_is_the_streams(slow: Slow) -> None:
    slow.error = Unavailable("it is away")
    slow.goes_on.set()
    with pytest.raises(Unavailable, match="it is away"):
        async for _ in kept_alive(slow.events()):
            pass


async def test_one_that_is_left_is_closed(slow: Slow) -> None:
    async with aclosing(kept_alive(slow.events())) as events:
        assert await anext(events) == b"data: 1\n\n"
        assert (await anext(events)).startswith(b":")
    assert slow.is_closed


async def test_one_that_is_cancelled_is_closed(slow: Slow) -> None:
    async def read() -> None:
        async for _ in kept_alive(slow.events()):
            got.set()

    got = asyncio.Event()
    reading = asyncio.create_task(read())
    await got.wait()
    reading.cancel()
    await asyncio.wait([reading])
    assert reading.cancelled()
    assert slow.is_closed
