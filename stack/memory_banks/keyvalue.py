"""What is read of a bank by keys, which are the ids of its documents: exactly these, or all that begin alike."""

from collections.abc import Sequence
from itertools import repeat

from lancedb.expr import Expr, col, lit
from lancedb.query import ColumnOrdering

from stack.memory_banks import arrow, filters
from stack.memory_banks.arrow import CHUNK_COLUMNS
from stack.memory_banks.rows import Hit
from stack.memory_banks.search import Bounds, shown
from stack.memory_banks.table import BankTable, unexpired

_LAST = 0x10FFFF
_SURROGATES = range(0xD800, 0xE000)


async def by_keys(table: BankTable, keys: Sequence[str], bounds: Bounds) -> list[Hit]:
    """The chunks of the documents with these ids, by id and position. Their score is 1."""
    if not keys:
        return []
    return await _read(table, col("document_id").isin([lit(key) for key in keys]), bounds)


async def by_prefix(table: BankTable, prefix: str, bounds: Bounds) -> list[Hit]:
    """The chunks of the documents whose ids begin with a prefix, by id and position. Their score is 1."""
    end = after(prefix)
    begin = col("document_id") >= lit(prefix)
    return await _read(table, begin if end is None else begin & (col("document_id") < lit(end)), bounds)


def after(prefix: str) -> str | None:
    """The first text that sorts after all that begin with the prefix; None where there is none."""
    kept = prefix.rstrip(chr(_LAST))
    if not kept:
        return None
    following = ord(kept[-1]) + 1
    return kept[:-1] + chr(_SURROGATES.stop if following in _SURROGATES else following)


async def _read(table: BankTable, keys: Expr, bounds: Bounds) -> list[Hit]:
    asked = keys & (col("position") >= lit(0)) & unexpired()
    if bounds.filter is not None:
        asked &= filters.expression(bounds.filter, await table.columns())
    order = [ColumnOrdering(column_name=name) for name in ("document_id", "position")]
    query = table.rows.query().where(asked).select(list(CHUNK_COLUMNS)).order_by(order).limit(bounds.max_chunks)
    read = await query.to_arrow()
    return await shown(table, arrow.found(read, repeat(1.0, read.num_rows)), bounds)
