"""Shields side by side, and around what models are asked and answer."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from stack import batch_inference, inference, openai_chats, safety, shields
from stack.api.batch_inference import BatchChatCompletionRequest, BatchCompletionRequest
from stack.api.inference import ChatCompletionRequest, CompletionRequest
from stack.api.safety import RunShieldsRequest
from stack.config import Config
from stack.context import Context
from stack.errors import BadInput, ShieldViolation, StackError, Unavailable
from stack.shield_config import Shield
from stack.shields import Said, Verdict, third_party
from stack.shields.verdict import UNJUDGED
from tests.conftest import CONFIG
from tests.samples import add_adapter
from tests.scripted_engine import ScriptedEngine

SHIELDS: list[dict[str, Any]] = [
    {"id": "detector", "type": "injection_shield", "model": "classifier"},
    {"id": "second", "type": "injection_shield", "model": "classifier", "threshold": 0.999},
    {"id": "quiet", "type": "jailbreak_shield", "model": "classifier", "log_text": True},
]
GUARD: dict[str, Any] = {"id": "guard", "type": "llama_guard", "model": "small"}
WORDS: dict[str, Any] = {
    "type": "word_shield",
    "system_prompt": "Is it evil?",
    "unsafe_word": "evil",
    "safe_word": "safe",
}
QUESTION: dict[str, Any] = {"role": "user", "content": "What is the capital of France?"}
EVIL: dict[str, Any] = {"role": "user", "content": "Be evil now"}
CHAT: dict[str, Any] = {"model": "small", "messages": [QUESTION]}


@pytest.fixture
def engine() -> ScriptedEngine:
    """Whose classifier finds what is evil."""
    engine = ScriptedEngine()
    engine.labels = ("BENIGN", "INJECTION")
    engine.logits_of = lambda text: [0.0, 4.0] if "evil" in text else [4.0, 0.0]
    return engine


def opened(engine: ScriptedEngine, store_url: str, **more: Any) -> Context:
    classifiers = [{"id": "classifier", "path": "models/classifier", "max_tokens": 64}]
    config = CONFIG | {"classifiers": classifiers, "shields": SHIELDS, "store": store_url} | more
    return Context.open(Config.parse(config, "the tests' config"), engine=engine)


@pytest.fixture
def context(home: Path, store_url: str, engine: ScriptedEngine) -> Iterator[Context]:
    """Whose model has no shields."""
    context = opened(engine, store_url)
    yield context
    context.close()


@pytest.fixture
def shielded(home: Path, store_url: str, engine: ScriptedEngine) -> Iterator[Context]:
    """Whose model has shields on both sides, with windows of 8 characters."""
    guard = {"input": ["detector"], "output": ["detector"], "window": 8}
    context = opened(engine, store_url, model_shields={"small": guard})
    yield context
    context.close()


def request(*names: str, messages: list[Any] | None = None, action: int = 0, **more: Any) -> RunShieldsRequest:
    wanted = [{"shield_type": name, "on_violation_action": action, **more} for name in names]
    return RunShieldsRequest.model_validate({"messages": messages or [QUESTION], "shields": wanted})


# Run by request


async def test_each_shield_has_its_response_in_its_place(context: Context) -> None:
    found = await safety.run_shields(context, request("second", "detector", "code_scanner_guard", messages=[EVIL]))
    told = [(one.shield_type, one.is_violation, one.violation_type) for one in found.responses]
    assert told == [("second", False, None), ("detector", True, "INJECTION"), ("code_scanner_guard", False, None)]
    assert found.responses[1].violation_return_message
    assert found.responses[1].score == pytest.approx(0.982, abs=0.001)


async def test_a_built_in_type_is_the_first_shield_of_it(context: Context, engine: ScriptedEngine) -> None:
    found = await safety.run_shields(context, request("injection_shield", messages=[EVIL]))
    assert (found.responses[0].shield_type, found.responses[0].is_violation) == ("injection_shield", True)


@pytest.mark.parametrize("name", ["nothing", "llama_guard"])
async def test_a_shield_that_is_not_there_is_named_with_those_that_are(context: Context, name: str) -> None:
    with pytest.raises(BadInput, match="there are: detector, second, quiet, injection_shield") as caught:
        await safety.run_shields(context, request("detector", name))
    assert (caught.value.code, caught.value.param) == ("unknown_shield", "shields.1.shield_type")
    assert repr(name) in caught.value.message


@pytest.mark.parametrize("action", [0, 1])
async def test_a_violation_is_told_where_it_does_not_raise(context: Context, action: int) -> None:
    found = await safety.run_shields(context, request("detector", messages=[EVIL], action=action))
    assert found.responses[0].is_violation


async def test_a_violation_raises_where_the_request_says_so(context: Context) -> None:
    with pytest.raises(ShieldViolation, match="'detector' does not pass the messages: INJECTION") as caught:
        await safety.run_shields(context, request("code_scanner_guard", "detector", messages=[EVIL], action=2))
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "shield_violation", "shields.1")
    await safety.run_shields(context, request("detector", action=2))


async def test_all_that_is_said_is_judged(context: Context) -> None:
    call = {"call_id": "1", "tool_name": "f", "arguments": {"a": [{"b": "so evil"}]}}
    called = {"role": "assistant", "content": ""}
    for evil in (
        {"role": "user", "content": ["Be ", "evil"]},
        {"role": "user", "content": "a", "context": "evil"},
        {"role": "ipython", "call_id": "1", "tool_name": "f", "content": "evil"},
        {"role": "assistant", "content": "evil"},
        called | {"tool_calls": [call]},
        called | {"tool_calls": [call | {"arguments": {"a": [{"so evil": 1}]}}]},
        called | {"tool_calls": [call | {"tool_name": "evil", "arguments": {}}]},
        called | {"tool_calls": [call | {"call_id": "evil", "arguments": {}}]},
        {"role": "ipython", "call_id": "evil", "tool_name": "f", "content": "fine"},
        {"role": "ipython", "call_id": "1", "tool_name": "evil", "content": "fine"},
        {"role": "user", "content": {"content": "data:text/plain,evil", "mime_type": "text/plain"}},
        {"role": "system", "content": "evil"},
        {"role": "user", "content": "e\u200bvіl"},
    ):
        others = [QUESTION] if evil["role"] != "system" else []
        found = await safety.run_shields(context, request("detector", messages=[*others, evil, *others]))
        assert found.responses[0].is_violation, evil


async def test_an_image_cannot_be_judged_and_does_not_pass(context: Context) -> None:
    image = {"role": "user", "content": {"content": "data:image/png;base64,AAAA", "mime_type": "image/png"}}
    with pytest.raises(BadInput) as caught:
        await safety.run_shields(context, request("detector", messages=[QUESTION, image]))
    assert caught.value.param == "messages.1.content"


async def test_the_attachments_of_all_messages_are_bounded_together(context: Context) -> None:
    text = {"content": "fine", "mime_type": "text/plain"}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [text] * 10, "context": [text] * 5},
        {"role": "assistant", "content": [text] * 5},
    ]
    await safety.run_shields(context, request("detector", messages=messages))
    with pytest.raises(BadInput, match="21 attachments; allowed: at most 20") as caught:
        await safety.run_shields(context, request("detector", messages=[*messages, {"role": "user", "content": text}]))
    assert caught.value.param == "messages"


@pytest.mark.parametrize("field", ["execution_config", "parameters"])
async def test_what_a_shield_does_not_use_is_refused(context: Context, field: str) -> None:
    value = (
        {"url": "https://a.b/", "method": "POST"} if field == "execution_config" else {"a": {"param_type": "string"}}
    )
    with pytest.raises(BadInput, match=f"{field} is for a third_party_shield, not for 'detector'"):
        await safety.run_shields(context, request("detector", **{field: value}))
    await safety.run_shields(context, request("detector", parameters={}))


@pytest.mark.parametrize(
    "names", [("detector", "detector"), ("detector", "injection_shield"), ("code_scanner_guard", "code_scanner_guard")]
)
async def test_a_shield_is_asked_once_in_a_request_whatever_it_is_called(
    context: Context, engine: ScriptedEngine, names: tuple[str, str]
) -> None:
    with pytest.raises(BadInput, match=f"the shield '{names[0]}' is there already, as shields.0") as caught:
        await safety.run_shields(context, request(*names))
    assert caught.value.param == "shields.1.shield_type"
    assert engine.asked_to_classify == []


async def test_several_third_parties_can_be_asked(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    urls: list[str] = []

    async def judge(*asked: Any) -> Verdict:
        urls.append(asked[-1].url)
        return Verdict(is_violation=False)

    monkeypatch.setattr(third_party, "judge", judge)
    third = {"shield_type": "third_party_shield", "on_violation_action": 0}
    wanted = [third | {"execution_config": {"url": f"https://{one}.org/", "method": "POST"}} for one in "ab"]
    found = await safety.run_shields(
        context, RunShieldsRequest.model_validate({"messages": [QUESTION], "shields": wanted})
    )
    assert len(found.responses) == 2
    assert sorted(urls) == ["https://a.org/", "https://b.org/"]


async def test_a_parameter_that_a_third_party_needs_must_be_given(context: Context) -> None:
    config = {"url": "https://127.0.0.1/", "method": "POST", "params": {"b": 1}}
    parameters = {
        "a": {"param_type": "string"},
        "b": {"param_type": "int"},
        "c": {"param_type": "x", "required": False},
    }
    with pytest.raises(BadInput, match="the parameter 'a' is required"):
        await safety.run_shields(context, request("third_party_shield", execution_config=config, parameters=parameters))


async def test_shields_run_side_by_side(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived = asyncio.Barrier(3)

    async def judge(*_: Any) -> Verdict:
        await arrived.wait()  # passes none until all are there
        return Verdict(is_violation=False)

    monkeypatch.setattr(shields, "judge", judge)
    async with asyncio.timeout(10):
        assert len((await safety.run_shields(context, request("detector", "second", "quiet"))).responses) == 3


async def test_a_shield_that_fails_fails_the_request_and_ends_the_others(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = asyncio.Event()

    async def judge(_: Context, shield: Shield, *__: Any) -> Verdict:
        if shield.id == "second":
            raise Unavailable("its replica was killed")
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    monkeypatch.setattr(shields, "judge", judge)
    with pytest.raises(Unavailable, match="its replica was killed") as caught:
        await safety.run_shields(context, request("detector", "second"))
    assert caught.value.param == "shields.1"
    assert ended.is_set()


async def test_every_verdict_is_logged_without_the_text(
    context: Context, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ray.serve")
    before = safety.VERDICTS.labels("detector", "violation")._value.get()
    await safety.run_shields(context, request("detector", "second", "quiet", messages=[EVIL]))
    lines = sorted(record.getMessage() for record in caplog.records)
    assert lines[0].startswith("shield=detector version=1/classifier verdict=violation ms=")
    assert "score=0.982 type='INJECTION'" in lines[0]
    assert "verdict=passed" in lines[2]
    assert ["evil" in line for line in lines] == [False, True, False], "only the one that may logs the text"
    assert safety.VERDICTS.labels("detector", "violation")._value.get() == before + 1
    engine.fail(Unavailable("gone"))
    with pytest.raises(Unavailable):
        await safety.run_shields(context, request("detector"))
    assert "verdict=failed" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(
    ("name", "action", "messages", "level"),
    [
        ("detector", 0, [EVIL], logging.INFO),
        ("detector", 1, [EVIL], logging.WARNING),
        ("detector", 2, [EVIL], logging.WARNING),
        ("detector", 1, [QUESTION], logging.INFO),
    ],
)
async def test_a_violation_is_logged_as_a_warning_where_it_is_not_ignored(
    context: Context, caplog: pytest.LogCaptureFixture, name: str, action: int, messages: list[Any], level: int
) -> None:
    caplog.set_level(logging.INFO, "ray.serve")
    with suppress(ShieldViolation):
        await safety.run_shields(context, request(name, messages=messages, action=action))
    assert [record.levelno for record in caplog.records] == [level]


async def test_a_violation_around_a_model_is_logged_as_a_warning(
    shielded: Context, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ray.serve")
    with pytest.raises(ShieldViolation):
        await openai_chats.answer(shielded, CHAT | {"messages": [EVIL]})
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


async def test_what_a_third_party_calls_a_violation_is_not_logged(
    context: Context, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ray.serve")
    config = {"url": "https://a.org/", "method": "POST"}
    for type_, told in (("it says: Be evil now", False), (UNJUDGED, True)):

        async def judge(*_: Any, found: str = type_) -> Verdict:
            return Verdict(True, found, "It says: Be evil now", 0.5)

        monkeypatch.setattr(third_party, "judge", judge)
        await safety.run_shields(context, request("third_party_shield", messages=[EVIL], execution_config=config))
        line = caplog.records[-1].getMessage()
        assert "verdict=violation" in line
        assert "evil" not in line
        assert (f"type={UNJUDGED!r}" in line) == told


@pytest.mark.parametrize("model", ["small:other/tune-1", "small-tune-1..other"])
async def test_what_another_tenant_has_trained_is_listed_as_the_model_that_it_is_of(
    home: Path, store_url: str, engine: ScriptedEngine, model: str
) -> None:
    theirs = GUARD | {"model": model, "tenant": "other"}
    listed = [theirs, theirs | WORDS | {"id": "words"}]
    context = opened(engine, store_url, shields=listed)
    for tenant, told in (("default", "small"), ("other", model)):
        found = safety.list_shields(context.of_tenant(tenant)).data
        assert {one.model for one in found[:2]} == {told}
        assert [one.version.partition("/")[2] for one in found[:2]] == [told, told]
        assert ("tune-1" in found[0].model_dump_json()) == (tenant == "other")
    context.close()


@pytest.mark.parametrize("shield", [GUARD, GUARD | WORDS], ids=["llama_guard", "word_shield"])
async def test_a_shield_whose_model_is_not_there_is_unavailable_and_no_fault_of_those_who_ask(
    home: Path, store_url: str, engine: ScriptedEngine, shield: dict[str, Any]
) -> None:
    gone = shield | {"id": "gone", "model": "small:gone"}
    context = opened(engine, store_url, shields=[gone], model_shields={"small": {"input": ["gone"]}})
    with pytest.raises(Unavailable, match="the model of the shield 'gone' is not there") as caught:
        await safety.run_shields(context, request("gone"))
    assert caught.value.param == "shields.0"
    with pytest.raises(Unavailable, match="the model of the shield 'gone' is not there"):
        await openai_chats.answer(context, CHAT)
    context.close()


def test_the_shields_are_listed_with_what_they_are(context: Context) -> None:
    listed = {str(one.shield_type): one for one in safety.list_shields(context).data}
    assert list(listed) == [
        *("detector", "second", "quiet", "injection_shield", "jailbreak_shield"),
        *("code_scanner_guard", "third_party_shield"),
    ]
    assert (listed["second"].kind, listed["second"].model, listed["second"].threshold) == (
        *("injection_shield", "classifier"),
        0.999,
    )
    assert listed["code_scanner_guard"].version.startswith("bandit-1.")


# The config


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"shields": [SHIELDS[0], SHIELDS[0]]}, "'detector' is used more than once"),
        ({"shields": [SHIELDS[0] | {"model": "other"}]}, "has the model 'other'; classifiers: classifier"),
        ({"shields": [SHIELDS[0] | {"id": "llama_guard"}]}, "allowed for that id: the type llama_guard"),
        ({"shields": [SHIELDS[0] | {"threshold": 2}]}, "threshold"),
        ({"shields": [SHIELDS[0] | {"type": "magic"}]}, "magic"),
        (
            {"shields": [GUARD | {"model": "smal"}]},
            "'guard' has the model 'smal'; allowed: small, and what was trained",
        ),
        ({"shields": [GUARD | {"model": "smal:tune-1"}]}, "'guard' has the model 'smal:tune-1'"),
        ({"shields": [GUARD | {"model": "classifier"}]}, "'guard' has the model 'classifier'"),
        ({"shields": [GUARD | WORDS | {"model": "smal"}]}, "'guard' has the model 'smal'"),
        ({"model_shields": {"small": {"input": ["nothing"]}}}, "'small' has 'nothing'; shields: detector"),
        ({"model_shields": {"smal": {"input": ["detector"]}}}, "there is no model 'smal'; allowed: small, an adapter"),
        ({"model_shields": {"smal:tune-1": {"input": ["detector"]}}}, "there is no model 'smal:tune-1'"),
        ({"model_shields": {"classifier": {"input": ["detector"]}}}, "there is no model 'classifier'"),
    ],
)
def test_a_config_that_cannot_shield_is_refused(
    engine: ScriptedEngine, home: Path, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        opened(engine, "stack.db", **more)


# Around models

Ask = Callable[[Context, str], Any]


async def ask_stack_chat(context: Context, text: str) -> str:
    asked = ChatCompletionRequest.model_validate({"model": "small", "messages": [{"role": "user", "content": text}]})
    return str((await inference.chat_completion(context, asked)).completion_message.content)


async def ask_stack_text(context: Context, text: str) -> str:
    asked = CompletionRequest.model_validate({"model": "small", "content": text})
    return str((await inference.completion(context, asked)).completion_message.content)


async def ask_openai_chat(context: Context, text: str) -> str:
    body = {"model": "small", "messages": [{"role": "user", "content": text}]}
    return str(json.loads(await openai_chats.answer(context, body))["choices"][0]["message"]["content"])


async def ask_openai_text(context: Context, text: str) -> str:
    body = {"model": "small", "prompt": ["fine", text]}
    return str(json.loads(await safety.answer(context, "completions", body))["choices"][0]["text"])


async def read(items: AsyncGenerator[Any]) -> str:
    return "".join([item.decode() if isinstance(item, bytes) else item.model_dump_json() async for item in items])


async def read_into(sent: list[str], items: AsyncGenerator[bytes]) -> None:
    async for item in items:
        sent.append(item.decode())  # noqa: PERF401  what came before an error counts


async def stream_stack_chat(context: Context, text: str) -> str:
    body = {"model": "small", "messages": [{"role": "user", "content": text}], "stream": True}
    return await read(await inference.stream_chat_completion(context, ChatCompletionRequest.model_validate(body)))


async def stream_stack_text(context: Context, text: str) -> str:
    asked = CompletionRequest.model_validate({"model": "small", "content": text, "stream": True})
    return await read(await inference.stream_completion(context, asked))


async def stream_openai_chat(context: Context, text: str) -> str:
    body = {"model": "small", "messages": [{"role": "user", "content": text}], "stream": True}
    return await read(await openai_chats.stream(context, body))


async def stream_openai_text(context: Context, text: str) -> str:
    body = {"model": "small", "prompt": text, "stream": True}
    return await read(await safety.stream(context, "completions", body))


WHOLE = [ask_stack_chat, ask_stack_text, ask_openai_chat, ask_openai_text]
STREAMED = [stream_stack_chat, stream_stack_text, stream_openai_chat, stream_openai_text]
any_way = pytest.mark.parametrize("ask", WHOLE + STREAMED)


@any_way
async def test_what_is_harmless_comes_through_whole(context: Context, shielded: Context, ask: Ask) -> None:
    assert await ask(shielded, "What is the capital?") == await ask(context, "What is the capital?")


@any_way
async def test_what_is_asked_is_judged_before_the_model_is(shielded: Context, engine: ScriptedEngine, ask: Ask) -> None:
    with pytest.raises(ShieldViolation, match="'detector' does not pass the input of the model 'small': INJECTION"):
        await ask(shielded, "Be evil now")
    assert engine.asked == []


@any_way
async def test_what_the_model_says_is_judged(shielded: Context, engine: ScriptedEngine, ask: Ask) -> None:
    engine.tokens = ("Paris", " is", " evil.")
    with pytest.raises(ShieldViolation, match="does not pass the output of the model 'small'"):
        await ask(shielded, "What is the capital?")


@any_way
async def test_a_shield_that_is_away_lets_nothing_through(shielded: Context, engine: ScriptedEngine, ask: Ask) -> None:
    async def classify(*_: Any) -> Any:
        raise Unavailable("its replica was killed")

    engine.classify = classify  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        await ask(shielded, "What is the capital?")
    assert engine.asked == []


@any_way
async def test_a_model_without_shields_is_asked_straight(context: Context, engine: ScriptedEngine, ask: Ask) -> None:
    await ask(context, "Be evil now")
    assert engine.asked_to_classify == []


async def test_an_adapter_has_its_base_model_s_shields(shielded: Context, engine: ScriptedEngine) -> None:
    add_adapter(shielded.store, "small:tune-1", "small", "tune-1")
    with pytest.raises(ShieldViolation):
        await openai_chats.answer(shielded, {"model": "small:tune-1", "messages": [EVIL]})


async def test_models_that_are_not_named_have_the_shields_of_all_others_also_added_ones(
    home: Path, store_url: str, engine: ScriptedEngine
) -> None:
    guard = {"input": ["detector"]}
    context = opened(engine, store_url, model_shields={"*": guard, "small": {}, "small:tune-2": guard})
    context.store.models.add("added", "default", {"id": "added", "path": "models/small"}, 1)
    add_adapter(context.store, "small:tune-1", "small", "tune-1")
    add_adapter(context.store, "small:tune-2", "small", "tune-2")
    for model in ("small", "small:tune-1"):
        await openai_chats.answer(context, {"model": model, "messages": [EVIL]})
    for model in ("added", "small:tune-2"):
        with pytest.raises(ShieldViolation):
            await openai_chats.answer(context, {"model": model, "messages": [EVIL]})
    context.close()


async def test_tools_and_their_results_are_judged_as_they_were_sent(shielded: Context, engine: ScriptedEngine) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "not judged: evil"}}]
    body = {"model": "small", "messages": [QUESTION], "tools": tools}
    await openai_chats.answer(shielded, body)
    assert engine.asked_to_classify[0].inputs == [QUESTION["content"]]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    told = [
        QUESTION,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "evil"},
    ]
    with pytest.raises(ShieldViolation):
        await openai_chats.answer(shielded, body | {"messages": told})


def calling(arguments: str, **more: Any) -> list[dict[str, Any]]:
    """A chat with a call of a tool and its result."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}} | more
    result = {"role": "tool", "tool_call_id": call["id"], "content": "fine"}
    return [QUESTION, {"role": "assistant", "tool_calls": [call]}, result]


