"""Shields around what models are asked and answer: run by request, and around the models for which the config says so.

All shields of a request run side by side. What a shield cannot judge is a violation or an error, and never passes.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

from prometheus_client import Counter, Histogram

from stack import shields, tracing
from stack.api.messages import CompletionMessage, Message, SystemMessage, ToolResponseMessage, UserMessage
from stack.api.safety import (
    BuiltinShield,
    OnViolationAction,
    RestAPIExecutionConfig,
    RunShieldsRequest,
    RunShieldsResponse,
    ShieldDefinition,
    ShieldInfo,
    ShieldList,
    ShieldResponse,
)
from stack.attachments import StackContent, resolve_texts
from stack.context import Context
from stack.errors import BadInput, NotFound, ShieldViolation, StackError, Unavailable
from stack.models import Endpoint
from stack.prompt_formats.messages import json_text
from stack.shield_config import (
    EVERY_OTHER,
    CodeScannerShield,
    LlamaGuardShield,
    ModelShields,
    Shield,
    ThirdPartyShield,
    WordShield,
    base_of,
)
from stack.shields import Said, Verdict
from stack.shields.verdict import UNJUDGED

logger = logging.getLogger("ray.serve")

# Of this process; the gateway's metrics show them.
VERDICTS = Counter("stack_shield_verdicts", "Verdicts of shields.", ("shield", "verdict"), registry=None)
SECONDS = Histogram("stack_shield_seconds", "Time to a shield's verdict.", ("shield",), registry=None)

# These need neither a model nor an address, so they are there without the config.
_BY_THEMSELVES: tuple[Shield, ...] = (
    CodeScannerShield(id="code_scanner_guard", type="code_scanner_guard"),
    ThirdPartyShield(id="third_party_shield", type="third_party_shield"),
)
_ROLES = {"system": "system", "developer": "system", "user": "user", "tool": "tool", "assistant": "assistant"}
# A word, an id, a number, a path or an address.
_WORD = re.compile(r"[\w.:/@+-]*", re.ASCII)
_DESCRIPTIONS = {
    "llama_guard": "A language model that says by which of its categories a conversation is unsafe.",
    "word_shield": "A language model that was trained to answer with one of two words.",
    "injection_shield": "A classifier that looks for injections of instructions.",
    "jailbreak_shield": "A classifier that looks for jailbreaks.",
    "code_scanner_guard": "A scan of the code in messages by rules.",
    "third_party_shield": "A service elsewhere, which execution_config names.",
}


async def run_shields(context: Context, request: RunShieldsRequest) -> RunShieldsResponse:
    """What each shield says of the messages, in the order of the shields.

    Raises BadInput for an unknown shield and what one cannot be asked with, ShieldViolation where a shield whose
    on_violation_action is raise finds something, and what keeps a shield from judging: TooManyRequests, Unavailable.
    """
    runs = [
        _Run(shield, definition.execution_config, definition.on_violation_action)
        for shield, definition in zip(_shields_of(context, request.shields, "shields"), request.shields, strict=True)
    ]
    said = await _said_in(request.messages)
    try:
        verdicts = await _judge_all(context, runs, said)
    except _Failed as failed:
        failed.error.param = f"shields.{failed.at}" + (f".{failed.error.param}" if failed.error.param else "")
        raise failed.error from failed
    for at, (definition, verdict) in enumerate(zip(request.shields, verdicts, strict=True)):
        _act(definition, verdict, f"shields.{at}")
    return RunShieldsResponse(responses=[_response(*pair) for pair in zip(request.shields, verdicts, strict=True)])


async def judge(
    context: Context, definition: ShieldDefinition, messages: Sequence[Message], before: Sequence[Message] = ()
) -> ShieldResponse:
    """What one shield says of messages, read with those `before` them, which are not judged.

    What becomes of a violation is the caller's to decide. Raises as `run_shields` does, but for ShieldViolation.
    """
    shield = _shield_of(_known(context), definition, "shields.0")
    known = [replace(one, passed=len(one.text)) for one in await _said_in(before)]
    run = _Run(shield, definition.execution_config, definition.on_violation_action)
    try:
        verdict = await _judge(context, 0, run, [*known, *await _said_in(messages)])
    except _Failed as failed:
        raise failed.error from failed
    return _response(definition, verdict)


def require_shields(context: Context, definitions: Sequence[ShieldDefinition], place: str) -> None:
    """Raises BadInput for shields that cannot be run as a request names them, at this place in it."""
    _shields_of(context, definitions, place)


def list_shields(context: Context) -> ShieldList:
    """The shields that a request can name."""
    known = {name: _as_told(context, shield) for name, shield in _known(context).items()}
    return ShieldList(
        data=[
            ShieldInfo(
                shield_type=name,
                kind=shield.type,
                version=shields.version(shield),
                description=_DESCRIPTIONS[shield.type],
                model=getattr(shield, "model", None),
                threshold=getattr(shield, "threshold", None),
            )
            for name, shield in known.items()
        ]
    )


async def answer(
    context: Context, endpoint: Endpoint, body: dict[str, Any], messages: Sequence[Mapping[str, Any]] = ()
) -> bytes:
    """The answer of stack.models.Models.answer, once the model's shields have passed the question and the answer.

    `messages` are those of a chat as they were sent, in OpenAI's shape, with all attachments in place; of a completion
    the prompt in the body is judged. Raises ShieldViolation, and what keeps a shield from judging.
    """
    guard = await _guard_of(context, body["model"])
    if guard is None:
        return await context.models.answer(endpoint, body)
    said = await guard.pass_input(_said_in_prompt(body["prompt"]) if endpoint == "completions" else _said_to(messages))
    given = await context.models.answer(endpoint, body)
    if guard.output:
        answers = [_Answer(_text_of(choice)) for choice in json.loads(given)["choices"]]
        await guard.pass_output(said, answers)
    return given


async def stream(
    context: Context, endpoint: Endpoint, body: dict[str, Any], messages: Sequence[Mapping[str, Any]] = ()
) -> AsyncGenerator[bytes]:
    """The stream of stack.models.Models.stream, of which nothing is sent before the model's shields have passed it.

    Raises as `answer` does; what the shields find in the answer is raised by the iterator.
    """
    guard = await _guard_of(context, body["model"])
    if guard is None:
        return await context.models.stream(endpoint, body)
    said = await guard.pass_input(_said_in_prompt(body["prompt"]) if endpoint == "completions" else _said_to(messages))
    items = await context.models.stream(endpoint, body)
    return _passed(guard, said, items) if guard.output else items


@dataclass(frozen=True)
class _Run:
    """A shield that is to judge something, and what becomes of a violation."""

    shield: Shield
    execution: RestAPIExecutionConfig | None = None
    action: OnViolationAction = OnViolationAction.raise_


class _Failed(Exception):
    """A shield that could not judge: which of them, and why."""

    def __init__(self, at: int, error: StackError) -> None:
        super().__init__(at, error)
        self.at = at
        self.error = error


@dataclass
class _Answer:
    """One of a model's answers so far, how much of it has passed, and where the last window began that has."""

    text: str = ""
    passed: int = 0
    window: int = 0

    @property
    def waiting(self) -> int:
        return len(self.text) - self.passed


