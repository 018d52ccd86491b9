"""A model's words, as they come, in pieces: text, and calls of tools.

Nothing that the model says is lost. All texts and the raw characters of all calls, in their order, are what it said,
but for Llama 3's special tokens and for blank space, commas and brackets behind the last call. Each character is
looked at a fixed number of times, however the words are cut.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from stack.prompt_formats.arguments import typed_arguments
from stack.prompt_formats.calls import Call, builtin_calls, function_calls, json_calls, pythonic_calls, tagged_calls
from stack.prompt_formats.frames import CLOSERS, OPENERS, Frame, Kind, Opening, partial_at_end
from stack.prompt_formats.pieces import CallFailed, CallParsed, CallProgress, CallStarted, Piece, Text
from stack.prompt_formats.tools import PromptFormat, ToolUse

PYTHON_TAG = "<|python_tag|>"
_SPECIAL = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", PYTHON_TAG)
_SPECIALS = re.compile(f"({'|'.join(map(re.escape, _SPECIAL))})")
_PARTIAL_SPECIAL = partial_at_end(_SPECIAL)
_LONGEST_SPECIAL = max(map(len, _SPECIAL))

# How each family writes calls: those that can stand anywhere, and those that an answer must begin with. Of the models
# that were taught to write <tool_call>, some leave it out: Qwen2.5-Coder mostly writes a block of JSON.
_ANYWHERE: dict[PromptFormat, tuple[Kind, ...]] = {
    "llama3": (Kind.function,),
    "hermes": (Kind.tool_call, Kind.fence),
    "plain": (Kind.function, Kind.fence),
}
_AT_START: dict[PromptFormat, tuple[Kind, ...]] = {
    "llama3": (Kind.json, Kind.pythonic, Kind.builtin),
    "hermes": (Kind.json,),
    "plain": (Kind.json,),
}


class _Words:
    """What opens calls in the middle of text."""

    def __init__(self, kinds: tuple[Kind, ...]) -> None:
        self.kinds = {OPENERS[kind]: kind for kind in kinds}
        self.opener = re.compile("|".join(map(re.escape, self.kinds)))
        self.partial = partial_at_end(self.kinds)
        self.longest = max(map(len, self.kinds))


_WORDS = {family: _Words(kinds) for family, kinds in _ANYWHERE.items()}


class AnswerParser:
    """One answer's pieces. `feed` it the text as it comes, cut anywhere, and `close` it at the end.

    A call that must be made (by constrained decoding) is JSON in every format. Without tools all is text.
    `new_id` makes the ids of calls.
    """

    def __init__(self, format: PromptFormat, use: ToolUse, new_id: Callable[[], str]) -> None:
        self._tools = {tool.name: tool for tool in use.callable}
        self._use = use
        self._new_id = new_id
        self._pieces: list[Piece] = []
        self._calls = 0
        self._parsed = 0
        self._is_behind_call = False
        self._has_specials = format == "llama3"
        self._cut_special = ""

        self._words = _WORDS[format] if self._tools and not use.is_forced else None
        self._at_start = (Kind.json,) if use.is_forced else _AT_START[format]
        self._opening: Opening | None = self._new_opening() if self._tools else None
        self._frame: Frame | None = None
        # Blank space that a call may follow, and the beginning of words that may open one.
        self._blank: list[str] = []
        self._partial = ""

    def feed(self, text: str) -> list[Piece]:
        for special, words in self._without_specials(text):
            if special:
                self._take_special(special)
            else:
                self._take(words)
        return self._taken()

    def close(self) -> list[Piece]:
        self._take(self._cut_special)
        self._cut_special = ""
        self._end()
        return self._taken()

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _without_specials(self, text: str) -> Iterator[tuple[str, str]]:
        """Special tokens, and the words between them."""
        if not self._has_specials:
            yield "", text
            return
        parts = _SPECIALS.split(self._cut_special + text)
        partial = _PARTIAL_SPECIAL.search(parts[-1], max(0, len(parts[-1]) - _LONGEST_SPECIAL))
        self._cut_special = partial[0] if partial else ""
        parts[-1] = parts[-1].removesuffix(self._cut_special)
        for index, part in enumerate(parts):
            yield (part, "") if index % 2 else ("", part)

    def _take_special(self, special: str) -> None:
        if not self._tools or self._use.is_forced:
            return
        if special != PYTHON_TAG:
            if self._opening is None or not self._opening.is_gap:
                self._end()
                self._opening = self._new_opening()
            return
        if self._frame:
            self._end()
        if self._opening:
            self._text_of(self._opening)
        self._words_end()
        self._frame = Frame(Kind.tagged, self._no_blank(), "")

    def _take(self, data: str) -> None:
        position = 0
        if self._partial:
            data, self._partial = self._partial + data, ""
        while position < len(data):
            if self._frame:
                position = self._take_call(self._frame, data, position)
            elif self._opening:
                position = self._take_opening(self._opening, data, position)
            else:
                position = self._take_text(data, position)

    def _end(self) -> None:
        """All there is of a message has come."""
        if self._frame:
            self._finish(self._frame)
        if self._opening:
            if self._is_behind_call and self._opening.is_gap and not self._opening.prefix:
                self._opening = self._new_opening()
            else:
                self._text_of(self._opening)
        self._words_end()
        self._put_text(self._no_blank())

    # What may be the beginning of a call

    def _new_opening(self, prefix: str = "") -> Opening:
        builtins = [tool.name for tool in self._tools.values() if tool.is_builtin]
        return Opening((Kind.json,) if prefix else self._at_start, builtins, self._use.is_forced, prefix)

    def _take_opening(self, opening: Opening, data: str, position: int) -> int:
        position, outcome = opening.feed(data, position)
        if outcome is False:
            self._text_of(opening)
        elif isinstance(outcome, Kind):
            self._opening = None
            self._start(
                Frame(Kind.fence if opening.prefix else outcome, self._no_blank(), opening.prefix + opening.text)
            )
        return position

    def _text_of(self, opening: Opening) -> None:
        """No call begins there: it is text, of which nothing opens a call."""
        self._opening = None
        self._put_text(opening.prefix)
        self._take_words(opening.text)

    # Text

    def _take_text(self, data: str, position: int) -> int:
        if self._words is None:
            self._put_text(data[position:])
            return len(data)
        found = self._words.opener.search(data, position)
        if found is None:
            partial = self._words.partial.search(data, max(position, len(data) - self._words.longest))
            end = partial.start() if partial else len(data)
            self._take_words(data[position:end])
            self._partial = data[end:]
            return len(data)
        self._take_words(data[position : found.start()])
        kind = self._words.kinds[found[0]]
        if kind is Kind.fence:
            self._opening = self._new_opening(self._no_blank() + found[0])
        else:
            self._start(Frame(kind, self._no_blank(), found[0]))
        return found.end()

    def _take_words(self, words: str) -> None:
        """Words that open no call; blank space at their end is kept back, since it belongs to a call that follows."""
        stripped = words.rstrip() if self._words else words
        if stripped:
            self._put_text(self._no_blank() + stripped)
        self._blank.append(words[len(stripped) :])

    def _words_end(self) -> None:
        partial, self._partial = self._partial, ""
        self._take_words(partial)

    def _no_blank(self) -> str:
        blank = "".join(self._blank)
        self._blank.clear()
        return blank

    def _put_text(self, text: str) -> None:
        if text:
            self._is_behind_call = False
            self._pieces.append(Text(text))

    # Calls

    def _start(self, frame: Frame) -> None:
        self._frame = frame
        self._progress(frame.lead + frame.text, is_first=True)

    def _progress(self, text: str, is_first: bool) -> None:
        if is_first:
            self._pieces.append(CallStarted(self._calls))
        self._pieces.append(CallProgress(self._calls, text))

    def _take_call(self, frame: Frame, data: str, position: int) -> int:
        is_first = frame.is_empty
        end = frame.feed(data, position)
        self._progress((frame.lead if is_first else "") + data[position:end], is_first)
        if end is None:
            return len(data)
        self._finish(frame)
        return end

    def _finish(self, frame: Frame) -> None:
        """The call is complete, or what there is of it all there will be."""
        self._frame = None
        self._opening = self._new_opening()
        if frame.is_empty:
            self._blank.append(frame.lead)
            return
        self._is_behind_call = True
        first, self._calls = self._calls, self._calls + 1
        calls = self._read(frame)
        if calls is None:
            self._pieces.append(CallFailed(first, frame.lead + frame.text))
            return
        for index, (name, arguments) in enumerate(calls, first):
            if index > first:
                self._pieces.append(CallStarted(index))
            self._pieces.append(CallParsed(index, self._new_id(), name, arguments))
        self._parsed += len(calls)
        self._calls = first + len(calls)

    def _read(self, frame: Frame) -> list[Call] | None:
        """The calls of a frame, all of them good; None if any is not."""
        try:
            calls = [(name, self._typed(name, arguments)) for name, arguments in _READ[frame.kind](frame.text)]
        except (ValueError, RecursionError):
            return None
        is_one_too_many = not self._use.parallel and self._parsed + len(calls) > 1
        return calls if calls and not is_one_too_many else None

    def _typed(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if name not in self._tools:
            raise ValueError(f"there is no tool {name!r}")
        return typed_arguments(arguments, self._tools[name].parameters)


def _between_tags(kind: Kind) -> Callable[[str], list[Call]]:
    return lambda text: json_calls(text.strip().removeprefix(OPENERS[kind]).removesuffix(CLOSERS[kind]))


_READ: dict[Kind, Callable[[str], list[Call]]] = {
    Kind.json: json_calls,
    Kind.pythonic: pythonic_calls,
    Kind.builtin: builtin_calls,
    Kind.tagged: tagged_calls,
    Kind.tool_call: _between_tags(Kind.tool_call),
    Kind.function: function_calls,
    Kind.fence: _between_tags(Kind.fence),
}


def split_answer(format: PromptFormat, use: ToolUse, text: str, new_id: Callable[[], str]) -> list[Piece]:
    """The pieces of an answer that is there whole."""
    parser = AnswerParser(format, use, new_id)
    return [*parser.feed(text), *parser.close()]
