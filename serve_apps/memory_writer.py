"""The writer of memory banks: a Serve deployment of one replica, through which everything goes that changes a bank.

See stack/memory_banks/writer.py. Beside the writes it maintains banks by schedule: it lets documents expire, compacts
tables, takes what is new into their indexes and cleans old versions up. A new replica starts from the database, which
says where something is due, so nothing is lost when one dies. No bank is opened before it is needed.
"""

import asyncio
import fcntl
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from ray import serve
from sqlalchemy.exc import SQLAlchemyError

from serve_apps.placement import WAITS
from serve_apps.replica_ports import listen_inside
from stack import tracing
from stack.config import Config
from stack.errors import StackError
from stack.memory_banks.rows import Document
from stack.memory_banks.serve_writer import NAME
from stack.memory_banks.writer import BankWriter
from stack.store import MemoryBank, Store, faults

logger = logging.getLogger("ray.serve")


listen_inside()


@serve.deployment(
    name=NAME,
    num_replicas=1,
    max_ongoing_requests=256,
    max_queued_requests=256,  # of each gateway; beyond them it is Unavailable
    ray_actor_options={**WAITS},
    health_check_period_s=2,  # nobody writes until it is noticed that the writer has died
)
class MemoryWriter:
    """Implements stack.memory_banks.writer.Writer."""

    def __init__(self, config: Config) -> None:
        tracing.start("memory-writer", config.otlp_address)
        self._lock = _only_writer(config)
        self._writer = BankWriter(config, Store(config.store_url))
        self._watcher = asyncio.get_running_loop().create_task(self._look_after(config.memory_banks.maintenance_s))

    def check_health(self) -> None:
        """Serve restarts a writer that has stopped looking after the banks, or that another one has replaced."""
        if self._writer.is_superseded:
            raise RuntimeError("another writer of the memory banks has taken over")
        if self._watcher.done():
            self._watcher.result()

    async def write(self, bank: MemoryBank, documents: Sequence[Document], replace: bool) -> None:
        await self._writer.write(bank, documents, replace)

    async def delete(self, bank: MemoryBank, document_ids: Sequence[str]) -> list[str]:
        return await self._writer.delete(bank, document_ids)

    async def drop(self, bank: MemoryBank) -> None:
        await self._writer.drop(bank)

    async def _look_after(self, seconds: float) -> None:
        """Looks after the banks again and again, waiting so long between, or until one needs it."""
        while True:
            try:
                for bank_id in await self._writer.sweep():
                    logger.info("the table of the memory bank %s, which a drop has left, is removed", bank_id)
                await self._writer.look_after()
            except (OSError, StackError, SQLAlchemyError) as error:  # the database is away
                words = faults.reason(error) if isinstance(error, SQLAlchemyError) else str(error)
                logger.warning("the memory banks cannot be looked after: %s", words)
            await self._writer.until_due(seconds)


def _only_writer(config: Config) -> TextIO | None:
    """Waits until no other writer of these banks is left on this machine, and keeps others out while it is open.

    While Serve replaces a replica there may be two for a moment. On object storage there is no such lock, and the epoch
    of stack/memory_banks/writer.py is all that keeps the older one out.
    """
    if "://" in config.memory_banks_url:
        return None
    folder = Path(config.memory_banks_url)
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".writer").open("w")
    # The kernel lets go of it however this process ends.
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.warning("another writer holds the memory banks in %s; waiting until it has ended", folder)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file
