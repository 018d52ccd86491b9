"""Prompts that are grown from seeds, with a model that answers from a list."""

import hashlib
from collections.abc import Sequence

import pytest

from stack import self_instruct
from stack.self_instruct import EXAMPLES, GROWN_EXAMPLES, Grown, Said, examples, grow, proposals, question

SEEDS = ["Name three rivers in France", "Write a short poem about rain", "Explain how a sail works"]


class Model:
    """Answers each question with the next of these; then always with the last one."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.questions: list[str] = []

    async def __call__(self, number: int, asked: str) -> Said:
        assert number == len(self.questions)
        self.questions.append(asked)
        return Said(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])


def new(number: int) -> str:
    """A prompt that is like no other."""
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return " ".join(digest[start : start + 8] for start in range(0, 48, 8))


async def grown(model: Model, count: int, known: Sequence[str] = (), seed: int = 0) -> list[Grown]:
    rounds = grow(model, SEEDS, known, count, 0.7, seed)
    return [one async for found in rounds for one in found]


async def test_as_many_prompts_are_grown_as_are_wanted() -> None:
    model = Model(*(new(number) for number in range(100)))
    found = await grown(model, 20)
    assert [one.reason for one in found] == [None] * 20
    assert len({one.prompt for one in found}) == 20
    assert len(model.questions) == 2 * self_instruct.AT_ONCE


async def test_duplicates_of_seeds_of_known_and_of_each_other_are_dropped() -> None:
    model = Model("Name three rivers in France!", new(50), new(1), new(1), "Too short", new(2))
    found = await grown(model, 2, known=[])
    assert [(one.reason, one.of) for one in found[:5]] == [
        ("duplicate", SEEDS[0]), (None, None), (None, None), ("duplicate", new(1)), ("length", None),
    ]  # fmt: skip
    assert [one.prompt for one in found if one.reason is None] == [new(50), new(1)]


async def test_a_model_without_ideas_is_given_up() -> None:
    model = Model(SEEDS[0])
    found = await grown(model, 5)
    assert {one.reason for one in found} == {"duplicate"}
    assert len(model.questions) == self_instruct.BARREN_ROUNDS * self_instruct.AT_ONCE


async def test_what_was_grown_before_counts_and_is_shown() -> None:
    model = Model(*(new(number) for number in range(10, 100)))
    found = await grown(model, 5, known=[new(1), new(2), new(3)])
    assert sum(one.reason is None for one in found) == 2
    assert any(new(1) in asked or new(2) in asked or new(3) in asked for asked in model.questions)
    assert await grown(Model("a b c"), 3, known=[new(1), new(2), new(3)]) == []


async def test_the_same_seed_asks_the_same() -> None:
    first, second, other = (Model(*(new(number) for number in range(50))) for _ in range(3))
    await grown(first, 10)
    await grown(second, 10)
    await grown(other, 10, seed=1)
    assert first.questions == second.questions != other.questions


def test_seeds_and_a_few_grown_prompts_are_shown() -> None:
    seeds, pool = [f"seed {number}" for number in range(20)], [f"grown {number}" for number in range(20)]
    shown = examples(seeds, pool, "0")
    assert len(shown) == EXAMPLES
    assert sum(one in pool for one in shown) == GROWN_EXAMPLES
    assert sorted(examples(SEEDS, [], "0")) == sorted(SEEDS)
    assert len({tuple(examples(seeds, pool, str(number))) for number in range(20)}) == 20


def test_the_question_lists_what_is_shown_and_asks_for_the_next() -> None:
    asked = question(["Name three\nrivers", "Write a poem"])
    assert "1. Name three rivers\n2. Write a poem" in asked
    assert "task 3" in asked


@pytest.mark.parametrize(
    ("answer", "prompts"),
    [
        ("Name a river", ["Name a river"]),
        ("4. Name a river\n5) Name a lake\n\n- Name a sea", ["Name a river", "Name a lake", "Name a sea"]),
        ('Task 9: "Name a river"', ["Name a river"]),
        ("2024 was a leap year, was it?", ["2024 was a leap year, was it?"]),
        (" \n", []),
    ],
)
def test_proposals_are_lines_without_their_numbers(answer: str, prompts: list[str]) -> None:
    assert proposals(Said(answer)) == [Grown(prompt) for prompt in prompts]


def test_a_line_that_was_cut_off_or_speaks_of_what_would_follow_is_no_prompt() -> None:
    said = Said("1. Name a river of France\n2. Translate this sentence into German:\n3. Name the capi", is_whole=False)
    first, second, third = proposals(said)
    assert first == Grown("Name a river of France")
    assert second == Grown("Translate this sentence into German:", "unfinished")
    assert third == Grown("Name the capi", "unfinished")


async def test_what_is_unfinished_is_told_and_not_grown() -> None:
    model = Model("Here are some of the tasks that you asked for:\n" + new(1), new(2))
    found = await grown(model, 2)
    assert [(one.prompt, one.reason) for one in found if one.reason != "duplicate"] == [
        ("Here are some of the tasks that you asked for:", "unfinished"), (new(1), None), (new(2), None),
    ]  # fmt: skip
