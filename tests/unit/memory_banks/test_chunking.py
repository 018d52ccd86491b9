"""Documents cut into chunks."""

import random
from itertools import pairwise
from pathlib import Path
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel

from stack.errors import BadInput
from stack.memory_banks.chunking import chunks, count_words, text_of, token_counter
from stack.memory_banks.reading import Page, ReadText
from stack.memory_banks.rows import Chunk

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SENTENCE = "The sail of a boat makes it go against the wind. "


def markdown(text: str) -> ReadText:
    return ReadText((Page(None, text),), "markdown")


def words(text: ReadText, size: int, overlap: int = 0) -> tuple[Chunk, ...]:
    return chunks(text, size, overlap, count_words)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT tokenizer whose words are letters and pairs, which truncates and pads as saved ones do."""
    pairs = ["##" + one for one in LETTERS] + ["th", "he", "##he", "##nd", "##at"]
    vocabulary = {word: number for number, word in enumerate(["[UNK]", *LETTERS, *pairs, ".", "#"])}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


pieces = st.sampled_from(
    ["# One\n", "## Two\n\n", "Three\n===\n", "- item\n", "```\ncode\n\nmore\n```\n",
     "| a | b |\n|---|---|\n| 1 | 2 |\n",
     "> said\n", "    indented\n", "\n\n", "\n", "   ", "\t", "\u00a0", "日本語のテキスト。", "e\u0301", "👩‍👩‍👧",
     SENTENCE,
     "x" * 200, "[", "***", "<b>", "---\n"]
)  # fmt: skip
documents = st.lists(st.one_of(pieces, st.text(max_size=20).filter(lambda text: text.isprintable())), max_size=40)


@settings(max_examples=150, deadline=None)
@given(documents, documents, st.integers(1, 40), st.integers(0, 20), st.sampled_from(["text", "markdown", "html"]))
def test_chunks_stand_where_they_say_fit_and_leave_out_nothing_but_blanks(
    model: Path, one: list[str], two: list[str], size: int, overlap: int, form: str
) -> None:
    text = ReadText((Page(1, "".join(one)), Page(2, "".join(two))), form)  # type: ignore[arg-type]
    whole, count = text_of(text), token_counter(model)
    found = chunks(text, size, min(overlap, size // 2), count)
    assert [chunk.position for chunk in found] == list(range(len(found)))
    told = 0
    for chunk in found:
        assert whole[chunk.start : chunk.end] == chunk.text
        assert chunk.text.strip()
        # A single character may be more than one token.
        assert chunk.tokens == count([chunk.text])[0] <= size or len(chunk.text) == 1
        assert not whole[told : chunk.start].strip(), "something is left out"
        assert chunk.end > told, "it says nothing of its own"
        told = chunk.end
    assert not whole[told:].strip()


def test_an_overlap_repeats_the_end_of_the_chunk_before() -> None:
    text = ReadText((Page(None, " ".join(f"word{number}" for number in range(200))),), "text")
    found = words(text, 20, 5)
    assert len(found) > 10
    for before, after in pairwise(found):
        assert 0 < len(text_of(text)[after.start : before.end].split()) <= 5
    assert all(after.start >= before.end for before, after in pairwise(words(text, 20)))


@pytest.mark.parametrize(
    "whole",
    [
        "```python\ndef f():\n    return 1\n\n\ndef g():\n    return 2\n```",
        "| a | b |\n|---|---|\n| one | two |\n| three | four |",
    ],
)
@pytest.mark.parametrize("sentences", range(1, 12))
@pytest.mark.parametrize("overlap", [0, 10])
def test_a_fence_or_a_table_that_fits_stands_whole_in_a_chunk(whole: str, sentences: int, overlap: int) -> None:
    text = markdown(f"# Title\n\n{SENTENCE * sentences}\n\n{whole}\n\n{SENTENCE * 3}")
    found = words(text, 30, overlap)
    assert any(whole in chunk.text for chunk in found), [chunk.text for chunk in found]


def test_a_paragraph_is_cut_between_sentences() -> None:
    found = words(ReadText((Page(None, SENTENCE * 12),), "text"), 25)
    assert len(found) == 6
    assert {chunk.text for chunk in found} == {(SENTENCE * 2).strip()}


def test_chunks_name_the_headings_that_they_stand_under() -> None:
    body = SENTENCE.strip()
    text = markdown(
        f"---\ntitle: no heading\n---\n{body}\n\n# One\n\n## Two\n\n{body}\n\n{body}\n\nThree\n---\n\n{body}\n\n"
        f"```\n# a comment\n```\n\n# Four `code`\n{body}\n\n### Five\n{body}"
    )
    found = words(text, 12)
    under = [(chunk.headings, chunk.text) for chunk in found if SENTENCE.strip() in chunk.text]
    assert [headings for headings, _ in under] == [
        (), ("One", "Two"), ("One", "Two"), ("One", "Three"), ("Four `code`",), ("Four `code`", "Five"),
    ]  # fmt: skip
    assert all(chunk.headings == () for chunk in words(ReadText(text.pages, "text"), 12)), "a text has no headings"


def test_chunks_name_the_page_of_their_first_character_that_is_not_repeated() -> None:
    text = ReadText(tuple(Page(number, f"page {number} " + SENTENCE * 3) for number in (1, 2, 3)), "text")
    found = words(text, 12, 4)
    assert {chunk.page for chunk in found} == {1, 2, 3}
    for number in (1, 2, 3):
        first = next(chunk for chunk in found if f"page {number}" in chunk.text)
        assert first.page == number
    assert [chunk.page for chunk in found] == sorted(chunk.page or 0 for chunk in found)
    assert {chunk.page for chunk in words(markdown(SENTENCE), 12)} == {None}


def test_a_tokenizer_whose_tokens_are_more_than_its_words_have_is_never_over_the_size(tmp_path: Path) -> None:
    """One that looks over blanks: a word by itself is one token, and four within a text."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary |= {"so": 256, "som": 257, "some": 258}
    tokenizer = Tokenizer(BPE(vocabulary, [("s", "o"), ("so", "m"), ("som", "e")]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    count = token_counter(tmp_path)

    def greedy(texts: list[str]) -> list[int]:
        return [
            tokens if len(text.split()) < 2 else 2 * tokens for text, tokens in zip(texts, count(texts), strict=True)
        ]

    text = ReadText((Page(None, "some " * 500),), "text")
    found = chunks(text, 30, 0, greedy)  # type: ignore[arg-type]
    assert all(chunk.tokens <= 30 for chunk in found)
    assert sum(chunk.text.count("some") for chunk in found) == 500


def test_a_word_without_end_is_cut_though_it_is_one_token(model: Path) -> None:
    found = chunks(ReadText((Page(None, "a" * 100_000),), "text"), 50, 0, token_counter(model))
    assert max(len(chunk.text) for chunk in found) <= 50 * 33
    assert "".join(chunk.text for chunk in found) == "a" * 100_000


@pytest.mark.parametrize("unit", [SENTENCE, SENTENCE + "\n\n# Head\n\n", "word ", "abcdefgh", "[", "> a\n", "```\n"])
def test_the_time_grows_as_the_text_does(model: Path, unit: str) -> None:
    count = token_counter(model)
    costs = []
    for size in (60_000, 480_000):
        text = markdown((unit * (size // len(unit) + 1))[:size])
        begun = process_time()
        chunks(text, 200, 50, count)
        costs.append(process_time() - begun)
    assert costs[1] < 20 * costs[0] + 0.5, "eight times the text"


def test_a_megabyte_of_prose_takes_little_more_than_a_second(model: Path) -> None:
    drawn = random.Random(1)
    names = ["".join(drawn.choices(LETTERS, k=drawn.randint(2, 10))) for _ in range(20_000)]
    lines = [" ".join(drawn.choices(names, k=12)) + "." for _ in range(1_000_000 // 85)]
    text = markdown("\n\n".join(f"# Part {number}\n\n{line}" for number, line in enumerate(lines)))
    count = token_counter(model)
    begun = process_time()
    assert len(chunks(text, 256, 32, count)) > 1_000
    assert process_time() - begun < 10, "1.5 s on a machine of 2025; the bound is for busy ones"


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (10, 6), (10, -1)])
def test_a_size_or_an_overlap_that_cannot_be_is_refused(size: int, overlap: int) -> None:
    with pytest.raises(BadInput, match="allowed"):
        words(markdown("a"), size, overlap)


def test_a_model_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"tokenizer\.json"):
        token_counter(tmp_path)
