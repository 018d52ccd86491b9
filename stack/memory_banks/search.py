"""What answers a query of a bank.

By vector, by the words of a text, or by both. A vector's score is its cosine similarity to the query's (-1 to 1); a
text's is BM25 as LanceDB computes it (from 0, without a bound); that of both is by reciprocal rank fusion (Cormack,
Clarke and Buettcher, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods", SIGIR 2009):
the sum of 1 / (60 + rank) over the two lists.

Each list is of one version of the table. Those of the two halves, and of neighbours, may be of two: of a document that
was written between them, only the chunks of the later writing are answered.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate, chain, repeat
from typing import Literal

import numpy as np
from lancedb.expr import Expr, col, lit
from lancedb.query import AsyncFTSQuery, AsyncVectorQuery
from numpy.typing import NDArray

from stack.api.filters import AnyFilter
from stack.errors import BadInput
from stack.memory_banks import arrow, filters
from stack.memory_banks.arrow import CHUNK_COLUMNS, Found
from stack.memory_banks.rows import Hit
from stack.memory_banks.table import BankTable, unexpired

Mode = Literal["vector", "keyword", "hybrid"]
FUSION_K = 60
# How many parts of the approximate index are looked at, at least: where a condition leaves too few rows in them, more.
PROBES = 20
# How many candidates the search in the index's graph keeps, at least. Its own 15 for ten chunks find 95% of the nearest
# ten among 12,000 vectors, these 99%, for 0.3 ms more.
CANDIDATES = 64
# How deep the lists are that a hybrid search fuses, at least.
FUSED = 50
# LanceDB's column of the cosine distance, which is 1 less the similarity.
DISTANCE = "_distance"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What is answered of all that a query finds, of any kind of bank.

    `max_tokens` and `max_chunks` bound it; `neighbours` is how many chunks before and after each hit, of its document,
    come with it, beyond `max_chunks` but within `max_tokens`.
    """

    max_chunks: int = 10
    max_tokens: int | None = None
    score_threshold: float | None = None
    filter: AnyFilter | None = None
    neighbours: int = 0


@dataclass(frozen=True, slots=True)
class Query(Bounds):
    """A query: of `text` for keyword and hybrid, of its `vector` (dimensions,) for vector and hybrid."""

    mode: Mode
    text: str = ""
    vector: NDArray[np.float32] | None = None


async def search(table: BankTable, query: Query) -> list[Hit]:
    """The best hits of a query, best first; with neighbours each hit is among its own, in the order of the document.

    Raises BadInput for a vector that is not of the bank's dimensions.
    """
    condition = None if query.filter is None else filters.expression(query.filter, await table.columns())
    return await shown(table, await _ranked(table, query, condition), query)


async def shown(table: BankTable, found: Sequence[Found], bounds: Bounds) -> list[Hit]:
    """What is answered of what was found, which is in its order, best first."""
    if bounds.score_threshold is not None:
        found = [one for one in found if one.score >= bounds.score_threshold]
    found = found[: bounds.max_chunks]
    if bounds.neighbours and found:
        found = await _with_neighbours(table, found, bounds.neighbours)
    hits = [one.hit() for one in found]
    return hits if bounds.max_tokens is None else _within(hits, bounds.max_tokens)


def fuse(lists: Sequence[Sequence[Found]]) -> list[Found]:
    """One list of several by reciprocal rank fusion, of a document of two writings only with the later one's chunks."""
    latest: dict[str, int] = {}
    for one in chain.from_iterable(lists):
        latest[one.document_id] = max(one.written, latest.get(one.document_id, one.written))
    scores: dict[tuple[str, int], float] = {}
    chunks: dict[tuple[str, int], Found] = {}
    for ranked in lists:
        for rank, one in enumerate(ranked, start=1):
            if one.written == latest[one.document_id]:
                scores[one.key] = scores.get(one.key, 0.0) + 1 / (FUSION_K + rank)
                chunks[one.key] = one
    order = sorted(scores, key=lambda key: -scores[key])
    return [replace(chunks[key], score=scores[key]) for key in order]


