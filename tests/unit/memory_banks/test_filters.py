from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from stack.api.filters import Filter
from stack.api.wire import describe
from stack.memory_banks.filters import encoded
from stack.memory_banks.keyvalue import by_prefix
from stack.memory_banks.search import Bounds
from stack.memory_banks.table import Words
from tests.unit.memory_banks.documents import BankTable, document

FILTER = TypeAdapter(Filter)
QUOTES = "x' OR '1' = '1"
ODD_KEY = 'a.b` = 1) OR (1 = 1 -- "é\n'
ROWS: dict[str, dict[str, Any]] = {
    "2019": {"year": 2019, "tag": "red", "open": True},
    "2020": {"year": 2020, "tag": "green", "open": False},
    "below": {"year": -3.5, "tag": QUOTES},
    "text": {"year": "2019", "tag": "日本", ODD_KEY: "é🙂"},
    "other": {"year": None, "list": [1, 2]},
    "bare": {},
}


@pytest.fixture
async def bank(tmp_path: Path) -> BankTable:
    table = await BankTable.create(str(tmp_path), None, Words())
    # The bare one comes first: its row is older than the columns that the others bring.
    await table.write([document("bare", "words", dimensions=None)], replace=False)
    others = [document(id_, "words", metadata=row, dimensions=None) for id_, row in ROWS.items() if id_ != "bare"]
    await table.write(others, replace=False)
    return table


async def those(bank: BankTable, asked: dict[str, Any]) -> set[str]:
    return {
        hit.document_id
        for hit in await by_prefix(bank, "", Bounds(max_chunks=100, filter=FILTER.validate_python(asked)))
    }


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"type": "eq", "key": "year", "value": 2019}, {"2019"}),
        ({"type": "eq", "key": "year", "value": 2019.0}, {"2019"}),
        ({"type": "eq", "key": "year", "value": "2019"}, {"text"}),
        ({"type": "ne", "key": "year", "value": 2019}, set(ROWS) - {"2019"}),
        ({"type": "gt", "key": "year", "value": 2019}, {"2020"}),
        ({"type": "gte", "key": "year", "value": 2019}, {"2019", "2020"}),
        ({"type": "lt", "key": "year", "value": 2019}, {"below"}),
        ({"type": "lte", "key": "year", "value": -3.5}, {"below"}),
        ({"type": "gte", "key": "year", "value": "2"}, {"text"}),
        ({"type": "lt", "key": "tag", "value": "h"}, {"2020"}),
        ({"type": "eq", "key": "open", "value": True}, {"2019"}),
        ({"type": "eq", "key": "open", "value": 1}, set()),
        ({"type": "in", "key": "tag", "value": ["red", "日本", 7]}, {"2019", "text"}),
        ({"type": "in", "key": "tag", "value": []}, set()),
        ({"type": "nin", "key": "tag", "value": ["red"]}, set(ROWS) - {"2019"}),
        ({"type": "nin", "key": "tag", "value": []}, set(ROWS)),
        ({"type": "exists", "key": "year"}, set(ROWS) - {"bare"}),
        ({"type": "exists", "key": "list"}, {"other"}),
        ({"type": "not", "filter": {"type": "exists", "key": "tag"}}, {"other", "bare"}),
        ({"type": "not", "filter": {"type": "gt", "key": "year", "value": 2019}}, set(ROWS) - {"2020"}),
        (
            {
                "type": "or",
                "filters": [
                    {"type": "eq", "key": "tag", "value": "green"},
                    {
                        "type": "and",
                        "filters": [
                            {"type": "exists", "key": "open"},
                            {"type": "not", "filter": {"type": "eq", "key": "open", "value": False}},
                        ],
                    },
                ],
            },
            {"2019", "2020"},
        ),
    ],
)
async def test_a_filter_finds_what_it_says(bank: BankTable, asked: dict[str, Any], expected: set[str]) -> None:
    assert await those(bank, asked) == expected


async def test_what_looks_like_sql_is_only_a_value(bank: BankTable) -> None:
    assert await those(bank, {"type": "eq", "key": "tag", "value": QUOTES}) == {"below"}
    assert await those(bank, {"type": "eq", "key": "tag", "value": "' OR 1=1 --"}) == set()
    assert await those(bank, {"type": "in", "key": "tag", "value": ["') OR (1=1", "\\', 'red"]}) == set()
    assert await those(bank, {"type": "gt", "key": "tag", "value": "~' OR true OR '"}) == {"text"}


