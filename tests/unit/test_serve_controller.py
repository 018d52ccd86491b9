"""A controller of Serve's that does not answer: nobody waits for long, and nothing else waits for it. Without Ray."""

import asyncio
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ray.exceptions import RayActorError

from stack import serve_controller
from stack.config import LanguageModel
from stack.errors import Away
from stack.serve_controller import Controller
from stack.serve_engine import ServeEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from ray import serve
    from ray.serve.exceptions import RayServeException
    from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeStatus

    from serve_apps.deployer import ServeDeployer

SOON_S = 5.0
RUNNING = ApplicationStatusOverview(ApplicationStatus.RUNNING, "", 0.0, {})


class ScriptedServe:
    """Serve's functions, which answer while `answers` is set, and wait for it as Serve waits for its controller."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.asked: list[str] = []
        self.status_fault: Exception | None = None

    def status(self) -> ServeStatus:
        self.asked.append("status")
        assert self.answers.wait(60)
        if self.status_fault is not None:
            raise self.status_fault
        return ServeStatus(applications={"small": RUNNING})

    def get_app_handle(self, name: str) -> str:
        self.asked.append(name)
        assert self.answers.wait(60)
        if name == "unknown":
            raise RayServeException("Application 'unknown' does not exist.")
        return f"the way to {name}"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServe]:
    scripted = ScriptedServe()
    monkeypatch.setattr(serve, "status", scripted.status)
    monkeypatch.setattr(serve, "get_app_handle", scripted.get_app_handle)
    monkeypatch.setattr(serve_controller, "ANSWER_S", 0.1)
    monkeypatch.setattr(serve_controller, "WAY_S", 0.1)
    yield scripted
    scripted.answers.set()


async def test_who_asks_meanwhile_waits_for_the_same_answer(
    scripted: ScriptedServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_controller, "ANSWER_S", 60.0)
    monkeypatch.setattr(serve_controller, "WAY_S", 60.0)
    controller = Controller()
    asking = asyncio.gather(
        *(controller.applications() for _ in range(10)), *(controller.handle("small") for _ in range(10))
    )
    await asyncio.sleep(0)
    scripted.answers.set()
    assert await asking == [{"small": RUNNING}] * 10 + ["the way to small"] * 10
    assert sorted(scripted.asked) == ["small", "status"]


async def test_a_state_is_kept_a_moment_and_then_asked_for_again(
    scripted: ScriptedServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.answers.set()
    controller = Controller()
    for _ in range(3):
        assert await controller.applications() == {"small": RUNNING}
    assert scripted.asked == ["status"]
    monkeypatch.setattr(serve_controller, "KEPT_S", 0.0)
    await controller.applications()
    assert scripted.asked == ["status"] * 2


@pytest.mark.parametrize("ask", [Controller.applications, lambda controller: controller.handle("small")])
async def test_who_is_not_answered_in_time_hears_so_and_later_asks_get_the_answer(
    scripted: ScriptedServe, ask: Callable[[Controller], Any]
) -> None:
    controller = Controller()
    for _ in range(3):
        with pytest.raises(Away, match=r"has not answered within 0\.1 s"):
            await asyncio.wait_for(ask(controller), SOON_S)
    assert len(scripted.asked) == 1
    scripted.answers.set()
    assert await asyncio.wait_for(ask(controller), SOON_S)


async def test_one_that_gives_up_takes_the_answer_from_nobody(
    scripted: ScriptedServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_controller, "ANSWER_S", 60.0)
    monkeypatch.setattr(serve_controller, "WAY_S", 60.0)
    controller = Controller()
    leaves, stays = (asyncio.create_task(controller.handle("small")) for _ in range(2))
    await asyncio.sleep(0)
    leaves.cancel()
    scripted.answers.set()
    assert await asyncio.wait_for(stays, SOON_S) == "the way to small"


async def test_an_unanswered_state_does_not_hold_up_a_first_request(
    scripted: ScriptedServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "get_app_handle", lambda name: f"the way to {name}")
    controller = Controller()
    with pytest.raises(Away):
        await controller.applications()
    assert await controller.handle("small") == "the way to small"


async def test_an_unanswered_way_does_not_hold_up_the_loops_own_threads(scripted: ScriptedServe) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    engine = ServeEngine()
    begun = time.monotonic()
    answers = await asyncio.gather(*(engine._handle("small") for _ in range(5)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [Away] * 5
    assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), SOON_S) == "free"
    assert time.monotonic() - begun < SOON_S
    assert scripted.asked == ["small"]


async def test_a_model_that_is_late_while_the_controller_is_silent_is_away(scripted: ScriptedServe) -> None:
    engine = ServeEngine()
    with pytest.raises(Away, match="has not answered within"):
        async with engine._our_errors("small", LanguageModel(id="small", path="models/small")):
            raise TimeoutError


async def test_serves_own_faults_are_told(scripted: ScriptedServe) -> None:
    scripted.answers.set()
    scripted.status_fault = RayActorError()
    controller = Controller()
    with pytest.raises(Away, match="does not tell the state"):
        await controller.applications()
    with pytest.raises(RayServeException, match="does not exist"):
        await controller.handle("unknown")
    scripted.status_fault = None
    assert await controller.applications() == {"small": RUNNING}


async def test_threads_that_ask_for_the_models_wait_no_longer_either(scripted: ScriptedServe) -> None:
    deployer = ServeDeployer(Controller())
    asking = asyncio.gather(*(asyncio.to_thread(deployer.applications) for _ in range(3)), return_exceptions=True)
    assert [type(answer) for answer in await asyncio.wait_for(asking, SOON_S)] == [Away] * 3
    assert scripted.asked == ["status"]
    scripted.answers.set()
    assert list(await asyncio.to_thread(deployer.applications)) == ["small"]


def test_the_models_are_asked_for_anew_each_time(scripted: ScriptedServe) -> None:
    scripted.answers.set()
    deployer = ServeDeployer(Controller())
    for _ in range(2):
        deployer.applications()
    assert scripted.asked == ["status"] * 2
