"""How much a tenant may keep, and whether there is room for more."""

from contextlib import suppress
from pathlib import Path

from stack import disk
from stack.config import home
from stack.context import Context
from stack.errors import StorageFull


def require_room(context: Context, size: int) -> None:
    """Raises StorageFull unless the tenant may keep so many bytes more, and the disk of the artifacts has them left.

    What counts has a row: it is finished. Two who ask at the same moment do not see each other, so a tenant can come to
    keep more than its quota by what was under way.
    """
    require_quota(context, size)
    context.artifacts.require_room(size)


def require_quota(context: Context, size: int) -> None:
    """Raises StorageFull unless the tenant may keep so many bytes more. What its memory banks hold is counted about."""
    most, store = context.config.max_tenant_bytes, context.store
    rows = (store.artifacts.bytes_of, store.datasets.uploaded_bytes, store.memory_banks.bytes_of)
    kept = sum(bytes_of(context.tenant) for bytes_of in rows)
    if kept + size > most:
        raise StorageFull(
            f"the tenant {context.tenant!r} keeps {kept} bytes already, and {size} more are needed; allowed: {most}"
        )


def require_room_for_job(context: Context, kept: int, temporary: int, work: Path) -> None:
    """Raises StorageFull unless there is room for what a job will keep, and for what it writes to its folder meanwhile.

    What an earlier attempt has left in that folder is there already.
    """
    require_room(context, kept)
    more = max(0, temporary - _bytes_in(work))
    home().mkdir(parents=True, exist_ok=True)
    artifacts = context.artifacts.folder
    if artifacts is not None and artifacts.stat().st_dev == home().stat().st_dev:
        more += kept
    disk.require_room(home(), more, "the disk on which jobs work")


def _bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += file.lstat().st_size if file.is_file() else 0
    return total
