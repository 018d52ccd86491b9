"""Batch inference: all rows at once, each answered or failed alone, and what concerns all of them raised."""

import asyncio
import shutil
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stack import batch_inference, inference
from stack.api.batch_inference import (
    MAX_BATCH_ATTACHMENTS,
    MAX_BATCH_CHARACTERS,
    MAX_BATCH_MESSAGES,
    MAX_ROWS,
    BatchChatCompletionRequest,
    BatchCompletionRequest,
)
from stack.api.wire import describe
from stack.config import Config
from stack.context import Context
from stack.errors import BadInput, EngineFailed, NotFound, StackError, TooManyRequests, Unavailable
from stack.models import Endpoint, Model
from tests.conftest import CONFIG
from tests.scripted_engine import ScriptedEngine

TEXT = "Paris is big."


def question(text: Any = "Where?") -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def chats(*rows: Any, **changes: Any) -> BatchChatCompletionRequest:
    return BatchChatCompletionRequest.model_validate({"model": "small", "messages_batch": list(rows)} | changes)


def texts(*rows: Any, **changes: Any) -> BatchCompletionRequest:
    return BatchCompletionRequest.model_validate({"model": "small", "content_batch": list(rows)} | changes)


def message(content: str = TEXT, stop_reason: str = "end_of_turn") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "stop_reason": stop_reason, "tool_calls": []}


NOTHING = message("", "out_of_tokens")


async def told(context: Context, request: BatchChatCompletionRequest | BatchCompletionRequest) -> dict[str, Any]:
    """The answer to a batch, as JSON."""
    if isinstance(request, BatchChatCompletionRequest):
        answer = await batch_inference.chat_completion(context, request)
        return answer.model_dump(mode="json", exclude_none=True)
    return (await batch_inference.completion(context, request)).model_dump(mode="json", exclude_none=True)


Faults = Callable[[str], StackError | None]


