"""Ranges of bytes in requests, and entity tags (RFC 9110, sections 8.8, 13 and 14)."""

import re

# One range. Its numbers are bounded, as the time to read them grows faster than they do.
_RANGE = re.compile(r"\s*bytes\s*=\s*([0-9]{0,30})\s*-\s*([0-9]{0,30})\s*", re.IGNORECASE)


def requested(header: str | None, size: int) -> tuple[int, int] | None:
    """What a `Range` asks for of so many bytes: the first of them, and the one behind the last.

    None stands for all: without the header, and for what may be passed over, which is another unit, several ranges, or
    no range at all. Where the two are equal, there is nothing at that place.
    """
    match = _RANGE.fullmatch(header or "")
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:  # so many at the end
        return (max(0, size - int(last)), size) if size or not int(last) else None
    if last and int(last) < int(first):
        return None
    start = min(int(first), size)
    return start, min(int(last) + 1, size) if last else size


def names(header: str | None, etag: str) -> bool:
    """Whether an `If-None-Match` names this tag, or any."""
    tags = [tag.strip().removeprefix("W/") for tag in (header or "").split(",")]
    return etag in tags or tags == ["*"]
