"""Asks a stack again that is away for a while: a gateway has died, a node is lost, or there is too much to do.

Behind one address there are several gateways, and what waits for a job for hours must outlive each of them. What is
asked again must not be done twice by that: see `Patient.send`.
"""

import sys
import time
from collections.abc import Callable

import httpx

# How long it is asked again in all, and how long after each time at least and at most.
PATIENCE_S = 600.0
FIRST_S, MOST_S = 1.0, 60.0
BUSY, AWAY = 429, 503
# What Ray Serve's proxy and balancers answer in the place of a gateway that is away, in words of their own.
OF_PROXIES = (500, 502, AWAY, 504)


class Patient:
    """A client that asks again. `wait` waits for so many seconds."""

    def __init__(self, client: httpx.Client, wait: Callable[[float], None]) -> None:
        self._client = client
        self._wait = wait
        self._has_answered = False

    def send(self, request: Callable[[], httpx.Request], repeatable: bool, stream: bool = False) -> httpx.Response:
        """The answer to a request, which is made anew each time; after PATIENCE_S, whatever comes.

        One that is `repeatable`, as twice is the same as once, is asked again after each failure that passes. Another
        one only where the stack has not begun with it: it was not reached, or says itself when to ask again. Raises
        httpx.TransportError, at once where nothing has answered at the address so far: it may be a wrong one.
        """
        spent, least = 0.0, FIRST_S
        while True:
            began = time.monotonic()
            reply: httpx.Response | None = None
            try:
                reply = self._client.send(request(), stream=stream)
                self._has_answered = True
                if stream and reply.status_code != 200:
                    reply.read()
                if not _passes(reply, repeatable):
                    return reply
                seconds, why = max(least, _retry_after(reply) or 0.0), f"answers {reply.status_code}"
            except httpx.TransportError as error:
                not_begun = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                if not self._has_answered or not (repeatable or not_begun) or spent >= PATIENCE_S:
                    raise
                seconds, why = least, f"does not answer ({error!r})"
            if reply is not None and spent >= PATIENCE_S:
                return reply
            seconds = min(seconds, MOST_S)
            print(f"the stack {why}: it is asked again in {seconds:.0f} s", file=sys.stderr, flush=True)
            self._wait(seconds)
            # What was lost by this time, too: an answer that does not come is waited for long.
            spent += max(seconds, time.monotonic() - began)
            least = min(2 * least, MOST_S)


def _passes(reply: httpx.Response, repeatable: bool) -> bool:
    """Whether it may be well when it is asked again."""
    if reply.status_code in (BUSY, AWAY) and _retry_after(reply) is not None:
        return True
    if not repeatable:
        return False
    return reply.status_code in (BUSY, AWAY) or (reply.status_code in OF_PROXIES and not _is_of_the_stack(reply))


def _retry_after(reply: httpx.Response) -> float | None:
    """The seconds after which the stack is to be asked again, where it says so."""
    told = reply.headers.get("retry-after", "")
    return float(told) if told.isdecimal() else None


def _is_of_the_stack(reply: httpx.Response) -> bool:
    """Whether an error is told in the stack's own envelope."""
    try:
        answer = reply.json()
    except ValueError:
        return False
    return isinstance(answer, dict) and isinstance(answer.get("error"), dict)