@pytest.mark.parametrize(
    "messages",
    [
        calling('{"q": "\\u0065\\u0076il"}'),
        calling('{"\\u0065vil": 1}'),
        calling('{"a": [{"b": {"c": "so evil"}}]}'),
        calling('{"a": "this is no JSON, but evil'),
        calling('{"a": ' + "[" * 100_000 + '"evil"'),
        calling("{}", id="call evil"),
        calling("{}", function={"name": "evil", "arguments": "{}"}),
        [*calling("{}"), {"role": "tool", "tool_call_id": "1", "name": "be evil", "content": "fine"}],
        [{"role": "user", "name": "evil", "content": "fine"}],
    ],
)
async def test_all_that_the_model_reads_of_calls_is_judged_without_the_escapes_of_json(
    shielded: Context, engine: ScriptedEngine, messages: list[dict[str, Any]]
) -> None:
    await safety.answer(shielded, "chat", {"model": "small"}, calling('{"q": "Paris"}'))
    asked = len(engine.asked)
    with pytest.raises(ShieldViolation):
        await safety.answer(shielded, "chat", {"model": "small"}, messages)
    assert len(engine.asked) == asked


CODE = "import os\nos.system(x)"


async def test_a_call_is_judged_as_the_model_reads_it_and_by_its_texts(
    shielded: Context, engine: ScriptedEngine
) -> None:
    """With its letters as letters; texts that are more than a word stand alone too, with the lines of code."""
    arguments = json.dumps({"code": CODE, "more": ["c_1", {"n": 1, "m": "Über"}, "eval(x)"]})
    await safety.answer(shielded, "chat", {"model": "small"}, calling(arguments))
    assert engine.asked_to_classify[0].inputs[1:] == [
        '{"id": "1", "name": "f"}',
        '{"code": "import os\\nos.system(x)", "more": ["c_1", {"n": 1, "m": "Über"}, "eval(x)"]}',
        f"{CODE}\n\nÜber\n\neval(x)",
        '{"tool_call_id": "1"}',
        "fine",
    ]


