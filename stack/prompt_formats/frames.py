"""Where a call begins in a model's words, and where it ends, however the words are cut."""

import re
from collections.abc import Iterable
from enum import StrEnum


class Kind(StrEnum):
    """A way of writing calls."""

    json = "json"  # {"name": ..., "parameters": ...}, and after it perhaps more of them
    pythonic = "pythonic"  # [f(a=1), g(b=2)]
    builtin = "builtin"  # brave_search.call(query="...")
    tagged = "tagged"  # any of these, or code, behind Llama 3's <|python_tag|>
    tool_call = "tool_call"  # <tool_call>{...}</tool_call>
    function = "function"  # <function=name>{...}</function>
    fence = "fence"  # ```json {...} ```


OPENERS = {Kind.tool_call: "<tool_call>", Kind.function: "<function=", Kind.fence: "```json"}
CLOSERS = {Kind.tool_call: "</tool_call>", Kind.function: "</function>", Kind.fence: "```"}
_JSON_HEADS = ('{"name":', '{"type":"function",')
_IDENTIFIER = re.compile(r"[A-Za-z_][\w.]{0,200}")
# So many brackets are not closed: what ends the call are its closing words.
_NEVER = 10**12
_GAP = re.compile(r"[\s,;\[\]]*")


def partial_at_end(words: Iterable[str]) -> re.Pattern[str]:
    """What finds, at the end of a text, the beginning of a word that may go on in the next text."""

    def beginnings(word: str) -> str:
        first, rest = re.escape(word[0]), word[1:-1]
        return first + "".join(f"(?:{re.escape(letter)}" for letter in rest) + ")?" * len(rest)

    return re.compile(f"(?:{'|'.join(map(beginnings, words))})\\Z")


class Opening:
    """The beginning of an answer, or what comes after a call, until it is clear whether a call begins there.

    `prefix` is an opening fence in front of it.
    """

    def __init__(self, kinds: Iterable[Kind], builtins: Iterable[str], is_forced: bool, prefix: str = "") -> None:
        self.prefix = prefix
        self._heads: dict[str, Kind] = {}
        if Kind.json in kinds:
            self._heads |= dict.fromkeys(("{",) if is_forced else _JSON_HEADS, Kind.json)
        if Kind.builtin in kinds:
            self._heads |= {f"{name}.call(": Kind.builtin for name in builtins}
        self._may_be_pythonic = Kind.pythonic in kinds
        self._parts: list[str] = []
        self._head = ""
        self._is_list = False

    @property
    def text(self) -> str:
        return "".join(self._parts)

    @property
    def is_gap(self) -> bool:
        """Whether there is nothing yet but what may stand between calls."""
        return not self._head

    def feed(self, data: str, position: int) -> tuple[int, Kind | bool | None]:
        """Where it comes to, and the kind of the call that begins; False if none begins there, None if it is open yet.

        What is taken is part of `text`; of a call, all that shows what it is.
        """
        start = position
        if not self._head:
            gap = _GAP.match(data, position)
            assert gap is not None
            self._is_list = self._is_list or "[" in gap[0]
            position = gap.end()
        outcome: Kind | bool | None = None
        while position < len(data) and outcome is None:
            outcome = self._outcome(data[position])
            position += outcome is not False
        self._parts.append(data[start:position])
        return position, outcome

    def _outcome(self, letter: str) -> Kind | bool | None:
        if letter.isspace() and self._head.startswith("{") and self._head.count('"') % 2 == 0:
            return None
        head = self._head + letter
        kind = self._heads.get(head)
        if kind is None and self._may_be_pythonic and self._is_list:
            if _IDENTIFIER.fullmatch(head):
                self._head = head
                return None
            if letter == "(" and self._head:
                kind = Kind.pythonic
        if kind is None and not any(known.startswith(head) for known in self._heads):
            return False
        self._head = head
        return kind


class Nesting:
    """Brackets and strings of JSON or Python: where the outermost bracket closes, and what is inside a string.

    `depth` is how many brackets are open where it begins.
    """

    _OUTSIDE = {'"': re.compile(r'["{}\[\]]'), "\"'": re.compile(r"""["'{}\[\]()]""")}
    _INSIDE = {'"': re.compile(r'["\\\x00-\x1f]'), "\"'": re.compile(r"""["'\\\x00-\x1f]""")}

    def __init__(self, depth: int, quotes: str = '"') -> None:
        self._depth = depth
        self._outside, self._inside = self._OUTSIDE[quotes], self._INSIDE[quotes]
        self._quote = ""
        self._is_escaped = False
        self._is_broken = False

    @property
    def is_in_string(self) -> bool:
        """False too where a string holds what none may hold: its end is likely missing."""
        return bool(self._quote) and not self._is_broken

    def feed(self, data: str, position: int, end: int) -> int | None:
        """The position behind the bracket that closes all, if it is before the end."""
        if self._is_escaped and position < end:
            position += 1
            self._is_escaped = False
        while found := (self._inside if self._quote else self._outside).search(data, position, end):
            letter, position = found[0], found.end()
            if self._quote:
                position = self._in_string(letter, position, end)
            elif letter in "\"'":
                self._quote = letter
            else:
                self._depth += 1 if letter in "{[(" else -1
                if self._depth <= 0:
                    return position
        return None

    def _in_string(self, letter: str, position: int, end: int) -> int:
        if letter == "\\":
            self._is_escaped = position == end
            return position + 1
        if letter == self._quote:
            self._quote = ""
        elif letter < " ":
            self._is_broken = True
        return position


class Frame:
    """A call that is being written. `lead` is blank space in front of it, `text` its words so far."""

    def __init__(self, kind: Kind, lead: str, begun: str) -> None:
        self.kind = kind
        self.lead = lead
        self._parts = [begun]
        self._closer = CLOSERS.get(kind)
        self._nesting: Nesting | None = None
        if kind is Kind.pythonic:
            self._nesting = Nesting(depth=2, quotes="\"'")
        elif kind is Kind.json:
            self._nesting = Nesting(depth=1)
        elif self._closer:
            self._nesting = Nesting(depth=_NEVER)
        # The beginning of a closer at the end of what came, which the nesting has not seen.
        self._partial = ""

    @property
    def text(self) -> str:
        return "".join(self._parts)

    @property
    def is_empty(self) -> bool:
        return not any(self._parts[:2])

    def feed(self, data: str, position: int) -> int | None:
        """Takes what belongs to the call; the position behind its end, if that is there."""
        end = self._end(data, position)
        self._parts.append(data[position:end])
        return end

    def _end(self, data: str, position: int) -> int | None:
        if self._nesting is None:
            return None
        if self._closer is None:
            return self._nesting.feed(data, position, len(data))
        if self._partial:
            behind = len(self._partial) - position
            found = self._closed_by(self._closer, self._partial + data[position:], 0, self._nesting)
            return None if found is None else found - behind
        return self._closed_by(self._closer, data, position, self._nesting)

    def _closed_by(self, closer: str, data: str, position: int, nesting: Nesting) -> int | None:
        """The position behind the closing words. Within a string they close nothing."""
        while (found := data.find(closer, position)) >= 0:
            nesting.feed(data, position, found)
            if not nesting.is_in_string:
                return found + len(closer)
            position = found + len(closer)
            nesting.feed(data, found, position)
        partial = _PARTIAL_CLOSERS[closer].search(data, max(position, len(data) - len(closer)))
        until = partial.start() if partial else len(data)
        nesting.feed(data, position, until)
        self._partial = data[until:]
        return None


_PARTIAL_CLOSERS = {closer: partial_at_end([closer]) for closer in CLOSERS.values()}
