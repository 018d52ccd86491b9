"""The stream of a turn's events: read at any pace, from anywhere, held back, withdrawn, and bounded."""

import asyncio
import json
from typing import Any

import pytest

from stack.agentic_system import events as events_module
from stack.agentic_system.events import MAX_PIECES, Progress, Stream
from stack.agentic_system.replay import begun
from stack.errors import BadInput, Conflict


def step(stream: Stream, number: int, attempt: int = 1) -> Progress:
    return Progress(stream, number, attempt, "inference", f"step-{number}")


def end(progress: Progress, text: str = "") -> None:
    progress.end({"step_type": "inference", "step_id": "s", "model_response": {"content": text}})


async def ids(stream: Stream, after: str | None = None) -> list[str]:
    return [event.id async for event in stream.read(after)]


def payload(data: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(data)["event"]["payload"]
    return found


def two_steps() -> Stream:
    stream = begun("t")
    for number in (1, 2):
        progress = step(stream, number)
        progress.begin()
        progress.model_text("a")
        progress.model_text("b")
        end(progress)
    stream.finish()
    return stream


async def test_events_are_as_the_specification_has_them() -> None:
    stream = begun("t")
    progress = step(stream, 1)
    progress.begin({"model": "m"})
    progress.model_text("Paris")
    progress.call("", "started")
    progress.call("{", "in_progress")
    progress.call({"call_id": "c", "tool_name": "run", "arguments": {}}, "success")
    progress.tool_text("c", "done")
    stream.finish()
    of = {"step_type": "inference", "step_id": "step-1"}
    assert [payload(event.data) for event in [event async for event in stream.read()]] == [
        {"event_type": "turn_start", "turn_id": "t"},
        {"event_type": "step_start", **of, "metadata": {"model": "m"}},
        {"event_type": "step_progress", **of, "model_response_text_delta": "Paris"},
        {"event_type": "step_progress", **of, "tool_call_delta": {"content": "", "parse_status": "started"}},
        {"event_type": "step_progress", **of, "tool_call_delta": {"content": "{", "parse_status": "in_progress"}},
        {
            "event_type": "step_progress",
            **of,
            "tool_call_delta": {
                "content": {"call_id": "c", "tool_name": "run", "arguments": {}},
                "parse_status": "success",
            },
        },
        {"event_type": "step_progress", **of, "tool_response_text_delta": "done", "call_id": "c"},
    ]


async def test_a_reader_goes_on_behind_any_event() -> None:
    stream = two_steps()
    whole = await ids(stream)
    assert whole == ["start", "1.1.0", "1.1.1", "1.1.2", "1.end", "2.1.0", "2.1.1", "2.1.2", "2.end"]
    for at, one in enumerate(whole):
        assert await ids(stream, one) == whole[at + 1 :]


async def test_behind_a_lost_attempt_comes_the_one_after_it() -> None:
    stream = begun("t")
    stream.retold()
    progress = step(stream, 1, attempt=2)
    reading = asyncio.ensure_future(ids(stream, "1.1.7"))
    await asyncio.sleep(0)
    progress.begin()
    progress.model_text("a")
    stream.finish()
    assert await reading == ["1.2.0", "1.2.1"]
    assert await ids(stream, "1.1.7") == ["1.2.0", "1.2.1"]


async def test_behind_lost_progress_of_an_ended_step_comes_its_end() -> None:
    assert await ids(two_steps(), "1.1.77") == ["1.end", "2.1.0", "2.1.1", "2.1.2", "2.end"]


async def test_an_id_is_looked_for_when_all_that_was_is_told_again() -> None:
    stream = begun("t")
    reading = asyncio.ensure_future(ids(stream, "1.1.0"))
    await asyncio.sleep(0)
    progress = step(stream, 1)
    progress.begin()
    end(progress)
    stream.retold()
    stream.finish()
    assert await reading == ["1.end"]


async def test_behind_a_step_that_is_not_begun_again_comes_what_comes() -> None:
    assert await ids(two_steps(), "3.1.1") == []
    assert await ids(two_steps(), "3.approval") == []


@pytest.mark.parametrize("wrong", ["", "x", "start.1", "4.1.1", "0.1.1", "01.1.1", "1.1", "1.1.1.1", "9" * 99])
async def test_an_id_of_another_turn_is_refused(wrong: str) -> None:
    with pytest.raises(BadInput, match="no event"):
        await ids(two_steps(), wrong)


async def test_what_is_held_back_is_not_seen() -> None:
    stream = begun("t")
    progress = step(stream, 1)
    progress.begin()
    stream.hold()
    progress.model_text("secret")
    reader = stream.read()
    assert [(await anext(reader)).id for _ in range(2)] == ["start", "1.1.0"]
    waiting = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    assert not waiting.done()
    stream.release()
    assert (await waiting).id == "1.1.1"


async def test_what_is_withdrawn_is_never_seen() -> None:
    stream = begun("t")
    progress = step(stream, 1)
    progress.begin()
    stream.hold()
    progress.model_text("secret")
    end(progress, "secret")
    stream.withdraw(1, "1.end", {"event_type": "step_complete", "said": "nothing"})
    stream.release()
    stream.finish()
    events = [event async for event in stream.read()]
    assert [event.id for event in events] == ["start", "1.1.0", "1.end"]
    assert "secret" not in str(events)


async def test_what_is_held_back_at_the_end_is_never_seen() -> None:
    stream = begun("t")
    progress = step(stream, 1)
    progress.begin()
    stream.hold()
    progress.model_text("secret")
    stream.finish(Conflict("it was cancelled"))
    seen = []
    with pytest.raises(Conflict, match="cancelled"):
        seen += [event.id async for event in stream.read()]
    assert await first(stream, 2) == ["start", "1.1.0"]


async def first(stream: Stream, count: int) -> list[str]:
    reader = stream.read()
    return [(await anext(reader)).id for _ in range(count)]


async def test_what_was_held_back_of_a_lost_attempt_is_never_seen() -> None:
    stream = begun("t")
    progress = step(stream, 1)
    progress.begin()
    stream.hold()
    progress.model_text("secret")
    stream.retold()
    progress = step(stream, 1, attempt=2)
    progress.begin()
    progress.model_text("Paris")
    stream.finish()
    assert await ids(stream) == ["start", "1.1.0", "1.2.0", "1.2.1"]
    assert await ids(stream, "1.1.1") == ["1.2.0", "1.2.1"]


async def test_much_progress_is_put_together() -> None:
    stream = begun("t")
    progress = step(stream, 1)
    for _ in range(MAX_PIECES + 10_000):
        progress.model_text("a")
    progress.flush()
    stream.finish()
    deltas = [payload(event.data)["model_response_text_delta"] async for event in stream.read("start")]
    assert sum(map(len, deltas)) == MAX_PIECES + 10_000
    assert len(deltas) < MAX_PIECES + 100


async def test_put_together_are_texts_of_one_kind_in_their_order() -> None:
    stream = begun("t")
    progress = step(stream, 1)
    for _ in range(MAX_PIECES):
        progress.model_text("a")
    for call_id in ("one", "one", "two", "one"):
        progress.tool_text(call_id, call_id)
    progress.flush()
    stream.finish()
    told = [payload(event.data) async for event in stream.read(f"1.1.{MAX_PIECES}")]
    assert [(one["call_id"], one["tool_response_text_delta"]) for one in told] == [
        ("one", "oneone"), ("two", "two"), ("one", "one")
    ]  # fmt: skip


async def test_progress_of_ended_steps_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MAX_KEPT", 3)
    stream = two_steps()
    assert await ids(stream) == ["start", "1.1.0", "1.end", "2.1.0", "2.1.1", "2.1.2", "2.end"]
    assert await ids(stream, "1.1.1") == ["1.end", "2.1.0", "2.1.1", "2.1.2", "2.end"]


async def test_each_reader_gets_an_error_of_its_own() -> None:
    stream = begun("t")
    stream.finish(Conflict("it was cancelled", code="cancelled"))
    caught = []
    for _ in range(2):
        with pytest.raises(Conflict) as error:
            await ids(stream)
        caught.append(error.value)
    assert caught[0] is not caught[1]
    assert [(error.message, error.code) for error in caught] == [("it was cancelled", "cancelled")] * 2


async def test_who_is_at_an_event_while_the_turn_ends_misses_nothing() -> None:
    stream = begun("t")
    progress = step(stream, 1)
    progress.begin()
    reader = stream.read()
    assert (await anext(reader)).id == "start"
    progress.model_text("a")
    end(progress)
    stream.finish()
    seen = [event.id async for event in reader]
    assert (seen[0], seen[-1]) == ("1.1.0", "1.end")
