import asyncio

import pytest

from stack.errors import BadInput
from stack.memory_banks.tasks import all_of


async def test_results_come_in_the_order_of_the_tasks() -> None:
    first_may_end = asyncio.Event()

    async def first() -> int:
        await first_may_end.wait()
        return 1

    async def second() -> int:
        first_may_end.set()
        return 2

    assert await all_of([first(), second()]) == [1, 2]


async def test_the_first_that_fails_ends_the_others_and_is_raised_itself() -> None:
    ended = asyncio.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def failing() -> None:
        raise BadInput("this one")

    with pytest.raises(BadInput, match="this one"):
        await all_of([endless(), failing()])
    assert ended.is_set()