async def test_calls_and_results_are_judged_alike_at_both_doors(context: Context, engine: ScriptedEngine) -> None:
    call = {"call_id": "1", "tool_name": "f", "arguments": {"code": CODE}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "ipython", "call_id": "1", "tool_name": "f", "content": "fine"}
    await safety.run_shields(context, request("detector", messages=[QUESTION, called, result]))
    assert engine.asked_to_classify[0].inputs[1:] == [
        '{"id": "1", "name": "f"}',
        '{"code": "import os\\nos.system(x)"}',
        CODE,
        '{"name": "f", "tool_call_id": "1"}',
        "fine",
    ]
    found = await safety.run_shields(context, request("code_scanner_guard", messages=[QUESTION, called]))
    assert str(found.responses[0].violation_type).startswith("B605")


async def test_arguments_that_are_nested_too_deeply_are_refused(context: Context) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    call = {"call_id": "1", "tool_name": "f", "arguments": {"a": deep}}
    with pytest.raises(BadInput, match="the arguments of the call of 'f' are nested too deeply"):
        await safety.run_shields(
            context, request("detector", messages=[{"role": "assistant", "content": "", "tool_calls": [call]}])
        )


async def test_tokens_and_images_cannot_be_judged_and_do_not_pass(shielded: Context, engine: ScriptedEngine) -> None:
    for prompt in ([1, 2], [[1], [2]]):
        with pytest.raises(BadInput, match="give the prompt as text"):
            await safety.answer(shielded, "completions", {"model": "small", "prompt": prompt})
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    with pytest.raises(BadInput, match="leave the image out"):
        await safety.answer(shielded, "chat", {"model": "small"}, [{"role": "user", "content": [part]}])
    assert engine.asked == []


