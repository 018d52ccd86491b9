"""What shields judge, and what they say of it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Said:
    """A message as shields judge it: who says it, and its text.

    Of the text, `passed` characters have passed the shield already, with what came before them: the rest is judged, and
    they are read with it. A message that has passed as a whole is there as context alone. One `is_unfinished` that is
    still being streamed, and may end in the middle of a word.
    """

    role: Literal["system", "user", "tool", "assistant"]
    text: str
    passed: int = 0
    is_unfinished: bool = False

    @property
    def is_judged(self) -> bool:
        return self.passed < len(self.text)


@dataclass(frozen=True)
class Verdict:
    """What a shield says: whether there is a violation, of which type and why, and its score, from 0 to 1.

    What a shield cannot judge is a violation of the type UNJUDGED.
    """

    is_violation: bool
    type: str | None = None
    message: str | None = None
    score: float | None = None


PASSED = Verdict(is_violation=False)
UNJUDGED = "unjudged"
