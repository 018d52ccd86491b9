"""The deployment of the writer: that there is one of a machine's banks."""

import asyncio
import logging
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from queue import Queue
from typing import Any

import pytest

from stack.config import Config
from stack.context import Context
from stack.errors import Unavailable
from stack.memory_banks.writer import BankWriter
from tests.conftest import CONFIG

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from serve_apps.memory_writer import MemoryWriter, _only_writer, logger


@contextmanager
def logged() -> Iterator["Queue[Any]"]:
    """The records of the log, as they come."""
    records: Queue[Any] = Queue()
    handler = logging.Handler()
    handler.emit = records.put
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def test_a_second_writer_tells_that_it_waits_until_the_first_has_ended(context: Context) -> None:
    first = _only_writer(context.config)
    assert first is not None
    with logged() as records, ThreadPoolExecutor() as threads:
        second = threads.submit(_only_writer, context.config)
        try:
            assert "another writer" in records.get(timeout=30).getMessage()
            assert not second.done()
        finally:
            first.close()
        wait([second], timeout=30)
        file = second.result(timeout=0)
        assert file is not None
        file.close()


def test_on_object_storage_there_is_no_lock() -> None:
    config = Config.parse(CONFIG | {"memory_banks": {"folder": "s3://bucket/banks"}}, "the tests' config")
    assert _only_writer(config) is None


async def test_serve_is_told_of_a_writer_that_another_one_has_replaced(context: Context) -> None:
    writer = MemoryWriter.func_or_class(context.config)
    writer.check_health()
    BankWriter(context.config, context.store)
    with pytest.raises(Unavailable):
        await writer._writer.look_after()
    with pytest.raises(RuntimeError, match="another writer"):
        writer.check_health()
    writer._watcher.cancel()
    await asyncio.get_running_loop().shutdown_default_executor()  # in which a pass may ask the database
    writer._writer._store.close()
    writer._lock.close()
