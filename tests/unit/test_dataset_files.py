"""The formats of data sets: what is read, what is refused, and how little memory both take."""

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from stack import dataset_files
from stack.api.datasets import TrainEvalDatasetColumnType as Type
from stack.dataset_files import Format, format_of, read
from stack.errors import BadInput, StackError, TooLarge
from tests.samples import DIALOG

MOST = 2**30
ROWS: list[dict[str, Any]] = [
    {"dialog": DIALOG, "text": 'a "b", c\nd', "number": 1.5, "json": {"a": [1, None]}, "media": "file:///ä.png"},
    {"dialog": DIALOG[1:], "text": "", "number": -7, "json": [], "media": "x"},
    {"dialog": [], "text": "𝄞", "number": 10**12, "json": "plain", "media": ""},
]
COLUMNS = {name: Type(name) for name in ROWS[0]}
X = {"x": Type.json}


def json_lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def json_array(rows: list[Any]) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def csv_text(rows: list[dict[str, Any]]) -> bytes:
    def cell(name: str, value: Any) -> str:
        text = json.dumps(value) if name in ("dialog", "json", "number") else value
        return '"' + text.replace('"', '""') + '"'

    lines = [",".join(rows[0]), *(",".join(cell(name, row[name]) for name in row) for row in rows)]
    return "\r\n".join(lines).encode() + b"\r\n"


def parquet_file(table: pyarrow.Table, **options: Any) -> bytes:
    into = io.BytesIO()
    parquet.write_table(table, into, **options)
    return into.getvalue()


