"""What is in memory at once is bounded."""

import asyncio

from jobs.room import Room


async def waits(task: asyncio.Task[None]) -> bool:
    for _ in range(5):  # as far as it gets
        await asyncio.sleep(0)
    return not task.done()


async def test_who_asks_first_is_let_in_first_once_there_is_room() -> None:
    room = Room(10)
    await room.take(6)
    large, small = asyncio.create_task(room.take(5)), asyncio.create_task(room.take(1))
    assert await waits(large)
    assert await waits(small)
    assert room.change(6, 4) == 4
    await asyncio.gather(large, small)


async def test_what_is_larger_than_all_comes_alone() -> None:
    room = Room(10)
    await room.take(1)
    larger = asyncio.create_task(room.take(50))
    assert await waits(larger)
    assert room.change(1, 0) == 0
    await larger
    after = asyncio.create_task(room.take(1))
    assert await waits(after)
    room.change(50, 9)
    await after
