"""Uploads: what is counted and kept when things go wrong. How they arrive by HTTP is in tests/api/test_datasets.py."""

import errno
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
