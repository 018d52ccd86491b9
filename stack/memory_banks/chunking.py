"""Documents cut into chunks where their structure says: at headings, paragraphs, sentences, words.

The cuts are semantic-text-splitter's: of the largest parts that fit, as many as fit together. A fenced block or a table
that fits into a chunk stands whole in one. Sizes are counted in tokens by the bank's counter.
"""

import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from markdown_it import MarkdownIt
from semantic_text_splitter import MarkdownSplitter, TextSplitter
from tokenizers import Tokenizer

from stack.errors import BadInput
from stack.memory_banks.reading import ReadText
from stack.memory_banks.rows import Chunk

# How many tokens each of some texts has.
Count = Callable[[Sequence[str]], list[int]]

PAGE_BREAK = "\n\n"
# Longer texts are cut into sections first, at blocks: what the splitter does for a chunk grows with what is left.
SECTION = 20_000
# A token is taken to hold at most so many characters. Some tokenizers make one token of a word however long it is, and
# none of blanks.
CHARACTERS_A_TOKEN = 32
MAX_HEADING = 200

_PART = re.compile(r" ?\S+|\s+")
_FRONT_MATTER = re.compile(r"---[ \t]*\n(?:.*\n)*?(?:---|\.\.\.)[ \t]*(?:\n|\Z)")
_WHOLE = ("fence", "code_block", "table_open")
# Blocks alone: what stands within paragraphs is not read.
_BLOCKS = MarkdownIt("commonmark").enable("table").disable("inline")


@dataclass(frozen=True, slots=True)
class _Span:
    """Characters of the document's text."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Heading(_Span):
    level: int
    title: str


@dataclass(frozen=True, slots=True)
class _Block(_Span):
    is_one: bool  # code or a table, which means little in parts


def text_of(text: ReadText) -> str:
    """The document's one text, of which chunks have their places."""
    return PAGE_BREAK.join(page.text for page in text.pages)


def chunks(text: ReadText, size: int, overlap: int, count: Count) -> tuple[Chunk, ...]:
    """The chunks of a document, each of at most `size` tokens: `text_of(text)[chunk.start:chunk.end] == chunk.text`.

    A chunk begins with up to `overlap` tokens of the one before, at most half of `size`, where a part that small ends
    it; between sections of a long text it does not. Page and headings are those at the first character that is not
    repeated. Special tokens are not counted: `size` leaves room for those of the model. The time grows as the text
    does, about a second for a million characters. Raises BadInput for a size or an overlap that cannot be.
    """
    if size < 1:
        raise BadInput(f"chunk size is {size}; allowed: at least 1", param="chunk_size_in_tokens")
    if not 0 <= overlap <= size // 2:
        raise BadInput(
            f"overlap is {overlap}; allowed: 0 to {size // 2}, half of a chunk", param="overlap_size_in_tokens"
        )
    whole = text_of(text)
    headings, blocks = _structure(whole) if text.format != "text" else ([], [])
    splitter = TextSplitter if text.format == "text" else MarkdownSplitter
    costs = _Costs(count, whole)
    splitting = splitter.from_callback(costs.of, size, overlap=overlap)
    found = [
        _Span(begun + start, begun + start + len(piece))
        for begun, section in _sections(whole, [block.start for block in blocks])
        for start, piece in splitting.chunk_indices(section)
    ]
    whole_blocks = [_stripped(whole, block) for block in blocks if block.is_one]
    spans = _with_whole(whole_blocks, found, whole, lambda span: costs.of(whole[span.start : span.end]) <= size)
    return tuple(_placed(_fitting(spans, whole, size, count), text, headings))


def count_words(texts: Sequence[str]) -> list[int]:
    """The counter of banks without a model: words between blanks."""
    return [len(text.split()) for text in texts]


