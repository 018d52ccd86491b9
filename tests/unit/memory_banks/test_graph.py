"""The graph of a bank: what is found, by how many hops, and what is seen of documents that change."""

import asyncio
import datetime as dt
import hashlib
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from lancedb import AsyncTable

from stack.api.filters import Equality
from stack.errors import Unavailable
from stack.memory_banks.entities import key_of
from stack.memory_banks.graph import BankGraph, GraphQuery, _at, find
from stack.memory_banks.rows import Chunk, Document, Graph, Hit, Mention, Relation
from tests.unit.memory_banks.documents import BankTable

Triple = tuple[str, str, str]


class Bank:
    """A bank's table and its graph, written as the writer does."""

    def __init__(self, table: BankTable, graph: BankGraph) -> None:
        self.table, self.graph = table, graph

    @classmethod
    async def create(cls, folder: Path) -> "Bank":
        table = await BankTable.create(str(folder), None, None)
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
    mentions = [
        Mention(key_of(name), name, "thing", at) for at, (one, _, two) in enumerate(chunks) for name in (one, two)
    ]
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


async def test_relations_are_followed_in_both_directions(tmp_path: Path) -> None:
    bank = await Bank.create(tmp_path)
    await bank.write(document("chain", *CHAIN))
    assert [position for _, position, _ in await bank.find("Eire", hops=2)] == [3, 2, 1]


async def test_documents_are_joined_by_the_entities_that_they_share(tmp_path: Path) -> None:
    bank = await Bank.create(tmp_path)
    await bank.write(document("a", CHAIN[0]), document("b", ("BOB ", "owns", "Cafe")))
    assert await bank.find("Anna", hops=1) == [("a", 0, 2.0), ("b", 0, 0.5)]


async def test_entities_are_known_in_a_text(tmp_path: Path) -> None:
    bank = await Bank.create(tmp_path)
    await bank.write(document("a", ("Anna Ek", "owns", "C++")), document("b", ("Ek", "is", "oak")))
    for text in ("Where does ANNA  Ek live?", "(c++)"):
        found = await find(bank.graph, GraphQuery(text=text))
        assert found[0].document_id == "a", text
    assert await find(bank.graph, GraphQuery(text="Annas oaken cabin")) == []


async def test_a_replaced_document_is_found_by_what_it_says_now_alone(tmp_path: Path) -> None:
    bank = await Bank.create(tmp_path)
    await bank.write(document("a", CHAIN[0], CHAIN[1]), document("b", ("Cafe", "is in", "Dublin")))
    await bank.write(document("a", ("Anna", "knows", "Zoe")), replace=True)
    assert await bank.find("Bob", hops=3) == []
    assert await bank.find("Anna", hops=3) == [("a", 0, 2.0)]


async def test_a_graph_without_its_document_is_not_seen(tmp_path: Path) -> None:
    bank = await Bank.create(tmp_path)
    await bank.write(document("a", CHAIN[0]))
    await bank.graph.put([document("a", ("Anna", "knows", "Zoe"))])  # and the writer dies
    await bank.graph.put([document("b", ("Bob", "knows", "Zoe"))])
    assert await bank.find("Zoe") == []
    assert await bank.find("Anna", hops=3) == [("a", 0, 2.0)]


async def test_the_graph_of_an_update_is_not_seen_before_its_document_is(tmp_path: Path) -> None:
    """Of the same address, with the same hash, another content was had."""
    bank = await Bank.create(tmp_path)
    old = document("a", CHAIN[0])
    new = replace(document("a", ("Zoe", "is", "far"), ("Anna", "met", "Zoe")), hash=old.hash)
    await bank.write(old)
    await bank.graph.put([new])
    assert await bank.find("Anna", hops=3) == [("a", 0, 2.0)]
    assert await bank.find("Zoe") == []
    await bank.table.write([new], replace=True)
    assert await bank.find("Zoe") == [("a", 0, 2.0), ("a", 1, 2.0)]
    assert await bank.find("Bob") == []
    assert await bank.graph.maintain(bank.table) == 1
    assert await bank.find("Anna") == [("a", 1, 2.0), ("a", 0, 0.5)]


async def test_what_was_deleted_or_has_expired_is_not_seen(tmp_path: Path) -> None:
    bank = await Bank.create(tmp_path)
    past = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)
    await bank.write(document("a", CHAIN[0]), document("b", CHAIN[1], expires_at=past), document("c", CHAIN[2]))
    assert await bank.find("Anna", hops=3) == [("a", 0, 2.0)]
    await bank.table.delete(["a"])
    assert await bank.find("Anna", "Cafe") == [("c", 0, 2.0)]


