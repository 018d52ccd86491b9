"""What a sandbox has written, read from outside, and what is put there for it.

Its folder is known as an open file, and all in it is looked up from there, name by name, without following links: code
in the sandbox can change what lies there at any time, and reaches nothing else by that.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

# How deep folders are looked into, and how many entries are looked at.
MAX_DEPTH = 3
MAX_ENTRIES = 2_000
MAX_NAME = 200
_HOW = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Mark:
    """What a file was when it was seen: it has been written to where this differs."""

    inode: int
    size: int
    changed: int


@dataclass(frozen=True)
class Produced:
    """Files by their names, in order, and those that are left out, with the reasons."""

    files: dict[str, bytes]
    left_out: dict[str, str]


def put(folder: int, name: str, content: bytes) -> None:
    """Writes a file of the user's, which cells may change. Raises OSError, where there is no room, say."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(name, flags, 0o600, dir_fd=folder), "wb") as file:
        file.write(content)
        os.fchmod(file.fileno(), 0o666)  # it is another user's, where root has put it there


def marks(folder: int) -> dict[str, Mark]:
    """The entries in the folder, but for folders and those whose names begin with a dot."""
    return dict(_walk(folder, "", MAX_DEPTH, [MAX_ENTRIES]))


def produced(folder: int, before: dict[str, Mark], most: int, largest: int, together: int) -> Produced:
    """The files that are new or changed since `before`: at most so many, of at most so many bytes each and together.

    Only plain files with no other name are read.
    """
    found = Produced({}, {})
    for name, mark in sorted(marks(folder).items()):
        if before.get(name) == mark:
            continue
        if len(found.files) == most:
            found.left_out[name] = f"there are more than {most}"
            continue
        content, why = _read(folder, name, min(largest, together))
        if why:
            found.left_out[name] = why
        else:
            found.files[name] = content
            together -= len(content)
    return found


def _walk(folder: int, place: str, depth: int, left: list[int]) -> Iterator[tuple[str, Mark]]:
    """What is in an open folder and below it. `left` holds how many entries may still be looked at."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not left[0]:
                return
            left[0] -= 1
            try:
                seen = entry.stat(follow_symlinks=False)
                if not stat.S_ISDIR(seen.st_mode):
                    yield place + entry.name, Mark(seen.st_ino, seen.st_size, seen.st_mtime_ns)
                elif depth > 1:
                    inner = os.open(entry.name, _HOW | os.O_DIRECTORY, dir_fd=folder)
                    try:
                        yield from _walk(inner, f"{place}{entry.name}/", depth - 1, left)
                    finally:
                        os.close(inner)
            except OSError:  # it is gone, or something else, since it was listed; or cannot be read by its owner's will
                continue


def _read(folder: int, name: str, most: int) -> tuple[bytes, str]:
    """The content of a file of at most so many bytes, or why it is not read."""
    if len(name) > MAX_NAME or not name.isprintable():
        return b"", "its name cannot be told"
    opened = os.dup(folder)
    try:
        for part in name.split("/"):
            inner = os.open(part, _HOW, dir_fd=opened)
            os.close(opened)
            opened = inner
        seen = os.fstat(opened)
        if not stat.S_ISREG(seen.st_mode) or seen.st_nlink != 1:
            return b"", "it is not a plain file with one name"
        if seen.st_size > most:
            return b"", f"it has {seen.st_size} bytes, of which there is room for {most}"
        with open(os.dup(opened), "rb") as file:
            content = file.read(most + 1)
        return (content, "") if len(content) <= most else (b"", "it grew while it was read")
    except OSError as error:
        return b"", f"it cannot be read: {error.strerror}"
    finally:
        os.close(opened)
