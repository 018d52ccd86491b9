"""Workers that ask models about rows: what is asked again, what is recorded, and when it is too much."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stack.config import Config
from stack.context import Context
from stack.errors import BadInput, EngineFailed, NotFound, StackError, TooManyRequests, Unavailable
from tests.conftest import CONFIG
from tests.varied_engine import VariedEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from jobs import asking
    from jobs.asking import Asker, Failures, patiently
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
def engine(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VariedEngine]:
    engine, opened, really_open = VariedEngine(), [], Context.open

    def on_this_engine(config: Config) -> Context:
        opened.append(really_open(config, engine))
        return opened[-1]

    monkeypatch.setattr(Context, "open", on_this_engine)
    yield engine
    for context in opened:
        context.close()


class Ask(Asker):
    """Asks for the answer to each row's messages."""

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        body = {"model": "small", "stream": False, "messages": value["messages"]}
        return {"result": (await self._context.models.answer("chat", body)).decode()}


def rows(*questions: str) -> list[dict[str, Any]]:
    values = [{"messages": [{"role": "user", "content": one}]} for one in questions]
    return [{"row": number, "value": json.dumps(value)} for number, value in enumerate(values, 1)]


def ask(*questions: str, most: int = 0) -> list[dict[str, Any]]:
    return list(answered(rows(*questions), Ask(CONFIG, "default", Failures(most))))


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
    found = ask("a", "long", "c", most=1)
    assert [bool(one["result"]) for one in found] == [True, False, True]
    assert [one["error"] for one in (found[0], found[2])] == ["", ""]
    assert json.loads(found[1]["error"]) == {
        "code": "bad_input", "message": TOO_LONG.message, "type": "invalid_request_error", "param": "messages",
    }  # fmt: skip
    assert [one["row"] for one in found] == [1, 2, 3]


def test_more_failed_rows_than_allowed_end_the_job_with_the_first_error(engine: VariedEngine) -> None:
    engine.refusals["long"] = TOO_LONG
    with pytest.raises(BadInput) as caught:
        ask("a", "long", "c", "d", "long", most=1)
    many, first = caught.value.message.split("; the first of them: ")
    assert many == "2 rows have failed; allowed: max_failed_rows, 1"
    assert first == "row 2: the prompt has 300 tokens; allowed: 256"


def test_failures_of_an_earlier_attempt_count() -> None:
    failures = Failures(most=3, count=3, first="row 5: it is empty")
    with pytest.raises(NotFound, match=r"4 rows have failed; .* the first of them: row 5: it is empty"):
        failures.add(9, NotFound("gone"))


def test_where_none_may_fail_the_first_failed_row_ends_the_job(engine: VariedEngine) -> None:
    engine.refusals["long"] = TOO_LONG
    with pytest.raises(BadInput, match=r"^row 2: the prompt has 300 tokens"):
        ask("a", "long")


@pytest.mark.parametrize("error", [Unavailable("it starts"), TooManyRequests("full")])
def test_a_model_that_is_away_is_no_fault_of_a_row(
    engine: VariedEngine, waits: list[float], monkeypatch: pytest.MonkeyPatch, error: StackError
) -> None:
    monkeypatch.setattr("stack.batch_inference.PATIENCE_S", 0)
    engine.fail(error)
    with pytest.raises(Unavailable, match=f"row 1: {error.message}"):
        ask("a", most=100)
