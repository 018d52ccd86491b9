"""What a job has asked a model already, and the answers, in a file: another attempt does not ask for these again.

A line is `HASH ANSWER`, the SHA-256 of what was asked and the answer, compressed: one that tells the logprobs of a long
prompt is long, and mostly repetition. In memory are only the hashes, and where their lines begin.
"""

import base64
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, Self

from jobs.row_log import cut
from stack.errors import StorageFull


class KeptAnswers:
    """The answers in a file, of at most so many bytes. A line that a lost attempt did not finish is cut off."""

    def __init__(self, file: Path, most: int) -> None:
        cut(file)
        self._most = most
        self._added, self._kept = file.open("ab"), file.open("rb")
        self._places: dict[bytes, int] = {}
        self._end = 0
        for line in self._kept:
            self._note(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._added.close()
        self._kept.close()

    def __len__(self) -> int:
        return len(self._places)

    def find(self, asked: Any) -> bytes | None:
        """The answer to what was asked, a value of JSON, if there is one."""
        if (place := self._places.get(_hash(asked))) is None:
            return None
        self._kept.seek(place)
        _, _, answer = self._kept.readline().partition(b" ")
        return zlib.decompress(base64.b85decode(answer.rstrip()))

    def add(self, asked: Any, answer: bytes) -> None:
        """Keeps an answer. It is in the file when this returns. Raises StorageFull where it would be too large."""
        line = _hash(asked) + b" " + base64.b85encode(zlib.compress(answer)) + b"\n"
        if self._end + len(line) > self._most:
            raise StorageFull(
                f"{len(self)} answers take {self._end} bytes, and there are more; allowed: {self._most} bytes; ask for "
                "fewer tasks at once, or set a lower limit"
            )
        self._added.write(line)
        self._added.flush()
        self._note(line)

    def _note(self, line: bytes) -> None:
        self._places[line.partition(b" ")[0]] = self._end
        self._end += len(line)


def _hash(asked: Any) -> bytes:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest().encode()
