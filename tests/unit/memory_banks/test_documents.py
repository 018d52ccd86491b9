"""Documents on their way into a bank: nobody waits long for what others have sent, nor for ever."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stack.api.memory_banks import INGEST, MemoryBankDocument
from stack.config import Config
from stack.context import Context
from stack.errors import Unavailable
from stack.memory_banks import contents, documents
from stack.memory_banks.documents import prepare
from stack.memory_banks.reading import read
from stack.memory_banks.rows import Document
from stack.store import MemoryBank, now
from tests.conftest import CONFIG
from tests.scripted_engine import ScriptedEngine


@pytest.fixture
def context(home: Path, store_url: str) -> Iterator[Context]:
    context = Context.open(Config.parse(CONFIG | {"store": store_url}, "the tests'"), engine=ScriptedEngine())
    yield context
    context.close()


class Slow:
    """Reads documents, the slow ones to their end once they may, and counts how many of these it reads at once."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self._counting = threading.Lock()
        self.now = self.most = 0

    def read(self, content: bytes, *more: Any) -> Any:
        if content == b"slow":
            with self._counting:
                self.now += 1
                self.most = max(self.most, self.now)
            self.begun.set()
            assert self.may_end.wait(60)
            with self._counting:
                self.now -= 1
        return read(content, *more)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    slow = Slow()
    monkeypatch.setattr(documents, "read", slow.read)
    yield slow
    slow.may_end.set()


async def ready(context: Context, content: str, **more: Any) -> Document:
    bank = MemoryBank("bank-1", context.tenant, "a", None, {"type": "keyvalue"}, None, bytes=0, created_at=now())
    given = MemoryBankDocument(document_id="a", content=content, mime_type="text/plain", metadata={})
    (one,) = await prepare(context, bank, [given], [None], **more)
    return one


async def test_a_tenant_whose_documents_take_long_leaves_the_others_a_thread(context: Context, slow: Slow) -> None:
    calls = [asyncio.create_task(ready(context, "slow")) for _ in range(3)]
    await asyncio.to_thread(slow.begun.wait, 60)
    async with asyncio.timeout(60):
        assert (await ready(context.of_tenant("acme"), "fast")).chunks[0].text == "fast"
    calls.pop().cancel()  # it waits for its turn, and does not have it
    slow.may_end.set()
    await asyncio.gather(*calls)
    assert slow.most == 1


async def test_who_leaves_while_a_document_is_read_does_not_get_another_thread(context: Context, slow: Slow) -> None:
    first = asyncio.create_task(ready(context, "slow"))
    await asyncio.to_thread(slow.begun.wait, 60)
    first.cancel()
    await asyncio.wait([first])
    second = asyncio.create_task(ready(context, "slow"))
    async with asyncio.timeout(60):
        await ready(context.of_tenant("acme"), "fast")
    slow.may_end.set()
    await second
    assert slow.most == 1


async def test_what_is_not_read_in_time_is_told_of_the_job_which_has_the_time(
    context: Context, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "READ_SECONDS", 0)
    with pytest.raises(Unavailable, match=f"not read within 0 s; the job {INGEST}"):
        await ready(context, "slow")
    slow.may_end.set()
    assert (await ready(context, "slow", in_job=True)).chunks[0].text == "slow"
    monkeypatch.undo()
    await ready(context, "another")  # in its turn: what was given up has been read to its end, too


async def test_a_local_file_does_not_wait_behind_fetches(context: Context, home: Path, slow: Slow) -> None:
    (home / "data" / "a.txt").write_text("of the folder")
    fetches = [contents._FETCHES.submit(slow.may_end.wait, 60) for _ in range(16)]
    async with asyncio.timeout(30):
        assert (await ready(context, f"file://{home}/data/a.txt")).chunks[0].text == "of the folder"
    slow.may_end.set()
    assert all(fetch.result() for fetch in fetches)
