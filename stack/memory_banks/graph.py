"""The graph of a bank: entities, where they are mentioned, and their relations, in two tables beside the bank's own.

Rows of the graph name the writing of a document that they were extracted from (Document.writing), and count only as
long as the bank's table has the document of just that one. They are written before the document is, so a document is
there with its whole graph or not at all; what a writing, a deletion or an expiry leaves behind is seen by nobody, and
`maintain` removes it.

A query is of one version of the bank: that of its table is held first, then those of the graph, in which there is all
that belongs to it.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, repeat
from typing import Any, Self, TypeVar

import lancedb
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.expr import Expr, col, lit
from lancedb.index import BTree

from stack.errors import Unavailable
from stack.memory_banks import arrow, filters
from stack.memory_banks.arrow import CHUNK_COLUMNS, DOCUMENT, Found
from stack.memory_banks.entities import key_of, names_in
from stack.memory_banks.rows import Document, Hit
from stack.memory_banks.search import Bounds, shown
from stack.memory_banks.table import KEEP_VERSIONS, TABLE, BankTable, connect, open_table, unexpired

NODES, EDGES = "nodes", "edges"
# From how many entities a hop goes on, at most: those that the most relations lead to.
MAX_ENTITIES = 500
# How many mentions, and how many relations of a hop, a query reads at most. Of more, LanceDB gives any so many.
MAX_ROWS = 20_000
# Of one expression.
MAX_LITERALS = 1_000
MAX_PLACES = 50
# Each write and each maintenance of a bank changes its graph.
PIN_TRIES = 20

T = TypeVar("T")
_Place = tuple[str, int]  # a document's id, and the position of a chunk in it
_ORIGIN = [
    pa.field("document_id", pa.string(), nullable=False),
    pa.field("writing", pa.string(), nullable=False),
    pa.field("position", pa.int32(), nullable=False),
]
_TEXTS = {NODES: ("key", "name", "kind"), EDGES: ("source", "target", "label")}
_INDEXED = {NODES: ("key", "writing"), EDGES: ("source", "target", "writing")}


@dataclass(frozen=True, slots=True)
class GraphQuery(Bounds):
    """A query: of `entities` by their names, or of those whose names stand in `text`, where there are none.

    `hops` is how many relations an entity may be away from them, from 1 on.
    """

    text: str = ""
    entities: tuple[str, ...] = ()
    hops: int = 1


class BankGraph:
    """The tables of one bank's entities and relations. There is one writer at a time, as of the bank's own table."""

    def __init__(self, address: str, storage_options: Mapping[str, str] | None, tables: dict[str, Any]) -> None:
        self._address = address
        self._options = storage_options
        self._tables = tables

    @classmethod
    async def create(cls, address: str, storage_options: Mapping[str, str] | None = None) -> Self:
        """Makes the tables in the folder of the bank's own; those that are there already are opened."""
        connection = await connect(address, storage_options)
        tables = {}
        for name, texts in _TEXTS.items():
            schema = pa.schema([*_ORIGIN, *(pa.field(text, pa.string(), nullable=False) for text in texts)])
            table = tables[name] = await connection.create_table(name, schema=schema, exist_ok=True)
            there = {index.name for index in await table.list_indices()}
            for column in _INDEXED[name]:
                if column not in there:
                    await table.create_index(column, config=BTree(), name=column)
        return cls(address, storage_options, tables)

    @classmethod
    async def open(cls, address: str, storage_options: Mapping[str, str] | None = None) -> Self:
        """Opens the tables. Raises NotFound where they are not there."""
        connection = await connect(address, storage_options)
        return cls(address, storage_options, {name: await open_table(connection, name) for name in (NODES, EDGES)})

    async def put(self, documents: Sequence[Document]) -> None:
        """Writes what was extracted from documents. Readers see it when the bank's table has the documents.

        A writing that is there already, of a call that is repeated, is there as a whole, and stays.
        """
        for name, table in self._tables.items():
            there = set[str]()
            for some in _batches([one.writing for one in documents], MAX_LITERALS):
                read = await table.query().where(_any_of("writing", some)).select(["writing"]).to_arrow()
                there |= set(read["writing"].unique().to_pylist())
            new = [one for one in documents if one.writing not in there]
            rows = await asyncio.to_thread(_rows, new, name, await table.schema())
            if rows.num_rows:
                await table.add(rows)

    async def maintain(self, bank: BankTable) -> int:
        """Removes what is of no document of the bank any more, and does for the tables what BankTable.maintain does.

        It must not run beside a write of the bank. Tells how many writings of documents were removed.
        """
        gone = set[str]()
        for table in self._tables.values():
            stale = await _stale(table, bank)
            for some in _batches(stale, MAX_LITERALS):
                await table.delete(_any_of("writing", some))
            await table.optimize(cleanup_older_than=KEEP_VERSIONS)
            gone |= stale
        return len(gone)

    async def snapshot(self) -> "Snapshot":
        """The bank as it is now, in three tables that stay as they are.

        What is removed while they are opened may be of the bank's held version: then they are opened again. Raises
        Unavailable where that is so each time.
        """
        held = await lancedb.connect_async(self._address, storage_options=dict(self._options or {}))
        for _ in range(PIN_TRIES):
            before = [await table.version() for table in self._tables.values()]
            bank = await held.open_table(TABLE)
            nodes, edges = await held.open_table(NODES), await held.open_table(EDGES)
            if [await nodes.version(), await edges.version()] == before:
                return Snapshot(BankTable(bank, None), nodes, edges)
        raise Unavailable(f"the bank has changed {PIN_TRIES} times while it was opened; try again")


