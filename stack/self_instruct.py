"""Prompts that a model grows from a few seeds: self-instruct (Wang et al. 2022, arXiv 2212.10560).

In each round the model sees EXAMPLES prompts, a few of them grown ones as soon as there are any, and is asked for the
next. As in the paper, what is too short or too long, and what resembles a prompt that is there, is dropped; resemblance
is told by near_duplicates.py instead of ROUGE-L, which would compare each prompt with all others.
"""

import asyncio
import random
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from stack.near_duplicates import NearDuplicates

# The paper shows six seeds and two grown prompts.
EXAMPLES, GROWN_EXAMPLES = 8, 2
# How many questions one round asks side by side, and after how many rounds without a new prompt none is hoped for.
AT_ONCE = 16
BARREN_ROUNDS = 10
MIN_WORDS, MAX_WORDS = 3, 150
_NUMBERED = re.compile(r"^\s*(?:[-*•]|(?:task|prompt|question)?\s*#?\d+\s*[.:)])\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Said:
    """A model's answer. One that is not whole was ended by its bound of tokens."""

    text: str
    is_whole: bool = True


# The answer to a question, whose number the seed of the sampling follows from.
Ask = Callable[[int, str], Awaitable[Said]]


@dataclass(frozen=True)
class Grown:
    """What a model has proposed; `reason` is why it was dropped: `unfinished`, `length` or `duplicate`, of the prompt
    `of`."""

    prompt: str
    reason: str | None = None
    of: str | None = None


async def grow(
    ask: Ask, seeds: Sequence[str], known: Sequence[str], count: int, most: float, seed: int
) -> AsyncGenerator[list[Grown]]:
    """What the model proposes, round by round, until there are `count` new prompts, or BARREN_ROUNDS bring none.

    `known` are those that an earlier attempt has grown; they count. No two are more similar than `most`.
    """
    pool, seen = list(known), NearDuplicates(most)
    for one in (*seeds, *known):
        seen.add(one)
    first = barren = 0
    while len(pool) < count and barren < BARREN_ROUNDS:
        numbers = range(first, first + AT_ONCE)
        # Where an attempt goes on, it asks other questions than the one before has.
        questions = [question(examples(seeds, pool, f"{seed}:{len(known)}:{number}")) for number in numbers]
        answers = await asyncio.gather(*(ask(number, one) for number, one in zip(numbers, questions, strict=True)))
        found = [_judged(one, seen) for answer in answers for one in proposals(answer)]
        new = [one.prompt for one in found if one.reason is None]
        surplus = set(new[count - len(pool) :])
        pool += new[: count - len(pool)]
        barren = 0 if new else barren + 1
        first += AT_ONCE
        yield [one for one in found if one.reason is not None or one.prompt not in surplus]


def examples(seeds: Sequence[str], grown: Sequence[str], chance: str) -> list[str]:
    """Up to EXAMPLES prompts to show, of which up to GROWN_EXAMPLES are grown ones; drawn by `chance`."""
    drawn = random.Random(chance)
    some = drawn.sample(list(grown), min(GROWN_EXAMPLES, len(grown)))
    shown = some + drawn.sample(list(seeds), min(EXAMPLES - len(some), len(seeds)))
    drawn.shuffle(shown)
    return shown


def question(shown: Sequence[str]) -> str:
    """What the model is asked: the examples, and the next number."""
    listed = "\n".join(f"{number}. {' '.join(one.split())}" for number, one in enumerate(shown, 1))
    return (
        "Come up with a series of tasks that a person could give to an assistant. Each is complete in itself, and "
        f"another one than those before.\n\n{listed}\n\nWrite task {len(shown) + 1}, in one line, and nothing else."
    )


def proposals(said: Said) -> list[Grown]:
    """The prompts in a model's answer: its lines, without their numbers.

    One that was cut off is unfinished, and so is one that ends with a colon: what it speaks of would stand below it.
    """
    lines = [_NUMBERED.sub("", line).strip().strip('"') for line in said.text.splitlines()]
    is_cut = [not said.is_whole and number == len(lines) for number in range(1, len(lines) + 1)]
    return [
        Grown(line, "unfinished" if cut or line.endswith(":") else None)
        for line, cut in zip(lines, is_cut, strict=True)
        if line
    ]


def _judged(proposed: Grown, seen: NearDuplicates) -> Grown:
    if proposed.reason is not None:
        return proposed
    prompt = proposed.prompt
    words = len(prompt.split())
    if not MIN_WORDS <= words <= MAX_WORDS:
        return Grown(prompt, "length")
    if (earlier := seen.add(prompt)) is not None:
        return Grown(prompt, "duplicate", earlier)
    return Grown(prompt)
