"""Workers that ask models about rows: what is asked again, what is recorded, and when a model is away for all."""

import asyncio
import json
import warnings
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from stack.api.inference import ChatCompletionRequest
from stack.api.messages import MAX_CHARACTERS, UserMessage
from stack.config import Config
from stack.context import Context
from stack.errors import BadInput, EngineFailed, StackError, TooManyRequests, Unavailable
from stack.inference import ask_chat
from stack.models import Endpoint
from tests.conftest import CONFIG
from tests.varied_engine import VariedEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs import asking
    from jobs.asking import Asker, patiently
    from tests.asked_here import answered

TOO_LONG = BadInput("the prompt has 300 tokens; allowed: 256", param="messages")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how long was waited: nobody does."""
    waited: list[float] = []

    async def no_pause(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(asking, "pause", no_pause)
    return waited


@pytest.fixture
def engine(home: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[VariedEngine]:
    engine, opened, really_open = getattr(request, "param", VariedEngine)(), [], Context.open

    def on_this_engine(config: Config) -> Context:
        opened.append(really_open(config, engine))
        return opened[-1]

    monkeypatch.setattr(Context, "open", on_this_engine)
    yield engine
    for context in opened:
        context.close()


class Chat(Asker):
    """Asks for the answer to each row's text."""

    nothing: ClassVar[dict[str, Any]] = {"answer": ""}
    harmless: ClassVar[dict[str, Any]] = {"text": "Hello"}

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        chat = ChatCompletionRequest(model="small", messages=[UserMessage(content=value["text"])])
        answer = await patiently(lambda: ask_chat(self._context, chat))
        return {"answer": str(answer.message.content)}


def ask(*questions: str) -> list[dict[str, Any]]:
    rows = [{"row": number, "value": json.dumps({"text": one})} for number, one in enumerate(questions, 1)]
    return list(answered(rows, Chat(CONFIG, "default")))


class Fails:
    """Fails so many times, then answers."""

    def __init__(self, *errors: StackError) -> None:
        self.errors = list(errors)
        self.asked = 0

    async def __call__(self) -> str:
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


async def test_a_model_that_is_away_is_asked_again_after_the_time_that_it_says(waits: list[float]) -> None:
    fails = Fails(Unavailable("it starts", retry_after=7), TooManyRequests("full", retry_after=2), Unavailable("a"))
    assert await patiently(fails) == "answer"
    assert waits == [7, 2, 5]


async def test_a_model_that_stays_away_is_given_up(waits: list[float]) -> None:
    fails = Fails(*[Unavailable("it starts")] * 20)
    with pytest.raises(Unavailable, match="it starts"):
        await patiently(fails)
    assert fails.asked == asking.TRIES


async def test_a_model_that_fails_is_asked_a_few_times(waits: list[float]) -> None:
    fails = Fails(EngineFailed("it died"), EngineFailed("it died"))
    assert await patiently(fails) == "answer"
    fails = Fails(*[EngineFailed("it died")] * 20)
    with pytest.raises(EngineFailed):
        await patiently(fails)
    assert fails.asked == asking.TRIES_OF_FAILED


async def test_what_is_wrong_with_the_row_is_not_asked_again(waits: list[float]) -> None:
    fails = Fails(TOO_LONG)
    with pytest.raises(BadInput):
        await patiently(fails)
    assert (fails.asked, waits) == (1, [])


def test_a_row_that_fails_is_recorded_and_the_others_are_answered(engine: VariedEngine) -> None:
    engine.refusals["long"] = TOO_LONG
    found = ask("a", "long", "c")
    assert [bool(one["answer"]) for one in found] == [True, False, True]
    assert [one["error"] for one in (found[0], found[2])] == ["", ""]
    assert json.loads(found[1]["error"]) == {
        "code": "bad_input", "message": TOO_LONG.message, "type": "invalid_request_error", "param": "messages",
    }  # fmt: skip
    assert [one["row"] for one in found] == [1, 2, 3]


def test_a_row_over_the_bounds_of_a_request_fails_alone(engine: VariedEngine) -> None:
    found = ask("a", "x" * (MAX_CHARACTERS + 1), "c")
    assert [bool(one["answer"]) for one in found] == [True, False, True]
    error = json.loads(found[1]["error"])
    assert error["code"] == "bad_input"
    assert f"at most {MAX_CHARACTERS} characters" in error["message"]


