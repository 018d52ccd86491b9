"""The tables of banks in this process: where they lie, and those that are open.

Each bank has a folder of its own, in which there is a table once something was written into it.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator

import fsspec

from stack.config import Config
from stack.memory_banks.table import BankTable
from stack.store import MemoryBank

# How many tables a process keeps open. An open one holds what was read of its manifest and its indexes.
OPEN = 128


class Tables:
    """Opens tables when they are asked for, and keeps those that were asked for lately. For several threads."""

    def __init__(self, config: Config, most: int = OPEN) -> None:
        self._root = config.memory_banks_url
        self._most = most
        self._open: OrderedDict[str, BankTable] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, bank: MemoryBank) -> BankTable | None:
        """The table of a bank; None if nothing was ever written into it."""
        with self._lock:
            if (table := self._open.get(bank.id)) is not None:
                self._open.move_to_end(bank.id)
                return table
        if bank.written_at is None:
            return None
        table = BankTable.open(self._address(bank), storage_options())
        return table and self._keep(bank, table)

    def get_or_create(self, bank: MemoryBank) -> BankTable:
        """For the writer alone."""
        return self.get(bank) or self._keep(
            bank, BankTable.create(self._address(bank), bank.dimensions, storage_options())
        )

    def remove(self, bank: MemoryBank) -> None:
        """Removes all that a bank has. One that has nothing is no error."""
        self.forget(bank)
        files, path = fsspec.core.url_to_fs(self._address(bank), use_listings_cache=False)
        if files.exists(path):
            files.rm(path, recursive=True)

    def forget(self, bank: MemoryBank) -> None:
        """Closes the table of a bank, if it is open."""
        with self._lock:
            self._open.pop(bank.id, None)

    def folders(self) -> Iterator[tuple[str, str]]:
        """The tenant and the id of each bank that has a folder."""
        files, root = fsspec.core.url_to_fs(self._root, use_listings_cache=False)
        if not files.exists(root):
            return
        for tenant in _folders_in(files, root):
            for folder in _folders_in(files, tenant):
                yield tenant.rsplit("/", 1)[-1], folder.rsplit("/", 1)[-1]

    def _keep(self, bank: MemoryBank, table: BankTable) -> BankTable:
        with self._lock:
            table = self._open.setdefault(bank.id, table)
            self._open.move_to_end(bank.id)
            while len(self._open) > self._most:
                self._open.popitem(last=False)
        return table

    def _address(self, bank: MemoryBank) -> str:
        return f"{self._root}/{bank.tenant}/{bank.id}"


def _folders_in(files: fsspec.AbstractFileSystem, path: str) -> list[str]:
    return [one["name"].rstrip("/") for one in files.ls(path, detail=True) if one["type"] == "directory"]


def storage_options() -> dict[str, str]:
    """What LanceDB must be told of object storage: it does not know all the variables that AWS's own tools do."""
    options = {}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        options["endpoint"] = endpoint
        if endpoint.startswith("http://"):
            options["allow_http"] = "true"
    return options
