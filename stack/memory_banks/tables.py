"""The tables of banks in this process: where they lie, and those that are open.

Each bank has a folder of its own, in which there are its tables once something was written into it.
"""

import asyncio
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from stack.api.memory_banks import KeywordBankConfig
from stack.config import Config
from stack.errors import NotFound
from stack.memory_banks.graph import BankGraph
from stack.memory_banks.table import BankTable, Words
from stack.store import MemoryBank

# How many banks a process keeps open. An open one holds what was read of its manifests and its indexes.
OPEN = 128


@dataclass(frozen=True, slots=True)
class OpenBank:
    """A bank's tables: the graph's are of graph banks only."""

    table: BankTable
    graph: BankGraph | None


class Tables:
    """Opens banks when they are asked for, and keeps those that were asked for lately. For one event loop."""

    def __init__(self, config: Config, most: int = OPEN) -> None:
        self._root = config.memory_banks_url
        self._most = most
        self._open: OrderedDict[str, OpenBank] = OrderedDict()

    async def get(self, bank: MemoryBank) -> OpenBank | None:
        """The tables of a bank; None if nothing was ever written into it."""
        if (opened := self._open.get(bank.id)) is not None:
            self._open.move_to_end(bank.id)
            return opened
        if bank.written_at is None:
            return None
        address, options = self._address(bank), storage_options()
        try:
            table = await BankTable.open(address, options)
            graph = await BankGraph.open(address, options) if _has_graph(bank) else None
        except NotFound:
            return None  # its first write is under way, or has failed
        return self._keep(bank, OpenBank(table, graph))

    async def get_or_create(self, bank: MemoryBank) -> OpenBank:
        """For the writer alone."""
        if (opened := self._open.get(bank.id)) is not None:
            self._open.move_to_end(bank.id)
            return opened
        address, options = self._address(bank), storage_options()
        # What a writer that was killed here has begun is made whole by the next one.
        table = await BankTable.create(address, bank.dimensions, _words(bank), options)
        graph = await BankGraph.create(address, options) if _has_graph(bank) else None
        return self._keep(bank, OpenBank(table, graph))

    async def remove(self, bank: MemoryBank) -> None:
        """Removes all that a bank has. One that has nothing is no error."""
        self.forget(bank)
        await asyncio.to_thread(self._remove_files, bank)

    def forget(self, bank: MemoryBank) -> None:
        """Closes the tables of a bank, if they are open."""
        self._open.pop(bank.id, None)

    def size(self, bank: MemoryBank) -> int:
        """How many bytes the files of a bank have, those of its old versions among them."""
        files, path = fsspec.core.url_to_fs(self._address(bank), use_listings_cache=False)
        if not isinstance(files, LocalFileSystem):
            return sum(file["size"] for file in files.find(path, detail=True).values())
        return sum(map(_bytes_in, Path(path).rglob("*")))

    def _remove_files(self, bank: MemoryBank) -> None:
        files, path = fsspec.core.url_to_fs(self._address(bank), use_listings_cache=False)
        if files.exists(path):
            files.rm(path, recursive=True)

    def _keep(self, bank: MemoryBank, opened: OpenBank) -> OpenBank:
        opened = self._open.setdefault(bank.id, opened)
        self._open.move_to_end(bank.id)
        while len(self._open) > self._most:
            self._open.popitem(last=False)
        return opened

    def _address(self, bank: MemoryBank) -> str:
        return f"{self._root}/{bank.tenant}/{bank.id}"


def _bytes_in(file: Path) -> int:
    """The bytes of a file; 0 for one that is gone meanwhile, as those that are being written get another name."""
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:
        return 0


def _has_graph(bank: MemoryBank) -> bool:
    return bool(bank.config["type"] == "graph")


def _words(bank: MemoryBank) -> Words | None:
    """How words are found, in banks that are asked for them: keyword banks say it."""
    match bank.config["type"]:
        case "keyword":
            config = KeywordBankConfig.model_validate(bank.config)
            return Words(language=config.language, stem=config.stem)
        case "vector":
            return Words()
        case _:
            return None


def storage_options() -> dict[str, str]:
    """What LanceDB must be told of object storage: it does not know all the variables that AWS's own tools do."""
    options = {}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        options["endpoint"] = endpoint
        if endpoint.startswith("http://"):
            options["allow_http"] = "true"
    return options
