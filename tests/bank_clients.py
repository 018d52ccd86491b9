"""Clients of memory banks that write, delete and ask at once, and hold the banks to all that was acknowledged.

Documents are written in pairs, of which one call is one commit. Every part of a document, which is a chunk of its own
in a vector bank, says whose it is, of which version, and which of how many: so an answer shows whether it is of one
version of both, and of all of it.
"""

import asyncio
import random
import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from lancedb.expr import col, lit

from stack.memory_banks.arrow import DOCUMENT
from stack.memory_banks.table import BankTable
from stack.memory_banks.tables import storage_options
from tests.memory import document
from tests.running_stack import Stack, wait_for

CONFIGS: dict[str, dict[str, Any]] = {
    "vector": {"type": "vector", "embedding_model": "all-MiniLM-L6-v2", "chunk_size_in_tokens": 32},
    "keyvalue": {"type": "keyvalue"},
    "keyword": {"type": "keyword"},
}
# Each one word to a search, in whichever form.
NAMES = ("alpha", "bravo", "cobra", "delta", "foxtrot", "gamma", "hotel", "india")
SHARED = "zulu"
SIDES = ("left", "right")
PAIRS = ("x", "q")
MOST_PARTS = 4
REPEATS = 60
_PART = re.compile(r"(\w+)/(\w+) version (\d+) part (\d+) of (\d+)")


@dataclass
class Pair:
    """Two documents of one bank: the version that was acknowledged, and the one whose write has no answer yet. 0 is
    that they are not there."""

    kind: str
    name: str
    version: int = 0
    under_way: int | None = None

    @property
    def ids(self) -> list[str]:
        return [f"{self.name}/{side}" for side in SIDES]

    def documents(self, version: int) -> list[Any]:
        return [document(one, text(one, version), pair=self.name) for one in self.ids]


class Clients:
    """Clients in threads, one for each of some names, with documents of their own and some of all; and a reader."""

    def __init__(self, stack: Stack, count: int) -> None:
        self._stack = stack
        self._stopped = threading.Event()
        self._counting = threading.Lock()
        self._tasks: list[Future[None]] = []
        self.acknowledged = 0  # calls that have changed something
        self.names = NAMES[:count]
        with stack.client() as client:
            self.banks = {kind: _create(client, kind) for kind in CONFIGS}
            self.shared = [Pair(kind, SHARED) for kind in CONFIGS]
            # Their versions of which one must be there: those that were acknowledged, but for what another one has
            # replaced that was begun later and acknowledged too; and those that have no answer yet.
            self._latest = {kind: {1} for kind in CONFIGS}
            self._under_way: dict[str, set[int]] = {kind: set() for kind in CONFIGS}
            self.own = {
                name: [Pair(kind, name + letter) for kind in CONFIGS for letter in PAIRS] for name in self.names
            }
            for pair in self.shared:
                self._change(client, "insert", pair, 1)

    @contextmanager
    def running(self) -> Iterator[None]:
        """They run until the block ends, or the stack does; then this raises what one of them has found wrong."""
        with ThreadPoolExecutor(len(self.names) + 1) as pool:
            self._tasks = [pool.submit(self._run, number) for number in range(len(self.names))]
            self._tasks.append(pool.submit(self._read))
            try:
                yield
            finally:
                self._stopped.set()
        for task in self._tasks:
            task.result()

    def go_on(self, calls: int, seconds: float) -> None:
        """Waits until so many more of their changes are acknowledged, or one of them has ended."""
        enough = self.acknowledged + calls
        wait_for(lambda: self.acknowledged >= enough or any(task.done() for task in self._tasks), seconds)

    def check(self) -> None:
        """Every pair is there as it was acknowledged last, by the stack and in the files."""
        with self._stack.client() as client:
            for pair in [*self.shared, *(pair for pairs in self.own.values() for pair in pairs)]:
                versions = {self._version(client, pair, way) for way in _ways(pair)}
                if pair in self.shared:
                    assert len(versions) == 1, pair
                    assert versions <= self._latest[pair.kind] | self._under_way[pair.kind], pair
                    continue
                assert versions == {pair.version} or versions == {pair.under_way}, pair
                pair.version = versions.pop()
                if pair.version:
                    asked = {"document_ids": pair.ids}
                    reply = client.post(
                        "/memory_bank/documents/get", params={"bank_id": self.banks[pair.kind]}, json=asked
                    )
                    assert reply.status_code == 200, reply.text
                    assert len(reply.text.splitlines()) == len(SIDES)
        for kind, bank_id in self.banks.items():
            expected = [pair for pair in self.shared if pair.kind == kind]
            expected += [pair for pairs in self.own.values() for pair in pairs if pair.kind == kind and pair.version]
            rows = asyncio.run(_rows(f"{self._stack.place('memory_banks')}/default/{bank_id}"))
            assert len(set(rows)) == len(rows), "a row is there twice"
            documents = sorted(document_id for document_id, position in rows if position == DOCUMENT)
            assert documents == sorted(one for pair in expected for one in pair.ids)

    def _read(self) -> None:
        """Reads, all the time, what is written most."""
        with self._stack.client() as client:
            while not self._stopped.is_set():
                for pair in self.shared:
                    for way in _ways(pair):
                        try:
                            assert self._version(client, pair, way)
                        except httpx.TransportError:
                            return

    def _run(self, number: int) -> None:
        draw = random.Random(number)
        with self._stack.client() as client:
            for version in range(2, 1_000_000):
                if self._stopped.is_set():
                    return
                try:
                    self._turn(client, draw, number, version)
                except httpx.TransportError:  # all of the stack is gone: what has no answer is under way
                    return

    def _turn(self, client: httpx.Client, draw: random.Random, number: int, version: int) -> None:
        pair = draw.choice(self.own[self.names[number]])
        if not pair.version:
            self._change(client, "insert", pair, version)
        elif draw.random() < 0.2:
            self._change(client, "delete", pair, 0)
        else:
            self._change(client, "update", pair, version)
        assert self._version(client, pair, draw.choice(_ways(pair))) == pair.version, "what was acknowledged is there"
        shared = draw.choice(self.shared)
        self._change_shared(client, shared, 1_000 * version + number)
        assert self._version(client, shared, draw.choice(_ways(shared)))
        other = draw.choice(self.own[draw.choice(self.names)])
        self._version(client, other, draw.choice(_ways(other)))  # whole, or not there

    def _change_shared(self, client: httpx.Client, shared: Pair, version: int) -> None:
        with self._counting:
            before = set(self._latest[shared.kind])
            self._under_way[shared.kind].add(version)
        self._change(client, "update", Pair(shared.kind, shared.name, 1), version)
        with self._counting:
            self._latest[shared.kind] = self._latest[shared.kind] - before | {version}
            self._under_way[shared.kind].remove(version)

    def _change(self, client: httpx.Client, how: str, pair: Pair, version: int) -> None:
        """Writes a version of a pair, or deletes it, again as long as the answer is that the writer is away."""
        pair.under_way = version
        body: dict[str, Any] = {"bank_id": self.banks[pair.kind]}
        path = f"/memory_bank/{how}"
        if how == "delete":
            path = "/memory_bank/documents/delete"
            body["document_ids"] = pair.ids
        else:
            body["documents"] = pair.documents(version)
        for _ in range(REPEATS):
            reply = client.post(path, json=body)
            if reply.status_code != 503:
                break
            threading.Event().wait(min(1.0, float(reply.headers["retry-after"])))
        assert reply.status_code == 200, reply.text
        pair.version, pair.under_way = version, None
        with self._counting:
            self.acknowledged += 1

    def _version(self, client: httpx.Client, pair: Pair, way: dict[str, Any]) -> int:
        """The version of a pair that a query finds, which must be one of both and all of it; 0 for none."""
        params = {"max_chunks": 100} | way["params"]
        body = {"bank_id": self.banks[pair.kind], "query": way["query"], "params": params}
        reply = client.post("/memory_bank/query", json=body)
        assert reply.status_code == 200, reply.text
        return version_in(reply.json()["chunks"], pair)