async def _ranked(table: BankTable, query: Query, condition: Expr | None) -> list[Found]:
    match query.mode:
        case "vector":
            return await _by_vector(table, _vector(table, query), query.max_chunks, condition)
        case "keyword":
            return await _by_words(table, query.text, query.max_chunks, condition)
        case "hybrid":
            limit = max(query.max_chunks, FUSED)
            halves = (
                _by_vector(table, _vector(table, query), limit, condition),
                _by_words(table, query.text, limit, condition),
            )
            return fuse(await asyncio.gather(*halves))


async def _by_vector(table: BankTable, vector: NDArray[np.float32], limit: int, condition: Expr | None) -> list[Found]:
    def nearest() -> AsyncVectorQuery:
        query = table.rows.query().nearest_to(vector).distance_type("cosine")
        return query.minimum_nprobes(PROBES).maximum_nprobes(0).ef(max(CANDIDATES, 3 * limit // 2))

    return await _unexpired(nearest, DISTANCE, limit, condition)


async def _by_words(table: BankTable, text: str, limit: int, condition: Expr | None) -> list[Found]:
    def matching() -> AsyncFTSQuery:
        return table.rows.query().nearest_to_text(text, columns=["text"])

    return await _unexpired(matching, "_score", limit, condition)


async def _unexpired(
    query: Callable[[], AsyncVectorQuery | AsyncFTSQuery], score: str, limit: int, condition: Expr | None
) -> list[Found]:
    """The first of the rows that have not expired.

    The sweeper leaves few that have, and a condition on all rows takes longer than the search, so it is set only when
    one of the rows found turns out to have expired.
    """
    found = await _read(query(), score, limit, condition)
    now = arrow.microseconds(datetime.now(UTC))
    if all(one.expires_at > now for one in found):
        return found
    fresh = unexpired()
    return await _read(query(), score, limit, fresh if condition is None else condition & fresh)


async def _read(query: AsyncVectorQuery | AsyncFTSQuery, score: str, limit: int, condition: Expr | None) -> list[Found]:
    query = query.select([*CHUNK_COLUMNS, score]).limit(limit)
    table = await (query if condition is None else query.where(condition)).to_arrow()
    scores = table[score].to_pylist()
    return arrow.found(table, [1.0 - one for one in scores] if score == DISTANCE else scores)


async def _with_neighbours(table: BankTable, hits: Sequence[Found], count: int) -> list[Found]:
    """The hits, each among the chunks around it, which have its score; no chunk comes twice."""
    # The list of ids is what LanceDB looks up in the index of ids, which it does not do with the ids of `any_of`.
    documents = col("document_id").isin([lit(one.document_id) for one in hits])
    around = documents & filters.any_of([_around(one, count) for one in hits])
    read = await table.rows.query().where(around).select(list(CHUNK_COLUMNS)).to_arrow()
    chunks = {(one.key, one.written): one for one in arrow.found(read, repeat(0.0, read.num_rows))}
    shown: dict[tuple[str, int], Found] = {one.key: one for one in hits}
    placed: set[tuple[str, int]] = set()
    result: list[Found] = []
    for one in hits:
        document_id, position = one.key
        for key in ((document_id, near) for near in range(position - count, position + count + 1)):
            chunk = shown.get(key) or chunks.get((key, one.written))
            if chunk is not None and key not in placed:
                placed.add(key)
                result.append(chunk if key in shown else replace(chunk, score=one.score))
    return result


def _around(one: Found, count: int) -> Expr:
    document_id, position = one.key
    near = [lit(at) for at in range(max(0, position - count), position + count + 1)]
    return (col("document_id") == lit(document_id)) & col("position").isin(near)


def _vector(table: BankTable, query: Query) -> NDArray[np.float32]:
    if table.dimensions is None:
        raise BadInput("the bank has no vectors; allowed: a search by keyword", param="params.mode")
    shape = None if query.vector is None else query.vector.shape
    if query.vector is None or shape != (table.dimensions,):
        raise BadInput(
            f"the query's vector has the shape {shape}; allowed: the bank's, ({table.dimensions},)", param="query"
        )
    return query.vector


def _within(hits: Sequence[Hit], max_tokens: int) -> list[Hit]:
    """The hits before the first with which there would be too many tokens."""
    totals = accumulate(hit.chunk.tokens for hit in hits)
    return [hit for hit, total in zip(hits, totals, strict=True) if total <= max_tokens]
