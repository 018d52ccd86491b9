"""Ranges of bytes and entity tags, as RFC 9110 has them."""

import pytest

from serve_apps import ranges


@pytest.mark.parametrize(
    ("header", "size", "expected"),
    [
        ("bytes=0-0", 10, (0, 1)),
        ("bytes=0-9", 10, (0, 10)),
        ("bytes=2-4", 10, (2, 5)),
        ("bytes=9-", 10, (9, 10)),
        ("bytes=0-", 10, (0, 10)),
        ("bytes=5-99", 10, (5, 10)),
        ("bytes=5-" + "9" * 30, 10, (5, 10)),
        ("bytes=-3", 10, (7, 10)),
        ("bytes=-99", 10, (0, 10)),
        ("Bytes = 2 - 4", 10, (2, 5)),
    ],
)
def test_a_range_in_the_content(header: str, size: int, expected: tuple[int, int]) -> None:
    assert ranges.requested(header, size) == expected


@pytest.mark.parametrize(
    ("header", "size"), [("bytes=10-", 10), ("bytes=10-20", 10), ("bytes=-0", 10), ("bytes=0-", 0), ("bytes=-0", 0)]
)
def test_a_range_behind_the_content_is_empty(header: str, size: int) -> None:
    part = ranges.requested(header, size)
    assert part is not None
    assert part[0] == part[1]


@pytest.mark.parametrize(
    "header",
    [
        *(None, "", "bytes", "bytes=", "bytes=-", "bytes=a-b", "bytes=5-2", "bytes=1-2,4-5", "bytes=1-2-3"),
        *("lines=1-2", "bytes=--1", "bytes=+1-2", "bytes=1.5-2", "bytes=²-3", "bytes=" + "9" * 31 + "-", "1-2"),
    ],
)
def test_what_is_no_single_range_stands_for_all(header: str | None) -> None:
    assert ranges.requested(header, 10) is None


def test_the_end_of_nothing_is_all_of_it() -> None:
    assert ranges.requested("bytes=-5", 0) is None


@pytest.mark.parametrize("header", ['"a"', '"b", "a"', 'W/"a"', "*", ' "a" ,"c"'])
def test_a_tag_is_named(header: str) -> None:
    assert ranges.names(header, '"a"')


@pytest.mark.parametrize("header", [None, "", '"b"', "a", '"a', '"aa"', '"b", *'])
def test_a_tag_is_not_named(header: str | None) -> None:
    assert not ranges.names(header, '"a"')
