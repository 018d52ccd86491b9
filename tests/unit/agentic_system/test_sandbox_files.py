import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from stack.agentic_system import sandbox_files
from stack.agentic_system.sandbox_files import MAX_ENTRIES, Produced


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "in").mkdir()
    opened = os.open(tmp_path / "in", os.O_RDONLY | os.O_DIRECTORY)
    yield opened
    os.close(opened)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "in"


def produced(folder: int, most: int = 10, largest: int = 1_000, together: int = 5_000) -> Produced:
    return sandbox_files.produced(folder, {}, most, largest, together)


def test_what_is_new_or_changed_is_produced(folder: int, path: Path) -> None:
    sandbox_files.put(folder, "given.csv", b"a,b\n")
    (path / "old").write_bytes(b"old")
    before = sandbox_files.marks(folder)
    assert set(before) == {"given.csv", "old"}
    assert produced(folder).files == {"given.csv": b"a,b\n", "old": b"old"}
    (path / "old").write_bytes(b"new")
    os.utime(path / "old", ns=(1, 1))
    (path / "more" / "deep").mkdir(parents=True)
    (path / "more" / "deep" / "b").write_bytes(b"b")
    (path / "a").write_bytes(b"")
    found = sandbox_files.produced(folder, before, 10, 1_000, 5_000)
    assert found == Produced({"a": b"", "more/deep/b": b"b", "old": b"new"}, {})
    assert list(found.files) == sorted(found.files)


def test_a_file_that_is_put_can_be_written_by_others_and_follows_no_link(folder: int, path: Path) -> None:
    sandbox_files.put(folder, "f", b"content")
    assert (path / "f").stat().st_mode & 0o777 == 0o666
    (path / "link").symlink_to(path.parent / "outside")
    with pytest.raises(FileExistsError):
        sandbox_files.put(folder, "link", b"content")
    assert not (path.parent / "outside").exists()


def test_hidden_files_and_deep_ones_are_not_looked_at(folder: int, path: Path) -> None:
    for name in (".hidden/f", ".dot", "a/b/c/d"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"")
    assert produced(folder) == Produced({}, {})


def test_only_plain_files_with_one_name_are_read(folder: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path.parent / "secret").write_bytes(b"secret")
    (path.parent / "secrets").mkdir()
    (path.parent / "secrets" / "f").write_bytes(b"secret")
    (path / "link").symlink_to("../secret")
    (path / "absolute").symlink_to(path.parent / "secret")
    (path / "dangling").symlink_to("nowhere")
    (path / "folder").symlink_to("../secrets")
    (path / "loop").symlink_to("loop")
    (path.parent / "other").write_bytes(b"secret")
    (path / "hard").hardlink_to(path.parent / "other")
    os.mkfifo(path / "fifo")
    with socket.socket(socket.AF_UNIX) as unix:
        monkeypatch.chdir(path)  # a socket's path is short
        unix.bind("socket")
    found = produced(folder)
    assert found.files == {}
    assert set(found.left_out) == {"link", "absolute", "dangling", "folder", "loop", "hard", "fifo", "socket"}
    assert found.left_out["hard"] == found.left_out["fifo"] == "it is not a plain file with one name"


def test_devices_are_not_read() -> None:
    devices = os.open("/dev", os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = produced(devices, most=MAX_ENTRIES, largest=0)
        assert found.left_out["zero"] == found.left_out["null"] == "it is not a plain file with one name"
    finally:
        os.close(devices)


def test_numbers_and_sizes_have_bounds(folder: int, path: Path) -> None:
    for name, size in (("a", 10), ("b", 11), ("c", 10), ("d", 6), ("e", 5), ("f", 0)):
        (path / name).write_bytes(b"x" * size)
    found = produced(folder, most=3, largest=10, together=25)
    assert {name: len(content) for name, content in found.files.items()} == {"a": 10, "c": 10, "e": 5}
    assert found.left_out == {
        "b": "it has 11 bytes, of which there is room for 10",
        "d": "it has 6 bytes, of which there is room for 5",
        "f": "there are more than 3",
    }


def test_a_sparse_file_is_as_large_as_it_says(folder: int, path: Path) -> None:
    with open(path / "sparse", "wb") as file:
        file.truncate(2**40)
    assert set(produced(folder).left_out) == {"sparse"}


@pytest.mark.parametrize("name", [b"a\nb", b"\xff", b"\x1b[2J", "‮".encode(), b"x" * 201])
def test_names_that_cannot_be_told(folder: int, path: Path, name: bytes) -> None:
    with open(os.fsencode(path) + b"/" + name, "wb"):
        pass
    found = produced(folder)
    assert found.files == {}
    assert list(found.left_out.values()) == ["its name cannot be told"]


def test_so_many_entries_are_looked_at(folder: int, path: Path) -> None:
    for number in range(MAX_ENTRIES + 10):
        (path / str(number)).touch()
    found = produced(folder)
    assert len(found.files) == 10
    assert len(found.left_out) == MAX_ENTRIES - 10


def test_what_cannot_be_opened_is_left_out(folder: int, path: Path) -> None:
    (path / "f").touch()
    seen = sandbox_files.marks(folder)
    (path / "f").unlink()
    assert sandbox_files.produced(folder, seen, 10, 10, 10) == Produced({}, {})
