"""Threads of their own for what reads whole data sets, so that other routes never wait for one."""

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Concatenate, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, move_on_after, to_thread

from stack.context import Context
from stack.errors import StackError, TooManyRequests, Unavailable

P = ParamSpec("P")
T = TypeVar("T")


class Readers:
    """Reads at most `places` data sets at once, of each tenant at most `places_of_tenant`, so that none holds all.

    Others wait without a thread, for a place for at most `wait_s`.
    """

    def __init__(self, places: int, places_of_tenant: int, wait_s: float) -> None:
        self._places = CapacityLimiter(places)
        self._places_of_tenant = places_of_tenant
        # A tenant's places are kept only while somebody has or wants one.
        self._tenants: WeakValueDictionary[str, CapacityLimiter] = WeakValueDictionary()
        self._wait_s = wait_s
        self._threads = CapacityLimiter(math.inf)

    async def run(self, work: Callable[Concatenate[Context, P], T], context: Context, *args: P.args) -> T:  # type: ignore[valid-type]
        """What a behaviour returns, which runs in a thread.

        Raises TooManyRequests where the tenant's own requests, and Unavailable where those of others take all places.
        """
        places = self._tenants.get(context.tenant) or CapacityLimiter(self._places_of_tenant)
        self._tenants[context.tenant] = places
        most = f"{self._places_of_tenant} data sets of the tenant {context.tenant!r} are read already"
        async with (
            self._place(places, TooManyRequests(f"{most}; allowed: {self._places_of_tenant} at once")),
            self._place(self._places, Unavailable("too many data sets are read at the moment")),
        ):
            return await to_thread.run_sync(work, context, *args, limiter=self._threads)

    @asynccontextmanager
    async def _place(self, places: CapacityLimiter, otherwise: StackError) -> AsyncIterator[None]:
        mine = object()
        with move_on_after(self._wait_s) as wait:
            await places.acquire_on_behalf_of(mine)
        if wait.cancelled_caught:
            raise otherwise
        try:
            yield
        finally:
            places.release_on_behalf_of(mine)


# Of one gateway.
READERS = Readers(places=4, places_of_tenant=2, wait_s=30)