async def test_maintenance_removes_what_is_of_no_document(tmp_path: Path) -> None:
    bank = await Bank.create(tmp_path)
    same = ("Same", "as", "other")  # in two documents, one of which goes
    await bank.write(document("a", same), document("b", same), document("c", CHAIN[0]))
    await bank.write(document("c", CHAIN[1]), replace=True)
    await bank.table.delete(["b"])
    assert await bank.graph.maintain(bank.table) == 2
    assert {row["document_id"] for row in await bank.rows("nodes")} == {"a", "c"}
    assert [(row["source"], row["target"]) for row in await bank.rows("edges")] == [("same", "other"), ("bob", "cafe")]
    assert await bank.find("same") == [("a", 0, 2.0)]
    assert await bank.graph.maintain(bank.table) == 0


async def test_a_write_that_is_repeated_leaves_one_graph(tmp_path: Path) -> None:
    bank = await Bank.create(tmp_path)
    given = document("a", CHAIN[0], CHAIN[1])
    await bank.graph.put([given])  # and the writer dies
    await bank.write(given, document("b", CHAIN[2]))
    await bank.write(given, replace=True)
    assert (len(await bank.rows("nodes")), len(await bank.rows("edges"))) == (6, 3)
    assert await bank.find("Anna") == [("a", 0, 2.0), ("a", 1, 0.5)]


async def test_a_filter_hides_what_only_other_documents_lead_to(tmp_path: Path) -> None:
    bank = await Bank.create(tmp_path)
    await bank.write(
        document("a", CHAIN[0], of="us"), document("b", CHAIN[1], of="them"), document("c", CHAIN[2], of="us")
    )
    ours = Equality(type="eq", key="of", value="us")
    assert [one for one, _, _ in await bank.find("Anna", hops=3)] == ["a", "b", "c"]
    assert await bank.find("Anna", hops=3, filter=ours) == [("a", 0, 2.0)]


async def test_answers_have_their_bounds(tmp_path: Path) -> None:
    bank = await Bank.create(tmp_path)
    await bank.write(document("chain", *CHAIN))
    assert len(await bank.find("Anna", hops=3, max_chunks=2)) == 2
    assert await bank.find("Anna", hops=3, score_threshold=0.6) == [("chain", 0, 2.0), ("chain", 1, 1.0)]
    assert await bank.find("Anna", hops=3, max_tokens=6) == [("chain", 0, 2.0), ("chain", 1, 1.0)]
    around = await bank.find("Eire", max_chunks=1, neighbours=1)
    assert [position for _, position, _ in around] == [2, 3]


async def test_what_a_client_writes_is_never_a_part_of_a_condition(tmp_path: Path) -> None:
    bank = await Bank.create(tmp_path)
    odd = "x' OR '1' = '1"
    await bank.write(document(odd, (odd, "is", "Odd")), document("b", CHAIN[0]))
    assert await bank.find(odd) == [(odd, 0, 2.0)]
    assert await bank.find("y' OR '1' = '1") == []


async def test_chunks_are_looked_up_in_the_index_of_ids(tmp_path: Path) -> None:
    bank = await Bank.create(tmp_path)
    await bank.write(*(document(f"d{at}", *CHAIN) for at in range(3)))
    await bank.table.maintain()
    plan = await bank.table.rows.query().where(_at([("d0", 1), ("d2", 0)])).explain_plan()
    assert "ScalarIndexQuery" in plan
    chunks = await (await bank.graph.snapshot()).chunks([("d0", 1), ("d2", 0), ("none", 0)])
    assert {place: found.text for place, found in chunks.items()} == {
        ("d0", 1): "Bob owns Cafe", ("d2", 0): "Anna knows Bob",
    }  # fmt: skip


async def test_a_bank_that_changes_each_time_it_is_opened_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = await Bank.create(tmp_path)
    versions = count()

    async def version(_: AsyncTable) -> int:
        return next(versions)

    monkeypatch.setattr(AsyncTable, "version", version)
    with pytest.raises(Unavailable, match="has changed 20 times"):
        await bank.find("Anna")


async def test_each_query_sees_a_document_as_it_was_or_as_it_is(tmp_path: Path) -> None:
    """Hub is in both of its forms, so a query that misses it has seen half of an update."""
    bank = await Bank.create(tmp_path)
    forms = [document("a", ("Hub", "to", "Old"), CHAIN[0]), document("a", ("Hub", "to", "New"))]
    await bank.write(forms[0])
    done = asyncio.Event()

    async def update() -> None:
        for number in range(1, 11):
            await bank.write(forms[number % 2], replace=True)
            if number % 3 == 0:
                await bank.graph.maintain(bank.table)
        done.set()

    async def ask() -> int:
        asked = 0
        while not done.is_set():
            assert await bank.find("Hub") == [("a", 0, 2.0)]
            asked += 1
        return asked

    _, *asked = await asyncio.gather(update(), ask(), ask())
    assert all(asked)
