"""How many data sets are read at once, and that none of it holds up other requests."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve_apps.readers import Readers
from serve_apps.routes import datasets as routes
from serve_apps.routes import evaluations, post_training
from stack import datasets
from stack.context import Context
from stack.errors import TooManyRequests, Unavailable
from tests.api.conftest import HERE, URL
from tests.samples import evaluation, fine_tuning


class Gate:
    """Work that goes on until it is let go; knows whose is under way."""

    def __init__(self) -> None:
        self.under_way: list[str] = []
        self.begun = asyncio.Queue[str]()
        self.loop = asyncio.get_running_loop()
        self.open = threading.Event()

    def __call__(self, context: Context, *_: Any) -> str:
        self.under_way.append(context.tenant)
        self.loop.call_soon_threadsafe(self.begun.put_nowait, context.tenant)
        assert self.open.wait(30)
        return context.tenant

    async def first(self, number: int) -> list[str]:
        return [await asyncio.wait_for(self.begun.get(), 30) for _ in range(number)]


@pytest.fixture
def acme(context: Context) -> Context:
    return context.of_tenant("acme")


async def test_a_tenant_takes_at_most_its_places_and_others_find_one(context: Context, acme: Context) -> None:
    readers, gate = Readers(places=4, places_of_tenant=2, wait_s=30), Gate()
    mine = [asyncio.create_task(readers.run(gate, context)) for _ in range(10)]
    assert await gate.first(2) == ["default", "default"]
    theirs = asyncio.create_task(readers.run(gate, acme))
    assert await gate.first(1) == ["acme"]
    assert gate.under_way == ["default", "default", "acme"]
    gate.open.set()
    assert await asyncio.gather(*mine, theirs) == ["default"] * 10 + ["acme"]


async def test_who_waits_too_long_is_told_why(context: Context, acme: Context) -> None:
    readers, gate = Readers(places=3, places_of_tenant=2, wait_s=0.01), Gate()
    tasks = [asyncio.create_task(readers.run(gate, one)) for one in (context, context, acme)]
    await gate.first(3)
    with pytest.raises(TooManyRequests, match="2 data sets of the tenant 'default' are read already"):
        await readers.run(gate, context)
    with pytest.raises(Unavailable, match="too many data sets"):
        await readers.run(gate, acme)
    gate.open.set()
    await asyncio.gather(*tasks)
    assert await readers.run(gate, context) == "default"


async def test_who_leaves_or_fails_gives_its_place_back(context: Context) -> None:
    readers, gate = Readers(places=1, places_of_tenant=1, wait_s=30), Gate()
    first = asyncio.create_task(readers.run(gate, context))
    await gate.first(1)
    gone = asyncio.create_task(readers.run(gate, context))
    await asyncio.sleep(0)
    gone.cancel()
    gate.open.set()
    await first
    with pytest.raises(ZeroDivisionError):
        await readers.run(lambda _: 1 // 0, context)
    assert await readers.run(gate, context) == "default"


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[Readers]:
    """The places of the routes, of this test's own."""
    readers = Readers(places=4, places_of_tenant=2, wait_s=30)
    for module in (routes, evaluations, post_training):
        monkeypatch.setattr(module, "READERS", readers)
    return readers


async def test_submissions_that_read_data_hold_up_no_other_request(
    app: FastAPI, context: Context, data: dict[str, Any], free: Readers, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    gate, check = Gate(), datasets.check

    def slow(context: Context, dataset: Any, shape: Any) -> datasets.Checked:
        gate(context)
        return check(context, dataset, shape)

    monkeypatch.setattr(datasets, "check", slow)
    transport = httpx.ASGITransport(app, client=HERE)
    async with httpx.AsyncClient(transport=transport, base_url=URL, timeout=60) as client:
        # More than all of the threads that other routes share.
        bodies = [("/post_training/supervised_fine_tune", fine_tuning(data, job_uuid=f"t{n}")) for n in range(25)]
        bodies += [("/evaluate/question_answering/", evaluation(data, job_uuid=f"e{n}")) for n in range(25)]
        submissions = [asyncio.create_task(client.post(path, json=body)) for path, body in bodies]
        await gate.first(2)
        listed = await asyncio.wait_for(client.get("/post_training/jobs"), 20)
        assert (listed.status_code, listed.json()) == (200, [])
        assert len(gate.under_way) == 2
        gate.open.set()
        replies = await asyncio.gather(*submissions)
    assert [reply.status_code for reply in replies] == [200] * 50
