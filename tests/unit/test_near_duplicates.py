"""Texts that are nearly the same as an earlier one."""

import random

import pytest

from stack.near_duplicates import NearDuplicates, shingles, similarity

TEXT = "name three rivers in France explain how a sail works write short poem about rain list prime numbers"
WORDS = TEXT.split()


def test_the_same_text_is_found_whatever_its_case_and_blanks() -> None:
    seen = NearDuplicates(0.7)
    assert seen.add("Name three rivers in France.") is None
    assert seen.add("name  three RIVERS\nin France.") == "Name three rivers in France."


def test_a_text_that_differs_in_a_word_of_many_is_found_and_another_one_is_not() -> None:
    seen = NearDuplicates(0.7)
    text = "Explain in a few simple sentences how the sail of a boat makes it go against the wind"
    assert seen.add(text) is None
    assert seen.add(text + "s") == text
    assert seen.add("Explain in a few simple sentences why the sky is blue at noon and red in the evening") is None
    assert seen.add("Write a poem about rain") is None


def test_what_was_refused_is_not_compared_with() -> None:
    seen = NearDuplicates(0.9)
    assert seen.add("a" * 5 + "bcdefghijklmnop") is None
    first = "abcdefghijklmnopqrstuvwxyz"
    assert seen.add(first) is None
    assert seen.add(first + "0") == first
    assert seen.add(first + "01234") is None, "it is like the refused one alone"


@pytest.mark.parametrize("most", [0.3, 0.5, 0.7, 0.9])
def test_no_two_texts_that_are_kept_are_more_similar(most: float) -> None:
    """As comparing each with all others would find, but for a few that the hashes miss."""
    drawn, seen = random.Random(1), NearDuplicates(most)
    kept: list[str] = []
    for _ in range(300):
        text = " ".join(drawn.sample(WORDS, 6)) if drawn.random() < 0.5 or not kept else drawn.choice(kept) + " now"
        if seen.add(text) is None:
            kept.append(text)
    parts = [shingles(text) for text in kept]
    pairs = [similarity(a, b) for index, a in enumerate(parts) for b in parts[:index]]
    missed = sum(one > most for one in pairs)
    assert missed <= len(kept) * 0.02
    assert 10 < len(kept) < 300


def test_similarity_is_jaccards() -> None:
    assert similarity({"a", "b"}, {"b", "c"}) == pytest.approx(1 / 3)
    assert shingles("ABCDEF") == {"abcde", "bcdef"}
    assert shingles("Ab") == {"ab"}
