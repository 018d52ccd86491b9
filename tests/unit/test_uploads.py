"""Uploads: what is counted and kept when things go wrong. How they arrive by HTTP is in tests/api/test_datasets.py."""

import errno
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from stack import quotas, uploads
from stack.context import Context
from stack.errors import BadInput, StorageFull
from stack.uploads import receive


def nothing_is_left(context: Context, home: Path) -> bool:
    kept = [path for name in ("artifacts", "uploads") for path in (home / name).rglob("*") if path.is_file()]
    return not kept and context.store.datasets.uploaded_bytes("default") == 0 and uploads.page(context, None, 10) == []


def test_a_publication_that_fails_is_not_counted(context: Context, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(context.artifacts), "publish", full)
    with receive(context, "a.jsonl") as file:
        file.write(b"{}")
        with pytest.raises(StorageFull, match="No space left on device"):
            file.publish()
    assert nothing_is_left(context, home)


def test_a_full_disk_is_told_as_it_is_written(context: Context, home: Path) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        file = uploads.Upload(context, "a.jsonl", home, full)  # type: ignore[arg-type]
        with pytest.raises(StorageFull, match="No space left"):
            file.write(b"{}")
    assert nothing_is_left(context, home)


def test_uploads_that_arrive_at_once_are_counted_together(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would fit by itself; the one that comes last sees both."""
    config = context.config.model_copy(update={"max_tenant_bytes": 1_500})
    context = Context(config, context.store, context.artifacts, context.engine)
    with receive(context, "a.jsonl") as one, receive(context, "b.jsonl") as another:
        one.write(b"x" * 1_000)
        another.write(b"x" * 1_000)
        require_room = quotas.require_room

        def meanwhile(*arguments: Any) -> None:
            require_room(*arguments)
            monkeypatch.setattr(quotas, "require_room", require_room)
            another.publish()

        monkeypatch.setattr(quotas, "require_room", meanwhile)
        with pytest.raises(StorageFull, match="1500"):
            one.publish()
    assert context.store.datasets.uploaded_bytes("default") == 1_000


def test_what_is_not_published_is_gone(context: Context, home: Path) -> None:
    with receive(context, "a.jsonl") as file:
        file.write(b"{}")
    assert nothing_is_left(context, home)


@pytest.mark.parametrize("name", ["", "a", "a.exe", "a\n.jsonl", "a\0.jsonl", "x" * 256 + ".jsonl", "..", "a/"])
def test_names_that_tell_no_format_or_are_unsafe_are_refused(context: Context, name: str) -> None:
    with pytest.raises(BadInput) as caught, receive(context, name):
        pass
    assert caught.value.param == "file"


# What is left of uploads that broke off with their process


def left_behind(home: Path, name: str, hours: float) -> Path:
    """What an upload has left whose last block came so long ago, in a folder that was made long before."""
    folder = home / "uploads" / name
    folder.mkdir(parents=True)
    (folder / uploads.CONTENT).write_bytes(b"x")
    last = time.time() - hours * 3_600
    os.utime(folder / uploads.CONTENT, (last, last))
    os.utime(folder, (last - 100 * 3_600, last - 100 * 3_600))
    return folder


def test_a_sweep_removes_only_what_nothing_arrives_for_any_more(context: Context, home: Path) -> None:
    assert uploads.sweep(context) == []
    old, slow = left_behind(home, "old", 25), left_behind(home, "slow", 0.5)
    empty = home / "uploads" / "empty"
    empty.mkdir()
    os.utime(empty, (0, 0))
    assert uploads.sweep(context) == ["empty", "old"]
    assert (old.exists(), slow.exists(), empty.exists()) == (False, True, False)
    with receive(context, "a.jsonl") as file:
        file.write(b"{}")
        assert uploads.sweep(context) == []
        file.publish()


def test_an_upload_leaves_the_others_alone(context: Context, home: Path) -> None:
    old = left_behind(home, "old", 25)
    with receive(context, "a.jsonl") as file:
        file.write(b"{}")
        file.publish()
    assert old.exists()


def test_uploads_that_end_meanwhile_do_not_disturb_a_sweep(
    context: Context, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, gone = left_behind(home, "old", 25), left_behind(home, "gone", 25)
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([old, gone]) if folder.name == "uploads" else iter([]))
    shutil.rmtree(gone)
    assert uploads.sweep(context) == ["old"]


def test_uploads_that_come_and_go_at_once_all_arrive(context: Context) -> None:
    def send(number: int) -> None:
        with receive(context, f"{number}.jsonl") as file:
            uploads.require_room(context, 2)
            file.write(b"{}")
            file.publish()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(send, range(40)))
    assert len(uploads.page(context, None, 100)) == 40
