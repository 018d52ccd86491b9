"""Traces (placeholder until the real module is written over it)."""

from collections.abc import Iterator
from contextlib import contextmanager


def start(service: str, address: str | None) -> None: ...


def stop() -> None: ...


def traceparent() -> str | None:
    return None


@contextmanager
def span(name: str, parent: str | None = None, **attributes: str | int) -> Iterator[None]:
    yield
