"""A bound on how many bytes of work are in memory at once."""

import asyncio


class Room:
    """So many bytes for what is being worked on. Who asks first is let in first; what is over them comes alone."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    async def take(self, size: int) -> None:
        """Waits until there is room for so much."""
        async with self._turn:
            while self._taken and self._taken + size > self._size:
                self._freed.clear()
                await self._freed.wait()
            self._taken += size

    def change(self, taken: int, size: int) -> int:
        """What was taken has turned out to be of another size, which this returns: 0 once it is gone."""
        self._taken += size - taken
        self._freed.set()
        return size
