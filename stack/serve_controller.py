"""What Ray Serve's controller is asked: the state of the applications, and the ways to them.

There is one controller, on the head node. While that is away, each call of Serve's API waits until it is back, and
holds its thread. So calls are made in threads of their own, whoever asks what is being asked already waits for the same
answer, and nobody waits for long.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from stack.errors import Away

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

NAME = "Ray Serve"  # what /health calls it where it does not answer
ANSWER_S = 3.0
# Of a way, for which a process that has not asked Serve before first has to find the controller.
WAY_S = 10.0
KEPT_S = 1.0
# One for the state, which one call at a time asks for, and one for ways, so that first requests do not wait for it.
THREADS = 2
T = TypeVar("T")


class Controller:
    """Asks the controller for one process, in any of its event loops and threads."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "serve-controller")
        self._asking = threading.Lock()
        self._asked: dict[Hashable, Future[Any]] = {}
        self._seen: dict[str, ApplicationStatusOverview] | None = None
        self._seen_at = 0.0

    async def applications(self) -> "dict[str, ApplicationStatusOverview]":
        """The state of every application, as it was at most KEPT_S ago. Raises Away."""
        seen = self._seen
        if seen is None or time.monotonic() - self._seen_at > KEPT_S:
            seen = await self._answer(ANSWER_S, self._look)
        return seen

    def applications_now(self) -> "dict[str, ApplicationStatusOverview]":
        """The same for a thread, and not from before: of now, or as others are being told it. Raises Away."""
        try:
            return self._ask(self._look).result(ANSWER_S)
        except TimeoutError as error:
            raise _silent(ANSWER_S) from error

    async def handle(self, application: str) -> Any:
        """The way to an application. Raises Away, and Serve's and Ray's own errors, where there is no such one, say."""
        from ray import serve

        return await self._answer(WAY_S, serve.get_app_handle, application)

    def _look(self) -> "dict[str, ApplicationStatusOverview]":
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            seen = serve.status().applications
        except (RayError, RayServeException) as error:
            raise Away("Ray Serve does not tell the state of the models") from error
        self._seen, self._seen_at = seen, time.monotonic()
        return seen

    async def _answer(self, seconds: float, ask: Callable[..., T], *about: Hashable) -> T:
        try:
            # Others wait for the same, which one that goes must not cancel.
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._ask(ask, *about))), seconds)
        except TimeoutError as error:
            raise _silent(seconds) from error

    def _ask(self, ask: Callable[..., T], *about: Hashable) -> Future[T]:
        question = (ask, *about)
        with self._asking:
            asked = self._asked.get(question)
            if asked is None:
                asked = self._asked[question] = self._threads.submit(ask, *about)
                asked.add_done_callback(lambda _: self._asked.pop(question))
            return asked


def _silent(seconds: float) -> Away:
    return Away(f"Ray Serve's controller has not answered within {seconds:g} s")
