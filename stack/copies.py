"""The copies of remote artifacts in a folder of this machine: bounded, and the ones asked for longest ago go first.

A copy is a folder whose name holds an `@`, which no artifact's does. Its time of change says when it was last asked
for. Several processes keep their copies in one folder.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Who asked for a copy reads it right then: after this time nobody is about to open a file in it. What is open stays
# readable, as the system keeps a removed file until it is closed.
LATELY_S = 3_600.0


def place(cache: Path, name: str, version: str) -> Path:
    """The folder of the copy of one version of an artifact, which is made, and noted as asked for now."""
    folder = cache / f"{name}@{version}"
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    return folder


def evict(cache: Path, most: int) -> None:
    """Removes copies until they have `most` bytes together, or only those are left that were asked for lately."""
    copies = sorted((_asked_at(copy), copy, _bytes(copy)) for copy in _copies(cache))
    total = sum(size for _, _, size in copies)
    for _, copy, size in copies:
        # Asked once more: it may have been wanted meanwhile.
        if total <= most or _asked_at(copy) > time.time() - LATELY_S:
            return
        _remove(copy)
        total -= size


def remove(cache: Path, name: str) -> None:
    """Removes the copies of an artifact, all versions of it."""
    folder, _, last = name.rpartition("/")
    for copy in (cache / folder).glob(f"{last}@*"):
        _remove(copy)


def _copies(cache: Path) -> Iterator[Path]:
    for folder, folders, _ in os.walk(cache):
        yield from (Path(folder) / name for name in folders if "@" in name)
        folders[:] = [name for name in folders if "@" not in name]


def _bytes(copy: Path) -> int:
    total = 0
    for folder, _, files in os.walk(copy):
        for name in files:
            with suppress(FileNotFoundError):  # another process removes it, too
                total += os.stat(os.path.join(folder, name)).st_size
    return total


def _asked_at(copy: Path) -> float:
    try:
        return copy.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove(copy: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(copy)