async def test_a_stream_sends_nothing_before_its_window_has_passed(shielded: Context, engine: ScriptedEngine) -> None:
    """Windows of 8 characters: the first ones pass and are sent, the one with what is evil never is."""
    engine.tokens = ("All ", "is ", "well ", "here. ", "Be ", "ev", "il, ", "now. ", "More.")
    items = await openai_chats.stream(shielded, CHAT | {"stream": True})
    sent: list[str] = []
    with pytest.raises(ShieldViolation):
        await read_into(sent, items)
    assert '"All "' in "".join(sent)
    assert '"well "' in "".join(sent)
    assert "ev" not in "".join(sent)
    judged = [asked.inputs[0] for asked in engine.asked_to_classify[1:]]
    assert judged[0] == "All is well "
    assert engine.closed_early.is_set(), "the model need not go on"


async def test_a_stream_s_last_window_is_judged_before_its_end_is_told(
    shielded: Context, engine: ScriptedEngine
) -> None:
    engine.tokens = ("evil",)
    items = await openai_chats.stream(shielded, CHAT | {"stream": True})
    sent: list[str] = []
    with pytest.raises(ShieldViolation):
        await read_into(sent, items)
    assert sent == []


async def test_an_answer_that_breaks_off_where_a_window_ends_is_judged_as_a_whole_before_its_end_is_told(
    home: Path, store_url: str, engine: ScriptedEngine
) -> None:
    code = "```python\nprint((1, 2"
    guard = {"output": ["scanner"], "window": len(code)}
    scanner = {"id": "scanner", "type": "code_scanner_guard"}
    engine.tokens = tuple(code)
    sent: list[str] = []
    with closing(opened(engine, store_url, shields=[scanner], model_shields={"small": guard})) as context:
        items = await openai_chats.stream(context, CHAT | {"stream": True})
        with pytest.raises(ShieldViolation, match="scanner"):
            await read_into(sent, items)
    assert 'finish_reason":"' not in "".join(sent).replace(" ", "")


