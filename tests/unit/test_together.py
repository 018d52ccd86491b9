"""What is done for several at once: together while the one before is under way, each with its own outcome."""

import asyncio
import warnings

import pytest

from stack.errors import BadInput, Unavailable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs.together import Together


class Doubles:
    """Doubles numbers once it may; refuses odd ones."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.may_go = asyncio.Event()
        self.is_away = False
        self.is_broken = False

    async def __call__(self, numbers: list[int]) -> list[int | BadInput]:
        self.asked.append(numbers)
        await self.may_go.wait()
        if self.is_away:
            raise Unavailable("away")
        if self.is_broken:
            raise OSError("the disk is gone")
        return [BadInput(f"{one} is odd") if one % 2 else 2 * one for one in numbers]


async def test_what_comes_meanwhile_is_done_next_together() -> None:
    do = Doubles()
    together = Together[int, int](do, most=3)
    asked = [asyncio.create_task(together.one(number)) for number in range(0, 10, 2)]
    await asyncio.sleep(0)
    do.may_go.set()
    assert await asyncio.gather(*asked) == [0, 4, 8, 12, 16]
    assert [one for part in do.asked for one in part] == [0, 2, 4, 6, 8]
    assert max(map(len, do.asked)) <= 3
    assert len(do.asked) < 5


async def test_one_that_is_refused_is_alone_with_it() -> None:
    do = Doubles()
    do.may_go.set()
    together = Together[int, int](do, most=10)
    found = await asyncio.gather(*(together.one(number) for number in range(4)), return_exceptions=True)
    assert [found[0], found[2]] == [0, 4]
    assert [str(found[1]), str(found[3])] == ["1 is odd", "3 is odd"]


async def test_what_fails_for_all_is_told_to_all_and_the_next_is_tried_again() -> None:
    do = Doubles()
    do.may_go.set()
    do.is_away = True
    together = Together[int, int](do, most=10)
    found = await asyncio.gather(*(together.one(number) for number in range(3)), return_exceptions=True)
    assert all(isinstance(one, Unavailable) for one in found)
    do.is_away = False
    assert await together.one(2) == 4
    with pytest.raises(BadInput):
        await together.one(3)


async def test_an_error_that_nobody_has_foreseen_is_told_to_all_as_well() -> None:
    do = Doubles()
    do.is_broken = True
    together = Together[int, int](do, most=10)
    asked = [asyncio.create_task(together.one(number)) for number in range(3)]
    await asyncio.sleep(0)
    do.may_go.set()
    async with asyncio.timeout(30):
        found = await asyncio.gather(*asked, return_exceptions=True)
    assert [str(one) for one in found] == ["the disk is gone"] * 3
    assert do.asked == [[0], [1, 2]]
