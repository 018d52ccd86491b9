"""Filters on metadata as expressions of LanceDB, and metadata as the columns that they ask.

Each key of metadata has a column of its own, named by a hash of the key: a query reads the columns that it asks and no
other. The values of all types are in it as texts that sort as the values do, so that one comparison of texts is right
for each type and never true across types. A filter holds or does not, as in a program: where a key is missing, `ne`,
`nin` and `not` hold, and the others do not.

Keys and values of clients become literals and hashes, never parts of a text that LanceDB parses. (LanceDB 0.40 takes
from `lancedb.expr` neither its functions on JSON and lists nor IS NULL, hence the columns, and hence `concat`, which
takes NULL for an empty text.)
"""

import hashlib
import math
import struct
from collections.abc import Callable, Collection, Mapping
from functools import reduce
from operator import and_, or_

from lancedb.expr import Expr, col, func, lit
from pydantic import JsonValue

from stack.api.filters import AnyFilter, Combination, Equality, Existence, Membership, Negation, Order

PREFIX = "metadata_"
_MISSING = ""
_OTHER = "j"  # there, but nothing to compare with: null, a list or an object
_Compare = Callable[[Expr, Expr], Expr]
_ORDERS: dict[str, _Compare] = {
    "gt": lambda left, right: left > right,
    "gte": lambda left, right: left >= right,
    "lt": lambda left, right: left < right,
    "lte": lambda left, right: left <= right,
}


def expression(asked: AnyFilter, columns: Collection[str]) -> Expr:
    """The filter as an expression over a table with these columns. A key without a column is missing everywhere."""
    match asked:
        case Combination():
            return reduce(and_ if asked.type == "and" else or_, (expression(part, columns) for part in asked.filters))
        case Negation():
            return ~expression(asked.filter, columns)
    name = column(asked.key)
    value = func("concat", col(name), lit("")) if name in columns else lit(_MISSING)
    match asked:
        case Equality():
            return (value == lit(encoded(asked.value))) if asked.type == "eq" else (value != lit(encoded(asked.value)))
        case Membership():
            among = value.isin([lit(encoded(one)) for one in asked.value]) if asked.value else lit(False)
            return among if asked.type == "in" else ~among
        case Order():
            bound = encoded(asked.value)
            return _ORDERS[asked.type](value, lit(bound)) & _of_type(value, bound[0])
        case Existence():
            return value != lit(_MISSING)


def column(key: str) -> str:
    """The name of the column of a key."""
    return PREFIX + hashlib.sha256(key.encode()).hexdigest()[:32]


def values(metadata: Mapping[str, JsonValue]) -> dict[str, str]:
    """What the columns of metadata hold, by the names of the columns."""
    return {column(key): encoded(value) for key, value in metadata.items()}


def encoded(value: JsonValue) -> str:
    """A value as a text that sorts, by characters' numbers, among others of its type as the values do.

    Numbers are compared as floats of 64 bits: their bits in hex, with the sign bit turned for those from zero on, and
    all bits for those below.
    """
    match value:
        case bool():
            return f"b{int(value)}"
        case int() | float():
            bits: int = struct.unpack(">Q", struct.pack(">d", _float(value) + 0.0))[0]  # + 0.0 makes -0.0 zero
            return f"n{bits ^ (2**64 - 1 if bits >> 63 else 1 << 63):016x}"
        case str():
            return f"s{value}"
        case _:
            return _OTHER


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)


def _of_type(value: Expr, letter: str) -> Expr:
    return (value >= lit(letter)) & (value < lit(chr(ord(letter) + 1)))