@lru_cache(maxsize=16)
def token_counter(folder: Path) -> Count:
    """The counter of a model's tokenizer, which is read once. Special tokens are not counted.

    Raises BadInput where the folder has no tokenizer.json.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise BadInput(f"the model in {folder} has no tokenizer.json; allowed: models of the tokenizers library")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(texts: Sequence[str]) -> list[int]:
        return [len(encoded) for encoded in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    return count


class _Costs:
    """What texts cost of a chunk's size: the sum of their words' tokens, of which each is counted once.

    For most tokenizers that is the number of tokens, or a few more; `_fitting` looks after the others.
    """

    def __init__(self, count: Count, text: str) -> None:
        self._count = count
        self._costs: dict[str, int] = {}
        self._learn({part for part in _PART.findall(text) if len(part) <= CHARACTERS_A_TOKEN})

    def of(self, text: str) -> int:
        parts = _PART.findall(text)
        try:
            return sum(map(self._costs.__getitem__, parts))
        except KeyError:  # words that the splitter cut, and long ones
            self._learn({part for part in parts if part not in self._costs})
            return sum(map(self._costs.__getitem__, parts))

    def _learn(self, parts: set[str]) -> None:
        some = list(parts)
        for part, tokens in zip(some, self._count(some), strict=True):
            self._costs[part] = _cost(part, tokens)


def _cost(text: str, tokens: int) -> int:
    return max(tokens, len(text) // CHARACTERS_A_TOKEN)


def _with_whole(
    blocks: Sequence[_Span], found: Sequence[_Span], text: str, fits: Callable[[_Span], bool]
) -> Iterator[_Span]:
    """The spans, where a block that fits into one and is in none as a whole has one of its own, with what follows it.

    The splitter keeps blocks whole, but not behind a paragraph that it had to cut.
    """
    coming = deque(found)
    told = 0
    for block in blocks:
        while coming and coming[0].end <= block.start:
            told = coming[0].end
            yield coming.popleft()
        touched: list[_Span] = []
        while coming and coming[0].start < block.end:
            touched.append(coming.popleft())
        is_whole = any(span.start <= block.start and span.end >= block.end for span in touched)
        if not touched or is_whole or not fits(block):
            coming.extendleft(reversed(touched))
            continue
        before = _stripped(text, _Span(touched[0].start, block.start))
        if before.end > max(told, before.start):
            told = before.end
            yield before
        together = _Span(block.start, touched[-1].end)
        after = _stripped(text, _Span(block.end, together.end))
        parts = [together] if fits(together) else [block, after]
        coming.extendleft(reversed([part for part in parts if part.end > part.start]))
    yield from coming


def _stripped(text: str, span: _Span) -> _Span:
    """Without the blanks at its ends."""
    piece = text[span.start : span.end]
    start = span.start + len(piece) - len(piece.lstrip())
    return _Span(start, max(start, span.start + len(piece.rstrip())))


def _fitting(spans: Iterable[_Span], whole: str, size: int, count: Count) -> Iterator[tuple[_Span, int]]:
    """The spans with their tokens; those that have more than their words are cut again by what the whole has."""
    some = list(spans)
    for span, tokens in zip(some, count([whole[span.start : span.end] for span in some]), strict=True):
        if tokens <= size:
            yield span, tokens
            continue
        splitting = TextSplitter.from_callback(lambda text: _cost(text, count([text])[0]), size)
        parts = splitting.chunk_indices(whole[span.start : span.end])
        for (start, part), fewer in zip(parts, count([part for _, part in parts]), strict=True):
            yield _Span(span.start + start, span.start + start + len(part)), fewer


def _sections(whole: str, starts: Sequence[int]) -> Iterator[tuple[int, str]]:
    """The text in sections of at most SECTION characters with their places: cut before a block, a line, a word."""
    begun = 0
    while len(whole) - begun > SECTION:
        most = begun + SECTION
        block = starts[bisect_right(starts, most) - 1] if starts else 0
        places = (block, *(whole.rfind(mark, begun + 1, most) + len(mark) for mark in ("\n\n", "\n", " ")), most)
        end = next(place for place in places if place > begun + SECTION // 4)
        yield begun, whole[begun:end]
        begun = end
    yield begun, whole[begun:]


def _structure(text: str) -> tuple[list[_Heading], list[_Block]]:
    """Markdown's headings and blocks, but those within quotes and lists."""
    places = [0]
    for line in text.split("\n"):
        places.append(min(places[-1] + len(line) + 1, len(text)))
    matter = _FRONT_MATTER.match(text)
    skipped = text[: matter.end()].count("\n") if matter else 0
    tokens = _BLOCKS.parse(text[matter.end() if matter else 0 :])
    headings: list[_Heading] = []
    blocks: list[_Block] = []
    for index, token in enumerate(tokens):
        if token.level or token.map is None:
            continue
        start, end = (places[skipped + line] for line in token.map)
        blocks.append(_Block(start, end, token.type in _WHOLE))
        if token.type == "heading_open":
            title = tokens[index + 1].content.strip()[:MAX_HEADING]
            headings.append(_Heading(start, end, int(token.tag[1:]), title))
    return headings, blocks


def _placed(fitting: Iterable[tuple[_Span, int]], text: ReadText, headings: Sequence[_Heading]) -> Iterator[Chunk]:
    """The chunks with their pages and headings."""
    whole = text_of(text)
    page_starts = [0]
    for page in text.pages[:-1]:
        page_starts.append(page_starts[-1] + len(page.text) + len(PAGE_BREAK))
    under: list[_Heading] = []
    coming, told = 0, 0
    for position, (span, tokens) in enumerate(fitting):
        own = _stripped(whole, _Span(max(span.start, told), span.end)).start
        told = span.end
        number = text.pages[bisect_right(page_starts, own) - 1].number
        while coming < len(headings) and headings[coming].start <= own:
            heading = headings[coming]
            under = [*(one for one in under if one.level < heading.level), heading]
            # What follows a heading in the same chunk stands under it: a title and the first part's own, say.
            if own < heading.end < span.end:
                own = _stripped(whole, _Span(heading.end, span.end)).start
            coming += 1
        titles = tuple(one.title for one in under)
        yield Chunk(whole[span.start : span.end], position, span.start, span.end, tokens, number, titles)