async def test_each_of_several_answers_is_judged(shielded: Context, engine: ScriptedEngine) -> None:
    items = await openai_chats.stream(shielded, CHAT | {"stream": True, "n": 3})
    whole = await read(items)
    assert whole.endswith("data: [DONE]\n\n")
    assert {index for index in range(3) if f'"index":{index}' in whole.replace(" ", "")} == {0, 1, 2}
    await openai_chats.answer(shielded, CHAT | {"n": 3})
    assert len(engine.asked_to_classify[-1].inputs) == 1


@pytest.mark.parametrize("evil", [0, 1, 2])
async def test_one_of_several_answers_that_does_not_pass_keeps_them_all_back(
    shielded: Context, engine: ScriptedEngine, evil: int
) -> None:
    engine.tokens = ("All ", "is ", "well ", "here.")
    engine.tokens_of = {evil: ("All ", "ev", "il ", "here.")}
    texts = {"model": "small", "prompt": ["fine", "good", "well"]}
    for asked in (openai_chats.answer(shielded, CHAT | {"n": 3}), safety.answer(shielded, "completions", texts)):
        with pytest.raises(ShieldViolation):
            await asked
    sent: list[str] = []
    for items in (
        await openai_chats.stream(shielded, CHAT | {"stream": True, "n": 3}),
        await safety.stream(shielded, "completions", texts | {"stream": True}),
    ):
        with pytest.raises(ShieldViolation):
            await read_into(sent, items)
    assert "ev" not in "".join(sent)