@dataclass(frozen=True)
class _Guard:
    """The shields of a model."""

    context: Context
    model: str
    input: list[_Run]
    output: list[_Run]
    window: int

    async def pass_input(self, asked: Iterable[Said]) -> list[Said]:
        """What is asked, once the shields have passed it."""
        said = list(asked)
        await self._pass(self.input, said, "input")
        return [replace(one, passed=len(one.text)) for one in said]

    async def pass_output(self, said: list[Said], answers: Iterable[_Answer], *, are_unfinished: bool = False) -> None:
        """Returns once the shields have passed what is new in the answers to what was said."""
        async with _tasks() as group:
            for one in answers:
                if one.waiting:
                    one.window, one.passed = one.passed, len(one.text)
                elif are_unfinished or not one.text:
                    continue
                # An answer that ends where a window ended is judged from there again, now that nothing follows.
                new = Said("assistant", one.text, one.window, is_unfinished=are_unfinished)
                group.create_task(self._pass(self.output, [*said, new], "output"))

    async def _pass(self, runs: list[_Run], said: list[Said], which: str) -> None:
        try:
            verdicts = await _judge_all(self.context, runs, said)
        except _Failed as failed:
            raise failed.error from failed
        for run, verdict in zip(runs, verdicts, strict=True):
            if verdict.is_violation:
                raise _violation(f"the {which} of the model {self.model!r}", run.shield.id, verdict)


