"""Clients of a stack with several gateways, who remember what was acknowledged.

They ask by a balancer: whichever of the gateways says that it is well. What the stack cannot do now (503, 429) and what
breaks off is asked again, as such a client's would be; each attempt is counted.
"""

import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import httpx

Outcome = Literal["ok", "refused", "broken", "failed"]

# A host without power says nothing, not even that it has gone. So connections ask whether their other end is there when
# it has said nothing for three seconds, and are broken off when it does not answer three times, or for six seconds does
# not take what is sent. (HAProxy: srvtcpka, tcp-ut.)
ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 3),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 6_000),
)
# What is not answered for so long is broken off; and streams that bring something every second or so, sooner.
SILENCE_S = 45.0
STALL_S = 15.0
GIVE_UP_S = 240.0
AGAIN_S = 0.5
# Between two requests of a client. All clients together keep a machine of two cores about half busy, so that there is
# room for what has to be started after a fault, as sizing.md plans for.
PAUSE_S = 1.2
# What Serve's proxy answers for a gateway that has died with the request; our own errors are JSON.
DIED = "500 Internal Server Error"
EACH = 2  # clients of each kind


class Again(Exception):
    """An attempt that is to be repeated: it was refused for now, or broke off."""

    def __init__(self, outcome: Outcome, why: str) -> None:
        super().__init__(why)
        self.outcome = outcome


class Wrong(Exception):
    """An answer that no client would ask for again, or one that cannot be true."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a request, by time.monotonic()."""

    kind: str
    gateway: str
    start: float
    end: float
    outcome: Outcome
    why: str = ""


@dataclass(frozen=True)
class Answered:
    """A request that was answered at last, with all of its attempts."""

    kind: str
    start: float
    end: float


@dataclass
class Log:
    """What has happened so far."""

    attempts: list[Attempt] = field(default_factory=list)
    answered: list[Answered] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # requests that were given up, and why


class Balancer:
    """Knows which gateways are well, as they say themselves once a second (Serve's /-/healthz)."""

    PATH = "/-/healthz"
    EVERY_S = 1.0

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)
        self.well = list(urls)
        self._next = itertools.count()

    def choose(self) -> str:
        """One gateway after the other. Any of them where none is well: the client will see."""
        well = self.well or self.urls
        return well[next(self._next) % len(well)]

    def is_down(self, url: str) -> None:
        """A client could not connect."""
        self.well = [one for one in self.well if one != url]

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Asks the gateways once a second while the block lasts, in one block after another."""
        stopped = threading.Event()
        with ThreadPoolExecutor(len(self.urls) + 1) as pool:
            looking = pool.submit(self._look, pool, stopped)
            try:
                yield
            finally:
                stopped.set()
                looking.result()

    def _look(self, pool: ThreadPoolExecutor, stopped: threading.Event) -> None:
        while not stopped.wait(self.EVERY_S):
            answers = list(pool.map(self._is_well, self.urls))
            self.well = [url for url, well in zip(self.urls, answers, strict=True) if well]

    def _is_well(self, url: str) -> bool:
        try:
            return httpx.get(f"{url}{self.PATH}", timeout=self.EVERY_S).status_code == 200
        except httpx.TransportError:
            return False


Send = Callable[[httpx.Client], None]


class Load:
    """Threads, each a client that does one kind of request again and again while `running` lasts."""

    def __init__(self, balancer: Balancer, key: str, seed: int) -> None:
        self.log = Log()
        self.balancer = balancer
        self.key = key
        self.stopped = threading.Event()
        self._seed = seed
        self._count = itertools.count()

    @contextmanager
    def running(self, kinds: "Sequence[Callable[[Client], None]]") -> Iterator[None]:
        """Each of `kinds` is called by EACH clients in a loop. What one raises is raised when the block ends."""
        self.stopped.clear()
        seed = f"{self._seed}/{next(self._count)}"
        with ThreadPoolExecutor(len(kinds) * EACH) as pool:
            tasks: list[Future[None]] = []
            for number in range(EACH):
                tasks += [pool.submit(self._run, one, Client(self, f"{seed}/{one.__name__}/{number}")) for one in kinds]
            try:
                yield
            finally:
                self.stopped.set()
        for task in tasks:
            task.result()

    def _run(self, once: "Callable[[Client], None]", client: "Client") -> None:
        try:
            while not self.stopped.is_set():
                try:
                    once(client)
                except Wrong as error:
                    self.log.lost.append(str(error))
                self.stopped.wait(PAUSE_S * client.random.uniform(0.5, 1.5))
        finally:
            client.close()


class Client:
    """One client, with a connection to each gateway."""

    def __init__(self, load: Load, seed: str) -> None:
        self.random = random.Random(seed)
        self._load = load
        self._connections: dict[str, httpx.Client] = {}

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()

    def do(self, kind: str, send: Send) -> None:
        """Sends a request until it is answered. `send` raises Again, httpx.TransportError and Wrong; so does this, the
        last one also for one that is not answered for GIVE_UP_S."""
        first = time.monotonic()
        while True:
            gateway = self._load.balancer.choose()
            start = time.monotonic()
            outcome, why = self._attempt(gateway, send)
            end = time.monotonic()
            self._load.log.attempts.append(Attempt(kind, gateway, start, end, outcome, why))
            if outcome == "ok":
                self._load.log.answered.append(Answered(kind, first, end))
                return
            if outcome == "failed" or end - first > GIVE_UP_S:
                raise Wrong(f"{kind} at {gateway}: {why}")
            threading.Event().wait(AGAIN_S)

    def _attempt(self, gateway: str, send: Send) -> tuple[Outcome, str]:
        try:
            send(self._connection(gateway))
        except httpx.ConnectError as error:
            self._load.balancer.is_down(gateway)
            return "broken", repr(error)
        except httpx.TransportError as error:
            return "broken", repr(error)
        except Again as error:
            return error.outcome, str(error)
        except Wrong as error:
            return "failed", str(error)
        return "ok", ""

    def _connection(self, gateway: str) -> httpx.Client:
        if gateway not in self._connections:
            self._connections[gateway] = httpx.Client(
                base_url=gateway,
                headers={"authorization": f"Bearer {self._load.key}"},
                timeout=httpx.Timeout(SILENCE_S, connect=2.0),
                transport=httpx.HTTPTransport(socket_options=ALIVE),
            )
        return self._connections[gateway]


def checked(reply: httpx.Response) -> httpx.Response:
    """An answer that is one. Raises Again where the stack says that it will work again, else Wrong."""
    if reply.status_code == 200:
        return reply
    words = f"{reply.status_code} {reply.read().decode(errors='replace')[:300]}"
    if reply.status_code in (429, 503):
        raise Again("refused", words)
    if words == DIED:
        raise Again("broken", words)
    raise Wrong(words)
