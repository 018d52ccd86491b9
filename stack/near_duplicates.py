"""Texts that are nearly the same as an earlier one.

Two texts are as similar as the sets of their shingles: Jaccard's index, the number of those that both have over the
number of those that either has. Shingles are the overlapping runs of characters in lower case, with one blank between
words (Broder 1997, "On the resemblance and containment of documents"). MinHash with locality-sensitive hashing
(datasketch) finds who may be that similar, and the index itself decides.
"""

from datasketch import MinHash, MinHashLSH

SHINGLE = 5
PERMUTATIONS = 128
# Candidates are looked for below the bound, as the hashes find those near it only by chance.
SLACK = 0.6


class NearDuplicates:
    """Texts of which no two have a similarity above `most`."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._index = MinHashLSH(threshold=most * SLACK, num_perm=PERMUTATIONS)
        self._texts: dict[str, str] = {}

    def add(self, text: str) -> str | None:
        """Adds a text, or returns the earlier one that it is too similar to."""
        parts = shingles(text)
        hashed = MinHash(num_perm=PERMUTATIONS)
        hashed.update_batch(sorted(part.encode() for part in parts))
        for key in sorted(self._index.query(hashed), key=int):
            earlier = self._texts[key]
            if similarity(parts, shingles(earlier)) > self._most:
                return earlier
        key = str(len(self._texts))
        self._texts[key] = text
        self._index.insert(key, hashed)
        return None


def shingles(text: str) -> set[str]:
    """The runs of SHINGLE characters in a text; a shorter text is one itself."""
    plain = " ".join(text.lower().split())
    return {plain[start : start + SHINGLE] for start in range(max(1, len(plain) - SHINGLE + 1))}


def similarity(first: set[str], second: set[str]) -> float:
    """The Jaccard similarity of two sets that are not both empty."""
    return len(first & second) / len(first | second)