@pytest.mark.parametrize("error", [Unavailable("it starts"), TooManyRequests("full")])
def test_a_model_that_is_away_is_no_fault_of_a_row(
    engine: VariedEngine, waits: list[float], monkeypatch: pytest.MonkeyPatch, error: StackError
) -> None:
    monkeypatch.setattr("stack.batch_inference.PATIENCE_S", 0)
    engine.fail(error)
    found = ask("a", "b")
    assert [(one["away"], one["error"], one["answer"]) for one in found] == [(error.message, "", "")] * 2


def test_what_was_answered_before_a_model_stays_away_is_kept_and_nothing_more_is_asked(
    engine: VariedEngine, waits: list[float]
) -> None:
    engine.away_after = 2
    found = ask("a", "b", "c", "d", "e", "f")  # of which a batch has four
    assert [bool(one["answer"]) for one in found] == [True, True, False, False, False, False]
    assert [one["away"] for one in found] == ["", "", *["the model is being started"] * 4]
    asked = {one.body["messages"][-1]["content"] for one in engine.asked}
    assert asked == {"a", "b", "c", "d", "Hello"}


@pytest.mark.parametrize("questions", [["poison"], ["a", "poison", "c"]], ids=["alone", "among others"])
def test_a_row_that_is_never_answered_while_the_model_is_there_has_failed(
    engine: VariedEngine, waits: list[float], questions: list[str]
) -> None:
    engine.refusals["poison"] = Unavailable("the model 'small' has not answered within 600 s")
    found = ask(*questions)
    assert [bool(one["answer"]) for one in found] == [one != "poison" for one in questions]
    (error,) = (json.loads(one["error"]) for one in found if one["error"])
    assert (error["code"], error["message"]) == ("unavailable", "the model 'small' has not answered within 600 s")


class Fragile(VariedEngine):
    """Breaks down under 'poison', with all that is asked beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way: list[str] = []

    async def _generate(self, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        text = body["messages"][-1]["content"]
        self.under_way.append(text)
        try:
            await asyncio.sleep(0)
            if "poison" in self.under_way:
                raise Unavailable("the replica died")
        finally:
            self.under_way.remove(text)
        async for item in super()._generate(endpoint, body):
            yield item


@pytest.mark.parametrize("engine", [Fragile], indirect=True)
def test_a_row_that_breaks_the_model_does_not_take_those_beside_it_along(engine: Fragile, waits: list[float]) -> None:
    found = ask("a", "b", "poison")
    assert [bool(one["answer"]) for one in found] == [True, True, False]
    assert json.loads(found[2]["error"])["message"] == "the replica died"


class Counting(VariedEngine):
    """Knows how many were asked at once at most."""

    def __init__(self) -> None:
        super().__init__()
        self.at_once = self.most = 0

    async def _generate(self, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(0.01)
        self.at_once -= 1
        async for item in super()._generate(endpoint, body):
            yield item


@pytest.mark.parametrize("engine", [Counting], indirect=True)
def test_a_worker_asks_side_by_side_and_in_bounds(engine: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "ROWS_AT_ONCE", 3)
    assert all(one["answer"] for one in ask("a", "b", "c", "d"))
    assert engine.most == 3


class Restarting(Counting):
    """Has died, and is there again when it is asked something harmless."""

    def __init__(self) -> None:
        super().__init__()
        self.is_there = False

    async def _generate(self, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        self.is_there = self.is_there or body["messages"][-1]["content"] == "Hello"
        if not self.is_there:
            raise Unavailable("the replica died")
        async for item in super()._generate(endpoint, body):
            yield item


@pytest.mark.parametrize("engine", [Restarting], indirect=True)
def test_after_a_crash_the_rows_are_asked_again_side_by_side(engine: Restarting, waits: list[float]) -> None:
    assert all(one["answer"] for one in ask("a", "b", "c", "d"))
    asked = [one.body["messages"][-1]["content"] for one in engine.asked]
    assert asked.count("Hello") == 1
    assert engine.most == 4


def test_each_row_has_the_same_columns_whatever_comes_of_it(engine: VariedEngine, waits: list[float]) -> None:
    engine.refusals["long"] = TOO_LONG
    engine.away_after = 1
    answered, failed, away = ask("a", "long", "c")
    assert [bool(one["answer"]) for one in (answered, failed, away)] == [True, False, False]
    assert [bool(one["error"]) for one in (answered, failed, away)] == [False, True, False]
    assert [bool(one["away"]) for one in (answered, failed, away)] == [False, False, True]
    assert {*answered} == {*failed} == {*away} == {"row", "value", "answer", "error", "away"}