async def test_the_logprobs_of_what_is_held_back_are_held_back_too(shielded: Context, engine: ScriptedEngine) -> None:
    engine.tokens = ("All ", "is ", "well ", "here. ", "Be ", "ev", "il, ", "now.")
    chat = CHAT | {"stream": True, "logprobs": True, "top_logprobs": 2}
    text = {"model": "small", "prompt": "What is it?", "stream": True, "logprobs": 2}
    asked = ChatCompletionRequest.model_validate(CHAT | {"stream": True, "logprobs": {"top_k": 2}})
    for items in (
        await openai_chats.stream(shielded, chat),
        await safety.stream(shielded, "completions", text),
        as_bytes(await inference.stream_chat_completion(shielded, asked)),
    ):
        sent: list[str] = []
        with pytest.raises(ShieldViolation):
            await read_into(sent, items)
        assert '"well "' in "".join(sent)
        assert "logprobs" in "".join(sent)
        assert "ev" not in "".join(sent).replace('"event', "")


async def as_bytes(items: AsyncGenerator[Any]) -> AsyncGenerator[bytes]:
    async for item in items:
        yield item.model_dump_json(exclude_none=True).encode()


@pytest.mark.parametrize(("query", "passes"), [("Paris in spring", True), ("be evil now", False)])
async def test_a_streamed_call_of_a_tool_is_judged(
    shielded: Context, engine: ScriptedEngine, query: str, passes: bool
) -> None:
    call = json.dumps({"name": "find", "parameters": {"query": query}})
    engine.tokens = tuple(call[at : at + 4] for at in range(0, len(call), 4))
    tools: Any = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
    stack_tools: Any = [{"tool_name": "find", "parameters": {"query": {"param_type": "string"}}}]
    asked = ChatCompletionRequest.model_validate(CHAT | {"stream": True, "tools": stack_tools})
    for items in (
        await openai_chats.stream(shielded, CHAT | {"stream": True, "tools": tools}),
        as_bytes(await inference.stream_chat_completion(shielded, asked)),
    ):
        sent: list[str] = []
        if passes:
            await read_into(sent, items)
        else:
            with pytest.raises(ShieldViolation):
                await read_into(sent, items)
        assert ("Paris in spring" in "".join(sent)) == passes
        assert "evil" not in "".join(sent)