async def _passed(guard: _Guard, said: list[Said], items: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """A stream's events, held back until the shields have passed the text in them."""
    answers: dict[int, _Answer] = {}
    held: list[bytes] = []
    async with aclosing(items):
        async for item in items:
            held.append(item)
            for choice in _choices(item):
                answers.setdefault(choice.get("index", 0), _Answer()).text += _text_of(choice)
            waiting = max((one.waiting for one in answers.values()), default=0)
            if waiting >= guard.window:
                await guard.pass_output(said, answers.values(), are_unfinished=True)
            elif any(one.text for one in answers.values()):
                continue
            yield b"".join(held)
            held.clear()
        await guard.pass_output(said, answers.values())
        if held:
            yield b"".join(held)


async def _guard_of(context: Context, model: str) -> _Guard | None:
    """The shields of a model, or those of the model that it is an adapter of, or of all others; None for no shields."""
    shielded = context.config.model_shields
    if not shielded:
        return None
    wanted = shielded.get(model)
    if wanted is None:
        base = (await context.models.find(model)).base.id
        wanted = shielded.get(base, shielded.get(EVERY_OTHER, ModelShields()))
    if not wanted.input and not wanted.output:
        return None
    known = {shield.id: shield for shield in context.config.shields}
    runs_in, runs_out = ([_Run(known[name]) for name in names] for names in (wanted.input, wanted.output))
    return _Guard(context, model, runs_in, runs_out, wanted.window)


def _known(context: Context) -> dict[str, Shield]:
    """The shields by the names that a request can give: their ids, and the built-in types for the first of each."""
    known = {shield.id: shield for shield in context.config.shields}
    for shield in (*context.config.shields, *_BY_THEMSELVES):
        if shield.type in set(BuiltinShield):
            known.setdefault(shield.type, shield)
    return known


def _as_told(context: Context, shield: Shield) -> Shield:
    """A shield as the tenant may know it: of what another one has trained only the model that it was made of."""
    if isinstance(shield, LlamaGuardShield | WordShield) and shield.tenant != context.tenant:
        base = base_of(shield.model, (model.id for model in context.config.models))
        return shield.model_copy(update={"model": base})
    return shield


def _shields_of(context: Context, definitions: Sequence[ShieldDefinition], place: str) -> list[Shield]:
    """The shields that a request names at a place in it. Raises BadInput."""
    known = _known(context)
    found = [_shield_of(known, definition, f"{place}.{at}") for at, definition in enumerate(definitions)]
    _require_different(found, place)
    return found


def _shield_of(known: Mapping[str, Shield], definition: ShieldDefinition, place: str) -> Shield:
    shield = known.get(definition.shield_type)
    if shield is None:
        is_builtin = definition.shield_type in set(BuiltinShield)
        what = "no shield of this type is in the config" if is_builtin else "there is no such shield"
        raise BadInput(
            f"shield_type is {str(definition.shield_type)!r}: {what}; there are: {', '.join(known)}",
            param=f"{place}.shield_type",
            code="unknown_shield",
        )
    if not isinstance(shield, ThirdPartyShield):
        for field in ("execution_config", "parameters"):
            if getattr(definition, field):
                raise BadInput(
                    f"{field} is for a third_party_shield, not for {shield.id!r}, a {shield.type}",
                    param=f"{place}.{field}",
                )
        return shield
    _require_parameters(definition, definition.execution_config or shield.execution_config, place)
    return shield


def _require_different(found: Sequence[Shield], place: str) -> None:
    """Raises BadInput where a shield would judge the same twice. Third parties can be different ones."""
    ids = [shield.id for shield in found]
    for at, shield in enumerate(found):
        first = ids.index(shield.id)
        if first < at and not isinstance(shield, ThirdPartyShield):
            raise BadInput(
                f"the shield {shield.id!r} is there already, as {place}.{first}; allowed: each once",
                param=f"{place}.{at}.shield_type",
            )


def _require_parameters(definition: ShieldDefinition, asked: RestAPIExecutionConfig | None, place: str) -> None:
    """The parameters are what the third party is to be given: required ones must stand in its params or body."""
    given = {**((asked and asked.params) or {}), **((asked and asked.body) or {})}
    for name, parameter in (definition.parameters or {}).items():
        if parameter.required and name not in given:
            raise BadInput(
                f"the parameter {name!r} is required, and stands neither in params nor in body",
                param=f"{place}.execution_config",
            )


async def _judge_all(context: Context, runs: Sequence[_Run], said: Sequence[Said]) -> list[Verdict]:
    """The verdicts of shields that run side by side. Raises _Failed of the first that fails, and ends the others."""
    async with _tasks() as group:
        tasks = [group.create_task(_judge(context, at, run, said)) for at, run in enumerate(runs)]
    return [task.result() for task in tasks]


async def _judge(context: Context, at: int, run: _Run, said: Sequence[Said]) -> Verdict:
    """The verdict of one shield, which is logged."""
    started = time.perf_counter()
    try:
        with tracing.leaf("shield", shield=run.shield.id):
            verdict = await shields.judge(context, run.shield, said, run.execution)
    except StackError as error:
        _log(run, "failed", started, said, reason=error.code)
        raise _Failed(at, _told(run.shield, error)) from error
    outcome: Literal["violation", "passed"] = "violation" if verdict.is_violation else "passed"
    # The type that a third party tells is its own text, and may be one that it was sent.
    is_own = not isinstance(run.shield, ThirdPartyShield) or verdict.type == UNJUDGED
    _log(run, outcome, started, said, verdict.score, verdict.type if is_own else None)
    return verdict


def _told(shield: Shield, error: StackError) -> StackError:
    """Whoever asks has named the shield, and no model: that it is not there is no fault of theirs."""
    return Unavailable(f"the model of the shield {shield.id!r} is not there") if isinstance(error, NotFound) else error


def _log(
    run: _Run,
    outcome: Literal["violation", "passed", "failed"],
    started: float,
    said: Sequence[Said],
    score: float | None = None,
    reason: str | None = None,
) -> None:
    shield, seconds = run.shield, time.perf_counter() - started
    VERDICTS.labels(shield.id, outcome).inc()
    SECONDS.labels(shield.id).observe(seconds)
    told = f"shield={shield.id} version={shields.version(shield)} verdict={outcome} ms={seconds * 1_000:.1f}"
    told += "" if score is None else f" score={score:.3f}"
    told += "" if reason is None else f" type={reason[:100]!r}"
    if shield.log_text:
        told += f" text={json.dumps([one.text for one in said if one.is_judged])[:10_000]}"
    is_ignored = outcome == "violation" and run.action == OnViolationAction.ignore
    logger.log(logging.INFO if outcome == "passed" or is_ignored else logging.WARNING, "%s", told)


def _response(definition: ShieldDefinition, verdict: Verdict) -> ShieldResponse:
    return ShieldResponse(
        shield_type=definition.shield_type,
        is_violation=verdict.is_violation,
        violation_type=verdict.type,
        violation_return_message=verdict.message,
        score=verdict.score,
    )


def _act(definition: ShieldDefinition, verdict: Verdict, place: str) -> None:
    """Raises for a violation where the request says so."""
    if verdict.is_violation and definition.on_violation_action == OnViolationAction.raise_:
        error = _violation("the messages", str(definition.shield_type), verdict)
        error.param = place
        raise error


def _violation(what: str, shield: str, verdict: Verdict) -> ShieldViolation:
    found = ": ".join(part for part in (verdict.type, verdict.message) if part) or "a violation"
    return ShieldViolation(f"the shield {shield!r} does not pass {what}: {found}"[:2_000])


@asynccontextmanager
async def _tasks() -> AsyncGenerator[asyncio.TaskGroup]:
    """A group of tasks that ends by the error of the first that fails, as it is, with the others cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed


async def _said_in(messages: Sequence[Message]) -> list[Said]:
    """Messages of the Llama Stack, with their attachments in place. Raises BadInput for images."""
    contents = [
        (content, f"messages.{at}.{field}")
        for at, message in enumerate(messages)
        for field, content in (("content", message.content), ("context", _context_of(message)))
    ]
    texts = await resolve_texts(contents)
    pairs = zip(messages, texts[::2], texts[1::2], strict=True)
    return [one for message, text, more in pairs for one in _said_by(message, text, more)]


def _context_of(message: Message) -> StackContent:
    return (message.context if isinstance(message, UserMessage) else None) or ""


def _said_by(message: Message, text: str, context: str) -> list[Said]:
    match message:
        case UserMessage():
            return [Said("user", f"{text}\n\n{context}" if context else text)]
        case SystemMessage():
            return [Said("system", text)]
        case ToolResponseMessage():
            names = {"name": message.tool_name, "tool_call_id": message.call_id}
            return [Said("tool", json_text(names)), Said("tool", text)]
        case CompletionMessage():
            calls = (_in_call(str(call.tool_name), call.call_id, call.arguments) for call in message.tool_calls)
            return [Said("assistant", one) for one in (text, *chain.from_iterable(calls))]


def _said_to(messages: Sequence[Mapping[str, Any]]) -> Iterator[Said]:
    """Messages in OpenAI's shape."""
    for at, message in enumerate(messages):
        role: Any = _ROLES[message["role"]]
        content = message.get("content") or ""
        for part in content if isinstance(content, list) else ():
            if part["type"] != "text":
                raise BadInput(
                    "the model has shields, which judge text alone; leave the image out", param=f"messages.{at}.content"
                )
        if names := {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}:
            yield Said(role, json_text(names))
        yield Said(role, content if isinstance(content, str) else "".join(part["text"] for part in content))
        for call in message.get("tool_calls") or ():
            function = call["function"]
            for text in _in_call(function["name"], call["id"], _parsed(function["arguments"])):
                yield Said(role, text)


def _said_in_prompt(prompt: Any) -> Iterator[Said]:
    """A prompt in OpenAI's shape: a text, or several."""
    for text in [prompt] if isinstance(prompt, str) else prompt:
        if not isinstance(text, str):
            raise BadInput(
                "the model has shields, which judge text: give the prompt as text, not tokens", param="prompt"
            )
        yield Said("user", text)


def _in_call(name: str, call_id: str, arguments: Any) -> Iterator[str]:
    """A call of a tool, as models read it: its name and id, its arguments, and then the texts in these.

    The texts stand alone too, with the lines of code, and as classifiers find more in what is no JSON. A word or an id
    does not: the default classifier takes nearly every id that stands alone for an injection. Raises BadInput.
    """
    yield json_text({"id": call_id, "name": name})
    try:
        yield json_text(arguments)
    except RecursionError as error:
        raise BadInput(f"the arguments of the call of {name!r} are nested too deeply", param="messages") from error
    if texts := [text for text in _strings(arguments) if not _WORD.fullmatch(text)]:
        yield "\n\n".join(texts)


def _parsed(arguments: str) -> Any:
    """The arguments of a call, or the text of them if they are not JSON."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _strings(value: Any) -> Iterator[str]:
    """All texts within a value of JSON, however deep it is."""
    left = [value]
    while left:
        match left.pop():
            case str() as text:
                yield text
            case list() as values:
                left += reversed(values)
            case dict() as values:
                left += reversed(values.values())


def _choices(item: bytes) -> Iterator[dict[str, Any]]:
    """The choices of streamed events."""
    for event in item.split(b"\n\n"):
        data = event.removeprefix(b"data: ")
        if data and data != b"[DONE]":
            yield from json.loads(data)["choices"]


def _text_of(choice: Mapping[str, Any]) -> str:
    """All that a choice, or a chunk of one, says in words, in whatever fields the engine puts it."""
    if "text" in choice:
        return choice["text"] or ""
    said = choice.get("delta") or choice.get("message") or {}
    return "".join(text for key, value in said.items() if key != "role" for text in _strings(value))
