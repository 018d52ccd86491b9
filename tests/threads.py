"""Doing things at the same moment."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

T = TypeVar("T")


def at_once(*things: Callable[[], T]) -> list[T]:
    """Does things in a thread each, all at the same moment, and returns what they did."""
    barrier = Barrier(len(things))

    def wait_and_do(thing: Callable[[], T]) -> T:
        barrier.wait()
        return thing()

    with ThreadPoolExecutor(len(things)) as threads:
        return list(threads.map(wait_and_do, things))