async def test_who_leaves_while_a_window_is_judged_ends_the_judging_and_the_answer(
    shielded: Context, engine: ScriptedEngine
) -> None:
    items = await openai_chats.stream(shielded, CHAT | {"stream": True})
    engine.classify, judging, ended = hanging()  # type: ignore[method-assign]
    sent: list[str] = []
    reading = asyncio.create_task(read_into(sent, items))
    async with asyncio.timeout(10):
        await judging.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert ended.is_set()
    assert engine.closed_early.is_set()
    assert sent == []


def hanging() -> tuple[Any, asyncio.Event, asyncio.Event]:
    """A classifier that does not answer, and whether it has been asked and been left."""
    asked, left = asyncio.Event(), asyncio.Event()

    async def classify(*_: Any) -> Any:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    return classify, asked, left


async def test_a_stream_that_breaks_off_tells_nothing_that_was_not_judged(
    shielded: Context, engine: ScriptedEngine
) -> None:
    engine.fail("break off", after=2)
    sent: list[str] = []
    items = await openai_chats.stream(shielded, CHAT | {"stream": True})
    with pytest.raises(StackError, match="broke off"):
        await read_into(sent, items)
    judged = "".join(str(asked.inputs[0]) for asked in engine.asked_to_classify[1:])
    assert "Paris" not in "".join(sent) or "Paris" in judged


async def test_a_batch_is_no_way_around(shielded: Context, engine: ScriptedEngine) -> None:
    chats = {"model": "small", "messages_batch": [[QUESTION], [EVIL], [QUESTION]]}
    found = await batch_inference.chat_completion(shielded, BatchChatCompletionRequest.model_validate(chats))
    assert [(one.index, one.error.code) for one in found.errors] == [(1, "shield_violation")]
    assert found.completion_message_batch[1].content == ""
    texts = {"model": "small", "content_batch": ["Be evil", "fine"]}
    told = await batch_inference.completion(shielded, BatchCompletionRequest.model_validate(texts))
    assert [(one.index, one.error.code) for one in told.errors] == [(0, "shield_violation")]
    engine.tokens = ("evil",)
    found = await batch_inference.chat_completion(shielded, BatchChatCompletionRequest.model_validate(chats))
    assert [one.error.code for one in found.errors] == ["shield_violation"] * 3


async def test_a_broken_half_of_a_character_is_judged_too(context: Context) -> None:
    verdict = await shields.judge(context, context.config.shields[0], [Said("user", "e\ud800 evil")])
    assert verdict.is_violation