def parquet_rows(rows: list[dict[str, Any]]) -> bytes:
    """The dialogs as lists of structs, the JSON as text."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    kinds = {"dialog": pyarrow.list_(message), "number": pyarrow.float64()}
    columns["json"] = [json.dumps(value) for value in columns["json"]]
    return parquet_file(pyarrow.table({name: pyarrow.array(part, kinds.get(name)) for name, part in columns.items()}))


def zstd(content: bytes) -> bytes:
    into = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(into, "zstd") as stream:
        stream.write(content)
    return bytes(into.getvalue())


def unpacked(content: bytes) -> bytes:
    return content


FORMATS: dict[str, Callable[[list[Any]], bytes]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_array,
    ".csv": csv_text,
    ".parquet": parquet_rows,
}
PACKERS = {"": unpacked, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def read_bytes(
    folder: Path, name: str, content: bytes, columns: dict[str, Type] = X, most: int = MOST
) -> list[tuple[int, dict[str, Any] | str]]:
    file = folder / name
    file.write_bytes(content)
    with file.open("rb") as stream:
        return list(read(stream, format_of(name), columns, most))


def refused(folder: Path, name: str, content: bytes, columns: dict[str, Type] = X, most: int = MOST) -> StackError:
    with pytest.raises((BadInput, TooLarge)) as caught:
        read_bytes(folder, name, content, columns, most)
    return caught.value


# What is read


@pytest.mark.parametrize(
    ("suffix", "packing"),
    [(suffix, packing) for suffix in FORMATS for packing in PACKERS if suffix != ".parquet" or not packing],
)
def test_rows_are_the_same_in_every_format(tmp_path: Path, suffix: str, packing: str) -> None:
    content = PACKERS[packing](FORMATS[suffix](ROWS))
    assert read_bytes(tmp_path, f"rows{suffix}{packing}", content, COLUMNS) == list(enumerate(ROWS, start=1))


@pytest.mark.parametrize("suffix", FORMATS)
def test_only_declared_columns_are_read(tmp_path: Path, suffix: str) -> None:
    found = read_bytes(tmp_path, f"rows{suffix}", FORMATS[suffix](ROWS), {"media": Type.media, "text": Type.text})
    assert found == [(number, {"media": row["media"], "text": row["text"]}) for number, row in enumerate(ROWS, start=1)]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_declared_column_that_is_not_there_is_named_with_what_there_is(tmp_path: Path, suffix: str) -> None:
    columns = {"text": Type.text, "answer": Type.text}
    words = "lacks the declared column 'answer'; it has: dialog, text, number, json, media"
    if suffix in (".csv", ".parquet"):
        assert words in refused(tmp_path, f"rows{suffix}", FORMATS[suffix](ROWS), columns).message
    else:
        found = read_bytes(tmp_path, f"rows{suffix}", FORMATS[suffix](ROWS), columns)
        assert found == [(number, f"row {number} {words}") for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "kind", "compression"),
    [
        ("a.jsonl", "JSON Lines", None),
        ("A.JSONL.GZ", "JSON Lines", ".gz"),
        ("a.b.json.zst", "JSON", ".zst"),
        ("a.parquet", "Parquet", None),
        (".csv.bz2", "CSV", ".bz2"),
    ],
)
def test_a_format_is_told_by_the_name(name: str, kind: str, compression: str | None) -> None:
    if name.startswith("."):
        name = "a" + name
    assert format_of(name) == Format(kind, compression)


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"x": 1}\n{"x": 2}\n',
        b'{"x": 1}\r\n{"x": 2}\r\n',
        b'{"x": 1}\n{"x": 2}',
        b'  {"x": 1}  \n\t{"x": 2}\n',
    ],
    ids=["with a mark", "of Windows", "without a last end", "with blanks"],
)
def test_json_lines_of_other_editors_are_read(tmp_path: Path, content: bytes) -> None:
    assert read_bytes(tmp_path, "a.jsonl", content) == [(1, {"x": 1}), (2, {"x": 2})]


@pytest.mark.parametrize(
    "content",
    [b'[{"x":1},{"x":2}]', b' \n[ {"x": 1}\n,\n{"x": 2} ]\n ', b'\xef\xbb\xbf[{"x":1},{"x":2}]'],
    ids=["dense", "airy", "with a mark"],
)
def test_json_is_read_however_it_is_written(tmp_path: Path, content: bytes) -> None:
    assert read_bytes(tmp_path, "a.json", content) == [(1, {"x": 1}), (2, {"x": 2})]


def test_an_empty_array_has_no_rows(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, "a.json", b"[ ]") == []


@pytest.mark.parametrize("size", [65_000, 65_520, 65_536, 200_000, 1_000_000])
def test_json_rows_may_lie_across_blocks(tmp_path: Path, size: int) -> None:
    rows = [{"x": "ä" * size}, {"x": 1}, {"x": "b" * size}, {"x": '\\"'}]
    assert read_bytes(tmp_path, "a.json", json_array(rows)) == list(enumerate(rows, start=1))


@pytest.mark.parametrize(
    ("text", "value"),
    [("5", 5), ("-0.5", -0.5), ("1e3", 1000.0), (" 7 ", 7), ("+2", 2), ("", ""), ("1_000", "1_000"), ("five", "five")],
)
def test_numbers_in_csv_are_numbers(tmp_path: Path, text: str, value: Any) -> None:
    found = read_bytes(tmp_path, "a.csv", f"y,x\n1,{text}\n".encode(), {"x": Type.number})
    assert found == [(1, {"x": value})]
    assert type(found[0][1]["x"]) is type(value)  # type: ignore[index]


def test_texts_in_csv_stay_texts(tmp_path: Path) -> None:
    found = read_bytes(tmp_path, "a.csv", b'x\n007\n"a\nb"\n\n1.50\n', {"x": Type.text})
    assert found == [(1, {"x": "007"}), (2, {"x": "a\nb"}), (3, {"x": "1.50"})]


def test_parquet_types_that_json_lacks_become_texts_and_numbers(tmp_path: Path) -> None:
    import datetime

    when = datetime.datetime(2024, 5, 1, 12, 30)
    columns = {
        "day": pyarrow.array([when.date()]),
        "nanoseconds": pyarrow.array([when], pyarrow.timestamp("ns")),
        "decimal": pyarrow.array([Decimal("1.50")]),
        "nan": pyarrow.array([float("nan")]),
        "map": pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "category": pyarrow.array(["b"]).dictionary_encode(),
        "large": pyarrow.array(["c"], pyarrow.large_string()),
        "struct": pyarrow.array([{"a": None, "b": [None, {"c": None}]}]),
        "null": pyarrow.nulls(1),
        "a.b": pyarrow.array([True]),
    }
    found = read_bytes(tmp_path, "a.parquet", parquet_file(pyarrow.table(columns)), dict.fromkeys(columns, Type.text))
    assert found == [
        (
            1,
            {
                "day": "2024-05-01",
                "nanoseconds": "2024-05-01T12:30:00",
                "decimal": 1.5,
                "nan": None,
                "map": [["a", 1]],
                "category": "b",
                "large": "c",
                "struct": {"b": [None, {}]},
                "null": None,
                "a.b": True,
            },
        )
    ]


# What is refused


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", "is not JSON"),
        (b"nonsense", "is not JSON"),
        (b'{"x": NaN}', "is not JSON"),
        (b'{"x": "\\ud83d"}', "is not JSON"),
        (b'{"x": "\xff"}', "is not JSON"),
        (b'{"x": 1} {"x": 2}', "is not JSON"),
        (b'{"x": ' + b"[" * 300 + b"]" * 300 + b"}", "recursion limit"),
        (b"5", "is not a JSON object"),
        (b"[]", "is not a JSON object"),
    ],
    ids=range(9),
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_bad_json_is_named_by_its_row(tmp_path: Path, suffix: str, line: bytes, words: str) -> None:
    lines = [b'{"x": 1}', line, b'{"x": 3}']
    content = b"\n".join(lines) if suffix == ".jsonl" else b"[" + b",".join(lines) + b"]"
    if suffix == ".json" and line in (b'{"x": "\xff"}', b'{"x": 1} {"x": 2}'):
        assert refused(tmp_path, "a.json", content).message
        return
    found = read_bytes(tmp_path, f"a{suffix}", content)
    assert found[0] == (1, {"x": 1})
    assert isinstance(found[1][1], str)
    assert found[1][1].startswith("row 2 is not ")
    assert words in found[1][1]
    if suffix == ".jsonl":
        assert found[2] == (3, {"x": 3})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a JSON array"),
        (b'{"x": 1}\n{"x": 2}\n', "JSON Lines, named .jsonl"),
        (b'[{"x": 1} {"x": 2}]', "after row 1 the file goes on with '{'"),
        (b'[{"x": 1}] x', "after its array the file goes on with 'x'"),
        (b'[{"x": 1}', "after row 1 the file goes on with ''"),
        (b'[{"x": "\xff"}]', "is not UTF-8"),
        ("[]".encode("utf-16"), "is not UTF-8"),
    ],
    ids=range(7),
)
def test_what_is_no_array_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    assert words in refused(tmp_path, "a.json", content).message


@pytest.mark.parametrize("content", [b'[{"x": 1},]', b'[{"x": 1}, {"x": ', b"[,]", b'["x'])
def test_an_array_that_breaks_off_names_the_row(tmp_path: Path, content: bytes) -> None:
    last = read_bytes(tmp_path, "a.json", content)[-1]
    assert isinstance(last[1], str)
    assert last[1].startswith(f"row {last[0]} is not JSON")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "lacks the declared column 'x'"),
        (b"\n\n", "lacks the declared column 'x'"),
        (b"x,x\n1,2\n", "has twice the declared column 'x'"),
        (b'"x\n1\n', "the header is not CSV"),
        (b"\x1f\x8b\x08\x00", "not UTF-8"),
        (b"x\n1\n\xff\n", "row 2 is not UTF-8"),
    ],
    ids=range(6),
)
def test_a_csv_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    assert words in refused(tmp_path, "a.csv", content).message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"1", "row 2 has 1 cells, where the header has 2"),
        (b"1,2,3", "row 2 has 3 cells, where the header has 2"),
        (b'"a"b,2', "row 2 is not CSV"),
        (b"{,2", "row 2: the column 'x' is declared as json, but is not JSON"),
    ],
)
def test_bad_rows_of_csv_are_named_and_the_next_ones_read(tmp_path: Path, line: bytes, words: str) -> None:
    found = read_bytes(tmp_path, "a.csv", b"x,y\n1,2\n" + line + b"\n3,4\n")
    assert [found[0], found[2]] == [(1, {"x": 1}), (3, {"x": 3})]
    assert words in str(found[1][1])


@pytest.mark.parametrize(
    ("packing", "fault"),
    [
        *((packing, fault) for packing in (".gz", ".bz2", ".xz", ".zst") for fault in ("another kind", "cut off")),
        *(
            (packing, "flipped") for packing in (".gz", ".bz2", ".xz")
        ),  # zstd has no check sum unless it is asked for one
    ],
)
def test_packed_files_that_are_not_whole_are_refused(tmp_path: Path, packing: str, fault: str) -> None:
    content = PACKERS[packing](json_lines([{"x": os.urandom(1_000).hex()} for _ in range(200)]))
    if fault == "another kind":
        content = json_lines([{"x": 1}])
    elif fault == "cut off":
        content = content[: len(content) // 2]
    else:
        content = content[:5_000] + bytes([content[5_000] ^ 1]) + content[5_001:]
    message = refused(tmp_path, f"a.jsonl{packing}", content).message
    assert f"not whole, or not compressed as {packing}" in message


def test_rows_and_columns_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_files, "MAX_ROW_BYTES", 100_000)
    monkeypatch.setattr(dataset_files, "MAX_COLUMNS", 20)
    long = "y" * 200_000
    row, words = {"x": long}, "has more than 100000 bytes"
    assert f"row 2 {words}" in refused(tmp_path, "a.jsonl", json_lines([{"x": 1}, row])).message
    assert f"row 2 {words}" in refused(tmp_path, "b.json", json_array([{"x": 1}, row])).message
    assert f"line 2 {words}" in refused(tmp_path, "c.csv", f"x\n{long}\n".encode()).message
    assert f"row 1 {words}" in refused(tmp_path, "c.csv", b'x\n"' + b"y\n" * 100_000 + b'"\n').message
    assert f"row 1 {words}" in refused(tmp_path, "d.parquet", parquet_file(pyarrow.table({"x": [long]}))).message
    wide = {f"c{number}": 1 for number in range(30)} | {"x": 1}
    assert "row 1 has 31 columns; allowed: 20" in str(read_bytes(tmp_path, "a.jsonl", json_lines([wide])))
    assert "the file has 31 columns; allowed: 20" in refused(tmp_path, "c.csv", ",".join(wide).encode()).message
    table = pyarrow.table({name: [1] for name in wide})
    assert "the file has 31 columns; allowed: 20" in refused(tmp_path, "d.parquet", parquet_file(table)).message


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.binary(4),
        pyarrow.list_(pyarrow.binary()),
        pyarrow.struct([("a", pyarrow.map_(pyarrow.string(), pyarrow.binary()))]),
        pyarrow.duration("s"),
    ],
    ids=str,
)
def test_parquet_types_that_no_row_holds_are_refused_if_they_are_declared(tmp_path: Path, kind: Any) -> None:
    content = parquet_file(pyarrow.table({"x": pyarrow.nulls(2, kind), "y": [1, 2]}))
    message = refused(tmp_path, "a.parquet", content).message
    assert message.startswith("the column 'x' is of Parquet's type ")
    assert "allowed: null, booleans, numbers, texts" in message
    assert read_bytes(tmp_path, "a.parquet", content, {"y": Type.number}) == [(1, {"y": 1}), (2, {"y": 2})]


@pytest.mark.parametrize(
    "fault", ["empty", "text", "no footer", "long footer", "bad footer", "cut", "flipped", "zeros"]
)
def test_a_broken_parquet_file_is_refused(tmp_path: Path, fault: str) -> None:
    whole = parquet_file(pyarrow.table({"x": [f"text {number}" for number in range(5_000)]}))
    content = {
        "empty": b"",
        "text": b"PAR1 and so on PAR1"[:4] * 5,
        "no footer": whole[:-8],
        "long footer": whole[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1",
        "bad footer": whole[:-300] + os.urandom(292) + whole[-8:],
        "cut": whole[:4] + whole[2_000:],
        "flipped": whole[:200] + bytes(byte ^ 255 for byte in whole[200:400]) + whole[400:],
        "zeros": whole[:100] + bytes(len(whole) - 1_000) + whole[-900:],
    }[fault]
    error = refused(tmp_path, "a.parquet", content)
    assert isinstance(error, BadInput)
    assert len(error.message) < 500


# Bombs


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, packing: str) -> None:
    content = PACKERS[packing](b'{"x": 1}\n' * 200_000)
    assert len(content) < 10_000
    error = refused(tmp_path, f"a.jsonl{packing}", content, most=1_000_000)
    assert isinstance(error, TooLarge)
    assert error.message == "the content has more than 1000000 bytes when it is unpacked"


def test_an_xz_file_that_needs_more_memory_than_allowed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = lzma.compress(b'{"x": 1}\n', preset=9)
    assert read_bytes(tmp_path, "a.jsonl.xz", content) == [(1, {"x": 1})]
    monkeypatch.setattr(dataset_files, "XZ_MEMORY", 32 * 2**20)
    assert "Memory usage limit exceeded" in refused(tmp_path, "a.jsonl.xz", content).message


@pytest.mark.parametrize("more", [b"x", lzma.compress(b"x")], ids=["anything", "another one"])
def test_an_xz_file_ends_where_its_content_does(tmp_path: Path, more: bytes) -> None:
    assert "goes on after its end" in refused(tmp_path, "a.jsonl.xz", lzma.compress(b'{"x": 1}\n') + more).message


def test_a_parquet_file_that_declares_too_much_is_refused_before_it_is_read(tmp_path: Path) -> None:
    rows = parquet_file(pyarrow.table({"x": pyarrow.nulls(10_000_000, pyarrow.int8())}))
    assert len(rows) < 50_000
    error = refused(tmp_path, "a.parquet", rows, most=1_000_000)
    assert isinstance(error, TooLarge)
    assert error.message == "the Parquet file declares 10000000 rows; allowed: 500000"
    texts = parquet_file(pyarrow.table({"x": ["y" * 10_000_000]}), compression="zstd")
    assert len(texts) < 100_000
    assert (
        "bytes when it is unpacked; allowed: 1000000" in refused(tmp_path, "a.parquet", texts, most=1_000_000).message
    )
    values = parquet_file(pyarrow.table({"x": [[None] * 3_000_000]}))
    assert "declares 3000000 values" in refused(tmp_path, "a.parquet", values, most=1_000_000).message


def test_a_text_that_a_parquet_file_repeats_is_bounded_by_what_comes_out(tmp_path: Path) -> None:
    """A megabyte, stored once, a hundred thousand times: 100 GB."""
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100_000, pyarrow.int32()), ["y" * 1_000_000])
    content = parquet_file(pyarrow.table({"x": column}))
    assert len(content) < 1_000_000
    error = refused(tmp_path, "a.parquet", content, {"x": Type.text}, most=20_000_000)
    assert isinstance(error, TooLarge)
    assert "more than 20000000 bytes" in error.message


def test_a_parquet_file_that_needs_more_memory_than_there_is_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_files, "PARQUET_MEMORY", 600 * 2**20)
    # Without what takes the writer alone long: a dictionary of this one value, and the least and the greatest.
    plain: dict[str, Any] = dict(use_dictionary=False, write_statistics=False)
    content = parquet_file(pyarrow.table({"x": ["y" * 900_000_000]}), compression="zstd", **plain)
    assert len(content) < 1_000_000
    assert "within 629145600 bytes of memory" in refused(tmp_path, "a.parquet", content).message


def test_the_reader_of_parquet_ends_when_nobody_reads_on(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(parquet_file(pyarrow.table({"x": list(range(300_000))})))
    with file.open("rb") as stream:
        rows = read(stream, format_of("a.parquet"), X, MOST)
        assert next(rows) == (1, {"x": 0})
        rows.close()  # type: ignore[attr-defined]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [child for child in children if "parquet_rows" in Path(f"/proc/{child}/cmdline").read_text()]


MEASURE = """
import resource, sys
from stack.api.datasets import TrainEvalDatasetColumnType as Type
from stack.dataset_files import format_of, read
from stack.errors import StackError
name, room = sys.argv[1], int(sys.argv[2])
def memory():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (memory() + room, resource.RLIM_INFINITY))
count = 0
try:
    with open(name, "rb") as file:
        for count, row in read(file, format_of(name), {"x": Type.text}, 2**40):
            assert isinstance(row, dict), row
