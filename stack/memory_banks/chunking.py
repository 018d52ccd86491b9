"""Documents cut into chunks where their structure says: at headings, paragraphs, sentences, words.

The cuts are semantic-text-splitter's: of the largest parts that fit, as many as fit together. A fenced block or a table
that fits into a chunk stands whole in one. Sizes are counted in tokens by the bank's counter.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
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
# Blocks alone: what stands within paragraphs is not read.
_BLOCKS = MarkdownIt("commonmark").enable("table").disable("inline")


@dataclass(frozen=True, slots=True)
class _Heading:
    start: int
    end: int
    level: int
    title: str


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
        raise BadInput(f"overlap is {overlap}; allowed: 0 to {size // 2}, half of a chunk", param="overlap_size_in_tokens")
    whole = text_of(text)
    headings, starts = _structure(whole) if text.format != "text" else ([], [])
    splitter = TextSplitter if text.format == "text" else MarkdownSplitter
    costs = _Costs(count, whole)
    splitting = splitter.from_callback(costs.of, size, overlap=overlap)
    found = [
        (section_start + start, piece)
        for section_start, section in _sections(whole, starts)
        for start, piece in splitting.chunk_indices(section)
    ]
    fitting = list(_fitting(found, size, count))
    return tuple(_chunk_rows(fitting, text, headings))


def count_words(texts: Sequence[str]) -> list[int]:
    """The counter of banks without a model: words between blanks."""
    return [len(text.split()) for text in texts]


@lru_cache(maxsize=16)
def token_counter(folder: Path) -> Count:
    """The counter of an embedding model's tokenizer, which is read once. Special tokens are not counted.

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


def _fitting(found: Sequence[tuple[int, str]], size: int, count: Count) -> Iterator[tuple[int, str, int]]:
    """The pieces with their tokens; those that have more than their words are cut again by what the whole has."""
    for (start, piece), tokens in zip(found, count([piece for _, piece in found]), strict=True):
        if tokens <= size:
            yield start, piece, tokens
            continue
        splitting = TextSplitter.from_callback(lambda text: _cost(text, count([text])[0]), size)
        parts = splitting.chunk_indices(piece)
        for (begun, part), fewer in zip(parts, count([part for _, part in parts]), strict=True):
            yield start + begun, part, fewer


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


def _structure(text: str) -> tuple[list[_Heading], list[int]]:
    """Markdown's headings, but those within quotes and lists, and where its blocks begin."""
    places = [0]
    for line in text.split("\n"):
        places.append(min(places[-1] + len(line) + 1, len(text)))
    matter = _FRONT_MATTER.match(text)
    skipped = text[: matter.end()].count("\n") if matter else 0
    tokens = _BLOCKS.parse(text[matter.end() if matter else 0 :])
    headings: list[_Heading] = []
    starts: list[int] = []
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.level or token.map is None:
            continue
        start, end = (places[skipped + line] for line in token.map)
        starts.append(start)
        if token.type == "heading_open" and following is not None:
            headings.append(_Heading(start, end, int(token.tag[1:]), following.content.strip()[:MAX_HEADING]))
    return headings, starts


def _chunk_rows(
    fitting: Sequence[tuple[int, str, int]], text: ReadText, headings: Sequence[_Heading]
) -> Iterator[Chunk]:
    page_starts = [0]
    for page in text.pages[:-1]:
        page_starts.append(page_starts[-1] + len(page.text) + len(PAGE_BREAK))
    under: list[_Heading] = []
    coming, told = 0, 0
    for position, (start, piece, tokens) in enumerate(fitting):
        end = start + len(piece)
        repeated = max(0, told - start)
        own = start + repeated + len(piece[repeated:]) - len(piece[repeated:].lstrip())
        told = end
        while coming < len(headings) and headings[coming].start <= own:
            heading = headings[coming]
            under = [one for one in under if one.level < heading.level] + [heading]
            # What follows a heading in the same chunk stands under it: a title and the first part's own, say.
            rest = piece[max(0, heading.end - start) :]
            if heading.end < end:
                own = max(own, heading.end + len(rest) - len(rest.lstrip()))
            coming += 1
        number = text.pages[bisect_right(page_starts, own) - 1].number
        yield Chunk(piece, position, start, end, tokens, number, tuple(one.title for one in under))
