"""The graph of a bank: what is found, by how many hops, and what is seen of documents that change."""

import asyncio
import datetime as dt
import hashlib
from pathlib import Path
from typing import Any

import pytest

from stack.api.filters import Equality
from stack.memory_banks.entities import key_of
from stack.memory_banks.graph import BankGraph, GraphQuery, find
from stack.memory_banks.rows import Chunk, Document, Graph, Hit, Mention, Relation
from stack.memory_banks.table import BankTable, Words

Triple = tuple[str, str, str]


class Bank:
    """A bank's table and its graph, written as the writer does."""

    def __init__(self, table: BankTable, graph: BankGraph) -> None:
        self.table, self.graph = table, graph

    @classmethod
    async def create(cls, folder: Path) -> "Bank":
        table = await BankTable.create(str(folder), None, Words())
        return cls(table, await BankGraph.create(str(folder)))

    async def write(self, *documents: Document, replace: bool = False) -> None:
        await self.graph.put(documents)
        await self.table.write(documents, replace=replace)

    async def find(self, *entities: str, **more: Any) -> list[tuple[str, int, float]]:
        return places(await find(self.graph, GraphQuery(entities=entities, **more)))

    async def rows(self, name: str) -> list[Any]:
        return (await self.graph._tables[name].query().to_arrow()).to_pylist()


def places(hits: list[Hit]) -> list[tuple[str, int, float]]:
    return [(hit.document_id, hit.chunk.position, hit.score) for hit in hits]


def document(document_id: str, *chunks: Triple, expires_at: dt.datetime | None = None, **metadata: Any) -> Document:
    """Each chunk states one relation between two entities."""
    texts = [" ".join(triple) for triple in chunks]
    mentions = [Mention(key_of(name), name, "thing", at) for at, (one, _, two) in enumerate(chunks) for name in (one, two)]
    relations = [Relation(key_of(one), key_of(two), label, at) for at, (one, label, two) in enumerate(chunks)]
    return Document(
        document_id, f'"{texts}"', "text/plain", metadata, hashlib.sha256(str(texts).encode()).hexdigest(), expires_at,
        tuple(Chunk(text, at, 0, len(text), len(text.split()), None, ()) for at, text in enumerate(texts)),
        None, Graph(tuple(mentions), tuple(relations)),
    )  # fmt: skip


CHAIN = [("Anna", "knows", "Bob"), ("Bob", "owns", "Cafe"), ("Cafe", "is in", "Dublin"), ("Dublin", "is in", "Eire")]


async def test_a_hop_more_finds_what_is_one_relation_further(tmp_path: Path) -> None:
    bank = await Bank.create(tmp_path)
    await bank.write(document("chain", *CHAIN))
    # Of each chunk: its entities by their distances, 1, ½, ¼, ⅛, and its relation by its hop.
    assert await bank.find("anna") == [("chain", 0, 2.0), ("chain", 1, 0.5)]
    assert await bank.find("anna", hops=2) == [("chain", 0, 2.0), ("chain", 1, 1.0), ("chain", 2, 0.25)]
    assert (await bank.find("anna", hops=3))[2:] == [("chain", 2, 0.5), ("chain", 3, 0.125)]