async def test_what_looks_like_sql_is_only_a_key(bank: BankTable) -> None:
    assert await those(bank, {"type": "eq", "key": ODD_KEY, "value": "é🙂"}) == {"text"}
    for key in ("1=1) OR (true", "document_id", "expires_at", "`", "tag' OR '1'='1", "year`"):
        assert await those(bank, {"type": "exists", "key": key}) == set(), key
    assert await those(bank, {"type": "ne", "key": "no such key", "value": 1}) == set(ROWS)


async def test_a_filter_as_large_as_may_be_is_answered(bank: BankTable) -> None:
    asked: dict[str, Any] = {
        "type": "or",
        "filters": [{"type": "eq", "key": f"k{at}", "value": "v" * 1_300} for at in range(197)]
        + [{"type": "in", "key": "year", "value": [2019, *range(10_000, 10_999)]}]
        + [{"type": "in", "key": "year", "value": list(range(20_000, 20_803))}],
    }
    assert await those(bank, asked) == {"2019"}
    asked = {"type": "eq", "key": "year", "value": 2019}
    for _level in range(8):
        asked = {"type": "not", "filter": asked}
    assert await those(bank, asked) == {"2019"}


def test_encoded_values_sort_as_the_values_do() -> None:
    numbers = [-1e308, -(2**60), -2.5, -1, -1e-300, 0, 5e-324, 0.1, 1, 1.5, 2, 10, 2**53, 1e308, 10**400]
    texts = ["", "A", "a", "aa", "b", "é", "日", "🙂"]
    for values in (numbers, texts, [False, True]):
        assert sorted(values, key=encoded) == values
    assert encoded(-0.0) == encoded(0)
    assert encoded(1) == encoded(1.0) != encoded(True)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"type": "like", "key": "a", "value": "x"}, "type is 'like'; allowed: 'eq'"),
        ({"type": "eq", "key": "a", "value": "x", "sql": "1"}, "unknown key 'sql'"),
        ({"type": "eq", "key": "a", "value": None}, "is None; allowed: a text, a number, true or false"),
        ({"type": "eq", "key": "a", "value": float("nan")}, "is nan; allowed: a number"),
        ({"type": "eq", "key": "a", "value": 10**400}, "allowed: a number that a float of 64 bits can be"),
        ({"type": "eq", "key": "a", "value": "\ud800"}, "half of a character"),
        ({"type": "eq", "key": "a", "value": "a" * 4_001}, "has 4001 characters; allowed: at most 4000"),
        ({"type": "gt", "key": "a", "value": True}, "is True; allowed: a text or a number"),
        ({"type": "in", "key": "a", "value": [1] * 1_001}, "has 1001 entries; allowed: at most 1000"),
        ({"type": "and", "filters": []}, "at least 1 item"),
        ({"type": "eq", "key": "", "value": 1}, "at least 1 character"),
        ({"type": "eq", "key": "a\0", "value": 1}, "NUL"),
        ({"type": "or", "filters": [{"type": "exists", "key": "a"}] * 200}, "more than 200 parts"),
        ({"type": "or", "filters": [{"type": "in", "key": "a", "value": [1] * 667}] * 3}, "more than 2000 values"),
        ({"type": "or", "filters": [{"type": "in", "key": "a", "value": ["a" * 4_000] * 33}] * 2}, "262144 characters"),
    ],
)
def test_a_wrong_filter_is_refused_by_name(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as failed:
        FILTER.validate_python(asked)
    assert told in describe(failed.value).replace("'type' is", "type is")


def test_a_filter_that_is_too_deep_is_refused_before_it_is_looked_at() -> None:
    asked: dict[str, Any] = {"type": "exists", "key": "a"}
    for _level in range(100_000):
        asked = {"type": "not", "filter": asked}
    with pytest.raises(ValidationError, match="nested deeper than 10 levels"):
        FILTER.validate_python(asked)


async def test_what_has_expired_is_in_no_filter(tmp_path: Path) -> None:
    bank = await BankTable.create(str(tmp_path), None, Words())
    past = datetime.now(UTC) - timedelta(seconds=1)
    await bank.write([document("old", metadata={"a": 1}, expires_at=past, dimensions=None)], replace=False)
    assert await those(bank, {"type": "exists", "key": "a"}) == set()
    assert await those(bank, {"type": "not", "filter": {"type": "exists", "key": "b"}}) == set()