def text(document_id: str, version: int) -> str:
    """A document of a few paragraphs, fewer or more in each version."""
    parts = 1 + version % MOST_PARTS
    return "\n\n".join(
        f"{document_id} version {version} part {part} of {parts}: a river flows from the mountains to the sea."
        for part in range(1, parts + 1)
    )


def version_in(chunks: Sequence[dict[str, Any]], pair: Pair) -> int:
    """The version of the documents of a pair of which these chunks are; 0 if there are none. Fails unless they are
    both documents, each with every part of that version once."""
    found = defaultdict(list)
    for chunk in chunks:
        for name, side, version, part, parts in _PART.findall(chunk["content"]):
            assert chunk["document_id"] == f"{name}/{side}"
            found[chunk["document_id"]].append((int(version), int(part), int(parts)))
    if not chunks:
        return 0
    assert sorted(found) == pair.ids, "it is a half of a pair"
    versions = {version for parts in found.values() for version, _, _ in parts}
    assert len(versions) == 1, f"{sorted(versions)} are mixed"
    for parts in found.values():
        assert sorted(part for _, part, _ in parts) == list(range(1, parts[0][2] + 1)), "it is a half of a version"
    return versions.pop()


def _ways(pair: Pair) -> list[dict[str, Any]]:
    """The queries that find all of a pair and nothing else."""
    of_pair = {"filter": {"type": "eq", "key": "pair", "value": pair.name}}
    if pair.kind == "keyvalue":
        return [{"query": f"{pair.name}/", "params": {"prefix": True}}]
    if pair.kind == "keyword":
        return [{"query": pair.name, "params": params} for params in ({}, of_pair)]
    return [
        {"query": pair.name, "params": {"mode": "keyword"}},
        {"query": "where rivers flow", "params": {"mode": "vector"} | of_pair},
        {"query": pair.name, "params": of_pair},
    ]


async def _rows(address: str) -> list[tuple[str, int]]:
    """The document and the position of each row of a bank, as one who has never opened it finds them."""
    table = await BankTable.open(address, storage_options())
    read = (
        await table.rows.query().where(col("position") >= lit(DOCUMENT)).select(["document_id", "position"]).to_arrow()
    )
    return list(zip(read["document_id"].to_pylist(), read["position"].to_pylist(), strict=True))


def _create(client: httpx.Client, kind: str) -> str:
    reply = client.post("/memory_banks/create", json={"name": kind, "config": CONFIGS[kind]})
    assert reply.status_code == 200, reply.text
    bank_id: str = reply.json()["bank_id"]
    return bank_id