class Snapshot:
    """One version of a bank with its graph, of which each document is asked once whether it is there."""

    def __init__(self, bank: BankTable, nodes: Any, edges: Any) -> None:
        self.bank = bank
        self._nodes = nodes
        self._edges = edges
        self._writings: dict[str, str | None] = {}

    async def mentions(self, keys: Collection[str], condition: Expr | None) -> list[dict[str, Any]]:
        """Where entities are mentioned."""
        return await self._read(self._nodes, ["key"], keys, condition)

    async def relations(self, keys: Collection[str], condition: Expr | None) -> list[dict[str, Any]]:
        """The relations from and to entities."""
        return await self._read(self._edges, ["source", "target"], keys, condition)

    async def chunks(self, places: Iterable[_Place]) -> dict[_Place, Found]:
        found: dict[_Place, Found] = {}
        for some in _batches(places, MAX_PLACES):
            read = await self.bank.rows.query().where(_at(some)).select(list(CHUNK_COLUMNS)).to_arrow()
            found |= {one.key: one for one in arrow.found(read, repeat(0.0, read.num_rows))}
        return found

    async def _read(
        self, table: Any, columns: Sequence[str], keys: Collection[str], condition: Expr | None
    ) -> list[dict[str, Any]]:
        """The rows that have one of the keys in one of the columns, of documents that are there."""
        rows: list[dict[str, Any]] = []
        for some in _batches(keys, MAX_LITERALS):
            asked = filters.any_of([_any_of(column, some) for column in columns])
            names = [*_TEXTS[NODES if table is self._nodes else EDGES], "document_id", "writing", "position"]
            query = table.query().where(asked).select(names).limit(MAX_ROWS - len(rows))
            rows += await asyncio.to_thread((await query.to_arrow()).to_pylist)
            if len(rows) == MAX_ROWS:
                break
        await self._look_up({row["document_id"] for row in rows}.difference(self._writings), condition)
        return [row for row in rows if self._writings[row["document_id"]] == row["writing"]]

    async def _look_up(self, document_ids: Collection[str], condition: Expr | None) -> None:
        for some in _batches(document_ids, MAX_LITERALS):
            asked = _any_of("document_id", some) & (col("position") == lit(DOCUMENT)) & unexpired()
            query = self.bank.rows.query().where(asked if condition is None else asked & condition)
            read = await query.select(["document_id", "writing"]).to_arrow()
            self._writings |= dict.fromkeys(some)
            self._writings |= dict(zip(read["document_id"].to_pylist(), read["writing"].to_pylist(), strict=True))


