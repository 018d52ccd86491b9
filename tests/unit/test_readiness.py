"""What /health tells of Serve's applications and the job supervisor, and while Serve's controller is away."""

import asyncio
import threading
import time
import warnings
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray.exceptions import RayActorError

from stack import serve_controller
from stack.config import Config
from stack.context import Context
from stack.serve_controller import Controller

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from ray import serve
    from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeStatus

    from serve_apps import gateway, readiness
    from serve_apps.readiness import Readiness

SOON_S = 5.0
CONFIG = Config.parse({"models": [{"id": "small", "path": "models/small"}]}, "the tests' config")
Problem = Callable[[], Coroutine[Any, Any, str | None]]


class Supervisor:
    """A handle of the job supervisor, whose `problem` is a given function."""

    def __init__(self, problem: Problem) -> None:
        self.problem = SimpleNamespace(remote=lambda: Call(problem()))


class Call:
    """What a handle gives: it can be awaited and cancelled."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._task = asyncio.ensure_future(work)

    def __await__(self) -> Any:
        return self._task.__await__()

    def cancel(self) -> None:
        self._task.cancel()


async def well() -> None:
    return None


def ready(problem: Problem = well) -> Readiness:
    supervisor: Any = Supervisor(problem)
    return Readiness(CONFIG, Controller(), supervisor)


def application(status: ApplicationStatus, **deployments: str) -> ApplicationStatusOverview:
    of = {name: SimpleNamespace(status=Status(status)) for name, status in deployments.items()}
    return ApplicationStatusOverview(status, "", 0.0, of)


class Status(str):
    @property
    def value(self) -> str:
        return str(self)


@pytest.fixture
def applications(monkeypatch: pytest.MonkeyPatch) -> dict[str, ApplicationStatusOverview]:
    """What Serve has; tests put something in."""
    found = {
        "small": application(ApplicationStatus.RUNNING),
        "gateway": application(ApplicationStatus.RUNNING, MemoryWriter="HEALTHY", SessionPool="HEALTHY"),
    }
    monkeypatch.setattr(serve, "status", lambda: ServeStatus(applications=found))
    return found


async def test_where_all_is_well_nothing_is_waited_for(applications: dict[str, ApplicationStatusOverview]) -> None:
    assert await ready()() == {}


async def test_what_is_not_well_is_named(applications: dict[str, ApplicationStatusOverview]) -> None:
    applications["small"] = application(ApplicationStatus.DEPLOYING)
    applications["gateway"] = application(ApplicationStatus.RUNNING, MemoryWriter="UNHEALTHY", SessionPool="UPDATING")
    assert await ready()() == {"small": "DEPLOYING", "memory writer": "UNHEALTHY", "pool of sessions": "UPDATING"}
    del applications["small"], applications["gateway"]
    assert await ready()() == {"small": "NOT DEPLOYED"}


async def test_the_job_supervisor_tells_its_problem_and_is_named_where_it_is_dead(
    applications: dict[str, ApplicationStatusOverview],
) -> None:
    async def problem() -> str:
        return "the nodes share too little"

    async def dead() -> None:
        raise RayActorError

    assert await ready(problem)() == {"job supervisor": "the nodes share too little"}
    assert list(await ready(dead)()) == ["job supervisor"]


async def test_a_job_supervisor_that_does_not_answer_is_named_in_time(
    applications: dict[str, ApplicationStatusOverview], monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = asyncio.Event()

    async def never() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    monkeypatch.setattr(readiness, "ANSWER_S", 0.1)
    waiting = await asyncio.wait_for(ready(never)(), SOON_S)
    assert waiting == {"job supervisor": "it has not answered within 0.1 s"}
    await asyncio.wait_for(cancelled.wait(), SOON_S)


async def test_while_the_controller_is_away_health_says_so_in_time_and_holds_no_thread_of_the_gateway(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys are looked up in the threads of the loop, of which there are few."""
    back, asked = threading.Event(), []

    def away() -> ServeStatus:
        asked.append("status")
        assert back.wait(60)
        return ServeStatus()

    monkeypatch.setattr(serve, "status", away)
    monkeypatch.setattr(serve_controller, "ANSWER_S", 0.1)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    app = gateway.create_app(context, ready())
    begun = time.monotonic()
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 50_000))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8321") as http:
            replies = await asyncio.gather(*(http.get("/health") for _ in range(5)))
            assert [reply.status_code for reply in replies] == [503] * 5
            waiting = {"Ray Serve": "Ray Serve's controller has not answered within 0.1 s"}
            assert replies[0].json()["waiting_for"] == waiting
            assert (await http.get("/datasets/list")).status_code == 200
        assert time.monotonic() - begun < SOON_S
        assert asked == ["status"]
    finally:
        back.set()