except StackError as error:
    print(error.message)
print(count)
"""


def measured(file: Path, room: int) -> list[str]:
    """What reading a file prints, in a process that has only so much memory more than at its start."""
    command = [sys.executable, "-c", MEASURE, str(file), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    return done.stdout.splitlines()


def big(suffix: str, folder: Path) -> tuple[Path, int]:
    """A file of 150 MB or more, as it is unpacked, and its rows."""
    row, count = {"x": "y" * 1_000, "more": 1}, 150_000
    file = folder / f"big{suffix}"
    with gzip.open(file, "wb", 1) if suffix.endswith(".gz") else file.open("wb") as stream:
        if ".json" in suffix:
            line = json.dumps(row).encode()
            first, between, last = (b"[", b",\n", b"]") if suffix == ".json" else (b"", b"\n", b"\n")
            stream.write(first + line)
            for _ in range(count - 1):
                stream.write(between + line)
            stream.write(last)
        elif ".csv" in suffix:
            stream.write(b"more,x\n" + f"1,{row['x']}\n".encode() * count)
        else:
            parquet.write_table(pyarrow.table({"x": [f"{n}{row['x']}" for n in range(count)]}), stream)
    return file, count


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz"])
def test_a_large_file_is_read_in_little_memory(tmp_path: Path, suffix: str) -> None:
    file, count = big(suffix, tmp_path)
    assert measured(file, 64 * 2**20) == [str(count)]


@pytest.mark.parametrize(
    ("name", "start", "words"),
    [
        ("a.csv", b"x\n", "line 2 has more than"),
        ("a.csv", b"", "line 1 has more than"),
        ("a.jsonl", b'{"x": "', "row 1 has more than"),
        ("a.json", b'[{"x": "', "row 1 has more than"),
        ("a.json", b"", "is not a JSON array"),
    ],
    ids=range(5),
)
def test_a_row_of_a_gigabyte_is_refused_in_little_memory(tmp_path: Path, name: str, start: bytes, words: str) -> None:
    file = tmp_path / name
    with file.open("wb") as stream:
        stream.write(start + b"y" * 64 * 2**20)
        stream.truncate(2**30)  # the rest is a hole, of zeros
    assert words in measured(file, 256 * 2**20)[0]


def test_a_million_columns_are_refused_in_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(",".join("c" for _ in range(1_000_000)) + "\n")
    assert measured(file, 256 * 2**20)[0] == "the file has 1000000 columns; allowed: 10000"


@pytest.mark.parametrize("suffix", PACKERS)
def test_the_file_stays_open_behind_its_rows(tmp_path: Path, suffix: str) -> None:
    """Its size and its hash are asked for after them."""
    file = tmp_path / f"rows.jsonl{suffix}"
    file.write_bytes(PACKERS[suffix](b'{"a": 1}\n' * 3))
    with file.open("rb") as stream:
        assert len(list(read(stream, format_of(file.name), {"a": Type.json}, 10**6))) == 3
        stream.seek(0)
        assert stream.read() == file.read_bytes()


def test_a_file_of_nothing_but_empty_lines_is_not_read_for_ever(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b"a\n1\n" + b"\n" * (dataset_files.MAX_EMPTY_LINES + 1))
    with file.open("rb") as stream, pytest.raises(BadInput, match="empty lines"):
        list(read(stream, format_of(file.name), {"a": Type.text}, 10**9))


def test_rows_are_bounded_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_files, "MAX_ROWS", 10)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n' * 11)
    with file.open("rb") as stream, pytest.raises(TooLarge, match="more than 10 rows"):
        list(read(stream, format_of(file.name), {"a": Type.json}, 10**6))