async def find(graph: BankGraph, query: GraphQuery) -> list[Hit]:
    """The chunks in which there are the entities that a query begins from, those near them, or relations of these.

    An entity has the distance d of the fewest relations that lead to it, in whichever direction, from one that the
    query names: 0 for this one itself, at most `hops`. A relation has the number h of the hop that found it, from 1.
    The score of a chunk is the sum of 2^-d over the entities that it mentions and of 2^-h over the relations that it
    states. Chunks of the same score come in the order of their documents' ids and positions.

    With a filter it is as if the bank had those documents alone that pass it. Raises Unavailable as `snapshot` does.
    """
    held = await graph.snapshot()
    condition = None if query.filter is None else filters.expression(query.filter, await held.bank.columns())
    names = [key_of(one) for one in query.entities] or names_in(query.text)
    scores = await _scored(held, dict.fromkeys(names), query.hops, condition)
    best = sorted(scores, key=lambda place: (-scores[place], place))
    chunks = await held.chunks(best[: query.max_chunks])
    found = [replace(chunks[place], score=scores[place]) for place in best[: query.max_chunks]]
    return await shown(held.bank, found, query)


async def _scored(held: Snapshot, names: Collection[str], hops: int, condition: Expr | None) -> dict[_Place, float]:
    """The scores of all chunks that a query finds."""
    mentions = await held.mentions(names, condition)
    distances = dict.fromkeys((row["key"] for row in mentions), 0)
    relations: dict[tuple[Any, ...], int] = {}
    frontier: Collection[str] = list(distances)
    for hop in range(1, hops + 1):
        rows = await held.relations(frontier, condition)
        for row in rows:
            relations.setdefault((*_place(row), row["source"], row["target"], row["label"]), hop)
        ends = Counter(key for row in rows for key in (row["source"], row["target"]) if key not in distances)
        frontier = sorted(ends, key=lambda key: (-ends[key], key))[:MAX_ENTITIES]
        distances |= dict.fromkeys(frontier, hop)
        mentions += await held.mentions(frontier, condition)
    scores: defaultdict[_Place, float] = defaultdict(float)
    for row in mentions:
        scores[_place(row)] += 2.0 ** -distances[row["key"]]
    for (document_id, position, *_), hop in relations.items():
        scores[document_id, position] += 2.0**-hop
    return scores


async def _stale(table: Any, bank: BankTable) -> set[str]:
    """The writings in a table of the graph that are not in the bank's table, or no longer."""
    there = await _writings(bank.rows.query().where(col("position") == lit(DOCUMENT)))
    in_graph = await _writings(table.query())
    return set(await asyncio.to_thread(lambda: in_graph.filter(pc.invert(pc.is_in(in_graph, there))).to_pylist()))


async def _writings(query: Any) -> pa.Array:
    """The different writings of the rows that a query finds."""
    parts = [batch["writing"].unique() async for batch in await query.select(["writing"]).to_batches()]
    return await asyncio.to_thread(lambda: pa.chunked_array(parts, pa.string()).unique())


def _rows(documents: Sequence[Document], name: str, columns: pa.Schema) -> pa.Table:
    """What a table of the graph has of documents."""
    rows: list[dict[str, Any]] = []
    for document in documents:
        if document.graph is not None:
            origin = {"document_id": document.document_id, "writing": document.writing}
            entries = document.graph.mentions if name == NODES else document.graph.relations
            rows += [origin | asdict(entry) for entry in entries]
    return pa.Table.from_pylist(rows, columns)


def _place(row: Mapping[str, Any]) -> _Place:
    return row["document_id"], row["position"]


def _at(places: Sequence[_Place]) -> Expr:
    """Rows at places. LanceDB looks the list of ids up in their index, which it does not do with the ids of places."""
    at = [(col("document_id") == lit(id_)) & (col("position") == lit(position)) for id_, position in places]
    return _any_of("document_id", {id_ for id_, _ in places}) & filters.any_of(at)


def _any_of(column: str, values: Iterable[str]) -> Expr:
    return col(column).isin([lit(value) for value in values])


def _batches(values: Iterable[T], size: int) -> Iterator[list[T]]:
    left = iter(values)
    while some := list(islice(left, size)):
        yield some
