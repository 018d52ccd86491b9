"""Room on local disks: asked for before something is written, and told when it ends meanwhile."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stack.errors import StorageFull


def require_room(folder: Path, size: int, whose: str) -> None:
    """Raises StorageFull unless the disk of a folder, which is made if it is not there, has so many bytes left."""
    with telling_full(whose):
        folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise StorageFull(f"{whose} has {free} bytes left, and {size} are needed")


@contextmanager
def telling_full(whose: str) -> Iterator[None]:
    """Raises StorageFull where what is written within finds no room; other errors of the system as they are."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageFull(f"{whose} is full: {error.strerror}") from error
