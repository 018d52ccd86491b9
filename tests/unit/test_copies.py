"""Copies of remote artifacts: bounded by bytes, without taking them from those who have just asked."""

import os
import time
from pathlib import Path

import pytest

from stack import copies
from stack.copies import LATELY_S


def copy(cache: Path, name: str, size: int, asked_ago: float) -> Path:
    folder = copies.place(cache, name, "1")
    (folder / "weights").mkdir()
    (folder / "weights" / "a@b").write_bytes(bytes(size))
    then = time.time() - asked_ago
    os.utime(folder, (then, then))
    return folder


def test_those_asked_for_longest_ago_go_first_until_the_bound_holds(tmp_path: Path) -> None:
    oldest = copy(tmp_path, "adapters/b", 100, 3 * LATELY_S)
    older = copy(tmp_path, "tenants/acme/adapters/a", 100, 2 * LATELY_S)
    newer = copy(tmp_path, "adapters/c", 100, 1.5 * LATELY_S)
    copies.evict(tmp_path, 300)
    assert oldest.exists()
    copies.evict(tmp_path, 200)
    assert [one.exists() for one in (oldest, older, newer)] == [False, True, True]
    copies.evict(tmp_path, 0)
    assert [one.exists() for one in (oldest, older, newer)] == [False, False, False]


def test_one_that_is_asked_for_again_is_kept(tmp_path: Path) -> None:
    first, second = (copy(tmp_path, name, 100, ago * LATELY_S) for name, ago in (("a", 3), ("b", 2)))
    assert copies.place(tmp_path, "a", "1") == first
    copies.evict(tmp_path, 0)
    assert (first / "weights" / "a@b").exists()
    assert not second.exists()


def test_a_file_that_is_open_can_be_read_to_its_end(tmp_path: Path) -> None:
    folder = copy(tmp_path, "a", 100, 2 * LATELY_S)
    with (folder / "weights" / "a@b").open("rb") as stream:
        copies.evict(tmp_path, 0)
        assert not folder.exists()
        assert stream.read() == bytes(100)


def test_what_is_no_copy_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_bytes(bytes(100))
    os.utime(tmp_path / "other", (0, 0))
    copies.evict(tmp_path, 0)
    assert (tmp_path / "other" / "file").exists()


def test_a_cache_that_is_not_there_is_empty(tmp_path: Path) -> None:
    copies.evict(tmp_path / "none", 0)
    copies.remove(tmp_path / "none", "adapters/a")


@pytest.mark.parametrize("name", ["a", "adapters/a"])
def test_all_versions_of_one_are_removed_and_no_others(tmp_path: Path, name: str) -> None:
    gone = [copies.place(tmp_path, name, version) for version in "12"]
    kept = [copies.place(tmp_path, other, "1") for other in (f"{name}b", f"x{name}", f"{name}/c")]
    copies.remove(tmp_path, name)
    assert not any(one.exists() for one in gone)
    assert all(one.exists() for one in kept)
