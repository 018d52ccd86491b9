"""Sandboxes for the tests, what they say, and who is in them on this machine."""

import os
import select
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager

import psutil

from stack.agentic_system.sandbox import Limits, Ran, Sandbox

SECONDS = 30.0
LIMITS = Limits()


@asynccontextmanager
async def sandbox(limits: Limits = LIMITS) -> AsyncGenerator[Sandbox]:
    running = await Sandbox.start(limits)
    try:
        yield running
    finally:
        await running.close()


async def run(running: Sandbox, code: str, seconds: float = SECONDS) -> Ran:
    return await running.run(code, seconds, lambda _: None)


async def said(code: str, limits: Limits = LIMITS) -> str:
    """What a cell prints in a sandbox of its own."""
    async with sandbox(limits) as running:
        return (await run(running, code)).text


def inhabitants() -> list[psutil.Process]:
    """The processes of all sandboxes that this process has started: bubblewrap's, the first inside, and the program."""
    own = [child for child in psutil.Process().children() if child.name() == "bwrap"]
    return [*own, *(inner for child in own for inner in child.children(recursive=True))]


@contextmanager
def all_end() -> Iterator[None]:
    """All in the sandboxes that run here ends in the block; some of it may take its last steps behind it."""
    inside = inhabitants()
    assert inside
    with ExitStack() as held:
        ends = [os.pidfd_open(one.pid) for one in inside]
        for end in ends:
            held.callback(os.close, end)
        yield
        for end in ends:  # readable from its end on
            assert select.select([end], [], [], SECONDS)[0]
    assert inhabitants() == []