class Engine(ScriptedEngine):
    """A scripted engine that repeats the question, fails for some of them, and can be held in the middle of work.

    `most` is how many it has worked on at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: Faults = lambda _: None
        self.let_go = asyncio.Event()
        self.let_go.set()
        self.working: set[str] = set()
        self.most = 0
        self.began = asyncio.Condition()

    def generate(self, model: Model, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        return self._echo(model, endpoint, body)

    async def _echo(self, model: Model, endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        asked = body["messages"][-1]["content"] if endpoint == "chat" else body["prompt"]
        if fault := self.faults(asked):
            raise fault
        self.working.add(asked)
        self.most = max(self.most, len(self.working))
        try:
            async with self.began:
                self.began.notify_all()
            await self.let_go.wait()
            self.tokens = (f"{asked}!",)
            async for item in super().generate(model, endpoint, body):
                yield item
        finally:
            self.working.discard(asked)

    async def is_working_on(self, count: int) -> None:
        async with self.began:
            await asyncio.wait_for(self.began.wait_for(lambda: len(self.working) == count), timeout=30)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def context(home: Path, new_sqlite_file: Path, engine: Engine) -> Iterator[Context]:
    """A context whose database does not matter."""
    shutil.copy(new_sqlite_file, home / "stack.db")
    context = Context.open(Config.parse(CONFIG, "the tests' config"), engine=engine)
    yield context
    context.close()


def fails(*questions: str, with_: StackError) -> Faults:
    return lambda asked: with_ if asked in questions else None


# Answers


async def test_conversations_are_answered_in_their_order(context: Context, engine: Engine) -> None:
    long = [{"role": "system", "content": "Be brief."}, *question(["Wh", "en?"])]
    answer = await told(context, chats(question("Where?"), long, question("Who?")))
    assert answer == {
        "completion_message_batch": [message("Where?!"), message("When?!"), message("Who?!")],
        "errors": [],
    }
    assert [len(asked.body["messages"]) for asked in engine.asked] == [1, 2, 1]


async def test_texts_are_continued_in_their_order(context: Context, engine: Engine) -> None:
    answer = await told(context, texts("one", ["t", "wo"], ""))
    assert [one["content"] for one in answer["completion_message_batch"]] == ["one!", "two!", "!"]
    assert {asked.endpoint for asked in engine.asked} == {"completions"}


async def test_all_rows_share_what_is_said_beside_them(context: Context, engine: Engine) -> None:
    shared = {"sampling_params": {"strategy": "top_p", "top_p": 0.9, "max_tokens": 5}, "logprobs": {"top_k": 2}}
    for request in (chats(question(), question(), **shared), texts("a", "b", **shared)):
        engine.asked.clear()
        await told(context, request)
        assert len(engine.asked) == 2
        for asked in engine.asked:
            assert (asked.body["top_p"], asked.body["max_tokens"]) == (0.9, 5)


@pytest.mark.parametrize("request_", [chats(question(), 5, question()), texts("a", 5, "b")], ids=["chats", "texts"])
async def test_logprobs_are_told_for_each_row_if_asked_for(context: Context, request_: Any) -> None:
    assert "logprobs_batch" not in await told(context, request_)
    with_logprobs = type(request_).model_validate(dict(request_) | {"logprobs": {"top_k": 1}})
    first, second, third = (await told(context, with_logprobs))["logprobs_batch"]
    assert len(first) == len(third) == 1
    assert next(iter(first[0]["logprobs_by_token"].values())) == -0.25
    assert second is None


async def test_rows_are_with_the_engine_together_but_not_too_many(context: Context, engine: Engine) -> None:
    engine.let_go.clear()
    rows = [f"text {number}" for number in range(batch_inference.AT_ONCE + 10)]
    batch = asyncio.create_task(told(context, texts(*rows)))
    await engine.is_working_on(batch_inference.AT_ONCE)
    engine.let_go.set()
    answers = (await batch)["completion_message_batch"]
    assert engine.most == batch_inference.AT_ONCE
    assert [one["content"] for one in answers] == [f"{row}!" for row in rows]


# Rows that fail


@pytest.mark.parametrize(
    ("row", "param", "words"),
    [
        ([], "messages_batch.1", "at least 1 item"),
        ("a", "messages_batch.1", "should be a valid list"),
        (None, "messages_batch.1", "should be a valid list"),
        ([5], "messages_batch.1.0", "valid dictionary"),
        ([{"role": "robot", "content": "a"}], "messages_batch.1.0", "'robot'"),
        ([{"role": "user"}], "messages_batch.1.0.content", "content: is required"),
        ([*question(), *question(5)], "messages_batch.1.1.content", "not 5"),
        ([{"role": "user", "content": "a", "name": "Ann"}], "messages_batch.1.0", "unknown key 'name'"),
        (question() * 1_001, "messages_batch.1", "1001 entries; allowed: at most 1000"),
        (question({"content": "a", "mime_type": "video/mp4"}), "messages_batch.1.0.content", "'video/mp4'"),
        (question({"content": "data:,x", "mime_type": "image/png"}), "messages_batch.1.0.content", "no images"),
    ],
)
async def test_a_bad_conversation_fails_alone_with_its_index(
    context: Context, row: Any, param: str, words: str
) -> None:
    answer = await told(context, chats(question("Where?"), row, question("Who?")))
    assert answer["completion_message_batch"] == [message("Where?!"), NOTHING, message("Who?!")]
    (one,) = answer["errors"]
    assert one["index"] == 1
    assert (one["error"]["code"], one["error"]["type"]) == ("bad_input", "invalid_request_error")
    assert one["error"]["param"] == param
    assert words in one["error"]["message"]


@pytest.mark.parametrize(
    ("row", "param", "words"),
    [
        (5, "content_batch.1", "should be a text, an attachment, or a list of these, not 5"),
        ([5], "content_batch.1.0", "not 5"),
        ("x" * 1_000_001, "content_batch.1", "at most 1000000 characters"),
        ({"content": "a", "mime_type": "image/png"}, "content_batch.1", ""),
    ],
)
async def test_a_bad_text_fails_alone_with_its_index(context: Context, row: Any, param: str, words: str) -> None:
    answer = await told(context, texts("a", row, "b"))
    assert answer["completion_message_batch"] == [message("a!"), NOTHING, message("b!")]
    (one,) = answer["errors"]
    assert (one["index"], one["error"]["param"]) == (1, param)
    assert words in one["error"]["message"]


@pytest.mark.parametrize(
    "fault",
    [
        BadInput("the prompt has 9 tokens; allowed: 5", param="max_tokens"),
        Unavailable("the replica is gone"),
        EngineFailed("the engine died"),
    ],
    ids=lambda fault: type(fault).__name__,
)
async def test_what_fails_in_the_engine_fails_alone(context: Context, engine: Engine, fault: StackError) -> None:
    engine.faults = fails("a", "c", with_=fault)
    answer = await told(context, texts("a", "b", "c"))
    assert [one["content"] for one in answer["completion_message_batch"]] == ["", "b!", ""]
    assert [one["index"] for one in answer["errors"]] == [0, 2]
    error = {"code": fault.code, "message": fault.message, "type": fault.type}
    assert answer["errors"][0]["error"] == error | ({"param": fault.param} if fault.param else {})


async def test_a_batch_of_bad_rows_alone_is_told_row_by_row(context: Context, engine: Engine) -> None:
    answer = await told(context, chats([], 5))
    assert answer["completion_message_batch"] == [NOTHING, NOTHING]
    assert [one["index"] for one in answer["errors"]] == [0, 1]
    assert engine.asked == []


@pytest.mark.parametrize("fault", [Unavailable("it does not start"), EngineFailed("the engine died")])
async def test_what_keeps_every_row_from_an_answer_is_raised_if_it_is_not_theirs(
    context: Context, engine: Engine, fault: StackError
) -> None:
    engine.faults = lambda _: fault
    with pytest.raises(type(fault), match=fault.message):
        await told(context, texts("a", "b"))
    assert len((await told(context, texts("a", 5)))["errors"]) == 2


# What is wrong with all rows


async def test_an_unknown_model_is_not_found(context: Context) -> None:
    for request in (chats(question(), model="big"), texts("a", model="big")):
        with pytest.raises(NotFound, match="there is no model 'big'"):
            await told(context, request)


async def test_sampling_that_cannot_be_is_raised(context: Context, engine: Engine) -> None:
    wrong = {"sampling_params": {"strategy": "top_k"}}
    for request in (chats(question(), question(), **wrong), texts("a", "b", **wrong)):
        with pytest.raises(BadInput, match="needs a top_k") as caught:
            await told(context, request)
        assert caught.value.param == "sampling_params.top_k"
    assert engine.asked == []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: texts(), "content_batch: List should have at least 1 item"),
        (lambda: chats(), "messages_batch: List should have at least 1 item"),
        (lambda: texts(*["a"] * (MAX_ROWS + 1)), "content_batch: has 257 entries; allowed: at most 256"),
        (lambda: chats(*[question()] * (MAX_ROWS + 1)), "messages_batch: has 257 entries; allowed: at most 256"),
        (
            lambda: chats(*[question() * 1_000] * 10, question()),
            f"messages_batch: has 10001 messages; allowed: at most {MAX_BATCH_MESSAGES}",
        ),
        (lambda: chats(messages_batch="a"), "messages_batch: Input should be a valid list"),
        (lambda: texts("a", content_batch="a"), "content_batch: Input should be a valid list"),
        (lambda: texts("a", stream=True), "unknown key 'stream'"),
        (lambda: texts(*["x" * 1_000_000] * 17), f"17000000 characters; allowed: at most {MAX_BATCH_CHARACTERS}"),
        (lambda: chats(*[question("x" * 1_000_000)] * 17), f"allowed: at most {MAX_BATCH_CHARACTERS}"),
        (
            lambda: chats(*[[{"role": "user", "content": "a", "context": "x" * 1_000_000}]] * 17),
            f"allowed: at most {MAX_BATCH_CHARACTERS}",
        ),
        (
            lambda: chats(*[question([{"content": "a", "mime_type": "text/csv"}] * 11)] * 3),
            f"33 attachments; allowed: at most {MAX_BATCH_ATTACHMENTS}",
        ),
        (
            lambda: texts(*[{"content": ["x" * 1_000_000] * 17, "mime_type": "text/csv"}]),
            f"allowed: at most {MAX_BATCH_CHARACTERS}",
        ),
    ],
)
def test_a_batch_out_of_bounds_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make()
    assert words in describe(caught.value)


def test_a_batch_of_just_the_greatest_size_is_taken() -> None:
    assert len(texts(*["x"] * MAX_ROWS).content_batch) == MAX_ROWS
    assert len(texts(*["x" * 1_000_000] * 16).content_batch) == 16


# A full queue, and clients that leave


async def test_a_row_that_meets_a_full_queue_asks_again(
    context: Context, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []
    refusals = [TooManyRequests("full", retry_after=7), TooManyRequests("full", retry_after=9)]
    engine.faults = lambda asked: refusals.pop(0) if asked == "b" and refusals else None
    monkeypatch.setattr(batch_inference, "pause", napping(naps))
    answer = await told(context, texts("a", "b"))
    assert [one["content"] for one in answer["completion_message_batch"]] == ["a!", "b!"]
    assert naps == [7, 9]


async def test_what_a_row_holds_is_had_once_however_often_the_engine_is_asked(
    context: Context, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    had: list[Any] = []
    resolve_text = inference.resolve_text

    async def counted(content: Any) -> str:
        had.append(content)
        return await resolve_text(content)

    refusals = [TooManyRequests("full", retry_after=1) for _ in range(3)]
    engine.faults = lambda asked: refusals.pop(0) if refusals else None
    monkeypatch.setattr(batch_inference, "pause", napping([]))
    monkeypatch.setattr(inference, "resolve_text", counted)
    row = [{"content": "b", "mime_type": "text/plain"}]
    answer = await told(context, texts(row))
    assert answer["errors"] == []
    assert (len(had), refusals) == (1, [])


async def test_a_row_that_meets_a_full_queue_for_too_long_fails(
    context: Context, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []
    engine.faults = fails("b", with_=TooManyRequests("full", retry_after=25))
    monkeypatch.setattr(batch_inference, "pause", napping(naps))
    (one,) = (await told(context, texts("a", "b")))["errors"]
    assert (one["index"], one["error"]["code"]) == (1, "too_many_requests")
    assert naps == [25, 25]
    engine.faults = lambda _: TooManyRequests("full", retry_after=100)
    with pytest.raises(TooManyRequests, match="full"):
        await told(context, texts("a", "b"))


@pytest.fixture
def shielded(home: Path, new_sqlite_file: Path, engine: Engine) -> Iterator[Context]:
    """Whose model has a classifier as its shield."""
    shutil.copy(new_sqlite_file, home / "stack.db")
    more = {
        "classifiers": [{"id": "classifier", "path": "models/classifier", "max_tokens": 64}],
        "shields": [{"id": "detector", "type": "injection_shield", "model": "classifier"}],
        "model_shields": {"small": {"input": ["detector"]}},
    }
    engine.labels = ("BENIGN", "INJECTION")
    engine.logits_of = lambda _: [4.0, 0.0]
    context = Context.open(Config.parse(CONFIG | more, "the tests' config"), engine=engine)
    yield context
    context.close()


@pytest.mark.parametrize("refused", [3, 100])
async def test_a_row_whose_shield_has_a_full_queue_waits_for_it_too(
    shielded: Context, engine: Engine, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    naps: list[float] = []
    classify, refusals = engine.classify, ["full"] * refused

    async def busy(*asked: Any) -> Any:
        if refusals:
            raise TooManyRequests(refusals.pop(), retry_after=20)
        return await classify(*asked)

    engine.classify = busy  # type: ignore[method-assign]
    monkeypatch.setattr(batch_inference, "pause", napping(naps))
    if refused == 3:
        answer = await told(shielded, texts("a"))
        assert (answer["completion_message_batch"], answer["errors"]) == ([message("a!")], [])
    else:
        with pytest.raises(TooManyRequests, match="full"):
            await told(shielded, texts("a"))
    assert naps == [20, 20, 20]


def napping(naps: list[float]) -> Any:
    async def nap(seconds: float) -> None:
        naps.append(seconds)

    return nap


async def test_whoever_leaves_takes_all_rows_along(context: Context, engine: Engine) -> None:
    engine.let_go.clear()
    batch = asyncio.create_task(told(context, texts(*(f"text {number}" for number in range(100)))))
    await engine.is_working_on(batch_inference.AT_ONCE)
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    assert engine.working == set()
    assert engine.most == batch_inference.AT_ONCE


async def test_a_request_that_is_wrong_for_all_rows_takes_those_under_way_along(
    context: Context, engine: Engine
) -> None:
    engine.let_go.clear()
    engine.faults = fails("wrong", with_=BadInput("no", param="tools.0"))
    with pytest.raises(BadInput, match="no"):
        await told(context, chats(question("a"), question("wrong")))
    assert engine.working == set()
