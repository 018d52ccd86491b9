"""Models: those of the config and their adapters, and the way of a request to its engine."""

import asyncio
import json
from typing import Any

import pytest

from stack.context import Context
from stack.errors import BadInput, EngineFailed, NotFound, StackError
from stack.models import Failure
from stack.store import models as store_models
from tests import samples
from tests.scripted_engine import ScriptedEngine

BODY: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "Where?"}]}


def test_models_are_those_of_the_config_and_their_adapters(context: Context) -> None:
    samples.add_adapter(context.store, "small:tune-1", "small", "tune-1")
    samples.add_adapter(context.store, "gone:tune-2", "gone", "tune-2")
    models = context.models.all()
    assert [(model.id, model.base.id, model.is_adapter) for model in models] == [
        ("small", "small", False),
        ("small:tune-1", "small", True),
    ]


def test_an_adapter_is_known_as_soon_as_it_is_registered(context: Context) -> None:
    with pytest.raises(NotFound):
        context.models.get("small:tune-1")
    samples.add_adapter(context.store, "small:tune-1", "small", "tune-1")
    assert context.models.get("small:tune-1").is_adapter


def test_a_private_model_and_its_adapters_are_its_tenants(context: Context) -> None:
    samples.add_trained(context.store, "small-whole-1")
    samples.add_adapter(context.store, "small-whole-1:tune-1", "small-whole-1", "tune-1")
    ids = ["small", "small-whole-1", "small-whole-1:tune-1"]
    assert [model.id for model in context.models.all()] == ids
    assert [context.models.get(one).id for one in ids] == ids
    other = context.of_tenant("other")
    assert [model.id for model in other.models.all()] == ["small"]
    for one in ids[1:]:
        with pytest.raises(NotFound) as caught:
            other.models.get(one)
        assert caught.value.message == f"there is no model {one!r}; there are: small"
        assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


async def test_a_private_model_that_was_read_already_is_still_its_tenants(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_models, "RECENT_S", 3_600.0)
    samples.add_trained(context.store, "small-whole-1")
    context.store.models.recent()
    other = context.of_tenant("other")
    for _ in range(2):
        assert (await context.models.find("small-whole-1")).id == "small-whole-1"
        with pytest.raises(NotFound, match=r"there are: small$"):
            await other.models.find("small-whole-1")
    assert b"Paris" in await context.models.answer("chat", BODY | {"model": "small-whole-1"})
    monkeypatch.setattr(context.models, "get", lambda _: pytest.fail("a thread is taken"))
    assert (await context.models.find("small-whole-1")).id == "small-whole-1"


@pytest.mark.parametrize("id", ["big", "", "small:", "small:tune-9", "gone:tune-2", "Small"])
def test_an_unknown_model_is_not_found_and_the_known_are_named(context: Context, id: str) -> None:
    samples.add_adapter(context.store, "small:tune-1", "small", "tune-1")
    samples.add_adapter(context.store, "gone:tune-2", "gone", "tune-2")
    with pytest.raises(NotFound) as caught:
        context.models.get(id)
    assert caught.value.message == f"there is no model {id!r}; there are: small, small:tune-1"
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_of_many_models_ten_are_named(context: Context) -> None:
    for number in range(20):
        samples.add_adapter(context.store, f"small:tune-{number}", "small", f"tune-{number}")
    with pytest.raises(NotFound, match=r"small, small:tune.* and 11 more$") as caught:
        context.models.get("big")
    assert caught.value.message.count("small:tune") == 9


async def test_the_engine_gets_the_model_and_the_body_as_it_is(context: Context, engine: ScriptedEngine) -> None:
    samples.add_adapter(context.store, "small:tune-1", "small", "tune-1")
    body = BODY | {"model": "small:tune-1", "future_field": {"a": 1}}
    answer = json.loads(await context.models.answer("chat", body))
    assert answer["choices"][0]["message"]["content"] == "Paris is big."
    (asked,) = engine.asked
    assert (asked.model, asked.endpoint) == (context.models.get("small:tune-1"), "chat")
    assert asked.body == body


async def test_a_stream_passes_through_as_it_is(context: Context, engine: ScriptedEngine) -> None:
    body = BODY | {"stream": True}
    passed = [item async for item in await context.models.stream("chat", body)]
    direct = [item async for item in engine.generate(context.models.get("small"), "chat", body)]
    assert passed == direct
    assert passed[-1] == b"data: [DONE]\n\n"


async def test_a_stream_that_is_closed_closes_the_generation(context: Context, engine: ScriptedEngine) -> None:
    stream = await context.models.stream("chat", BODY | {"stream": True})
    await anext(stream)
    assert not engine.closed_early.is_set()
    await stream.aclose()
    assert engine.closed_early.is_set()


async def test_what_the_engine_refuses_is_raised_before_the_stream(context: Context, engine: ScriptedEngine) -> None:
    engine.fail(BadInput("too long"))
    with pytest.raises(BadInput, match="too long"):
        await context.models.stream("chat", BODY | {"stream": True})


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_gives_no_answer_has_failed(
    context: Context, engine: ScriptedEngine, stream: bool
) -> None:
    engine.fail("break off")
    ask = context.models.stream if stream else context.models.answer
    with pytest.raises(EngineFailed, match="'small' gave no answer"):
        await ask("chat", BODY | {"stream": stream})


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_is_cancelled_while_it_waits_closes_the_generation(
    context: Context, engine: ScriptedEngine, stream: bool
) -> None:
    engine.fail("hang")
    ask = context.models.stream if stream else context.models.answer
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ask("chat", BODY | {"stream": stream}), timeout=0.05)
    assert engine.asked
    assert engine.closed_early.is_set()


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, BadInput), (422, BadInput), (404, NotFound), (500, EngineFailed)],
)
def test_a_failure_of_an_engine_becomes_an_error_of_the_stack(status: int, kind: type[StackError]) -> None:
    error = Failure(status, "the reason", param="messages").error()
    assert type(error) is kind
    assert error.message == "the reason"
    assert error.status == (400 if status == 422 else status)
