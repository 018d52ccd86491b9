"""What a session's actor asks of the actor that asks models, and what becomes of it where that one or a model is away.

No Ray is started.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from serve_apps import shared_engine
from serve_apps.shared_engine import ActorEngine, fingerprint
from stack.channel import Sender, Target
from stack.config import Config, LanguageModel
from stack.errors import Away, BadInput
from stack.models import Ended, Failure, Model

SMALL = {"id": "small", "path": "models/small", "context": 256}
CONFIG = Config.parse({"models": [SMALL]}, "the tests' config")
MODEL = Model("small", LanguageModel.model_validate(SMALL), is_adapter=False)
STREAMED = {"stream": True}


class Method:
    def __init__(self, called: Callable[..., Awaitable[Any]]) -> None:
        self.remote = lambda *arguments: asyncio.ensure_future(called(*arguments))


class Shared:
    """Does in turn what `does` says: an error is raised, or so many bytes are sent, and then the error."""

    def __init__(self, *does: Exception | bytes | tuple[bytes, Exception]) -> None:
        self.does = list(does)
        self.answer, self.stream = Method(self._answer), Method(self._stream)
        self._sender = Sender()

    async def _answer(self, *_: Any) -> bytes:
        match self.does.pop(0):
            case bytes() as answer:
                return answer
            case Exception() as error:
                raise error
            case _:
                raise AssertionError

    async def _stream(self, *arguments: Any) -> Ended:
        target: Target = arguments[-1]
        match self.does.pop(0):
            case Exception() as error:
                raise error
            case bytes() as answer:
                await (await self._sender.open(target)).send(answer)
                return Ended(len(answer), None)
            case (answer, error):
                await (await self._sender.open(target)).send(answer)
                if isinstance(error, BadInput):
                    return Ended(len(answer), Failure(400, error.message))
                await asyncio.sleep(0.05)  # what was sent is on its way
                raise error
        raise AssertionError

    def stop(self) -> None:
        self._sender.stop()


class Engine(ActorEngine):
    """Asks these, each until it has died."""

    def __init__(self, *shared: Shared) -> None:
        super().__init__(CONFIG)
        self.all = list(shared)

    async def _find(self) -> Any:
        if self._shared is None:
            self._shared = self.all.pop(0)
        return self._shared

    async def said(self, body: dict[str, Any] = STREAMED) -> bytes:
        return b"".join([item async for item in self.generate(MODEL, "chat", body)])


Engines = Callable[..., Engine]


@pytest.fixture
async def engine_of(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Engines]:
    monkeypatch.setattr(shared_engine, "AGAIN_S", 0)
    made: list[tuple[Engine, tuple[Shared, ...]]] = []

    def make(*shared: Shared) -> Engine:
        made.append((Engine(*shared), shared))
        return made[-1][0]

    yield make
    for engine, shared in made:
        for one in shared:
            one.stop()
        await engine._receiver.stop()


@pytest.mark.parametrize("body", [STREAMED, {}])
async def test_what_is_away_is_waited_for(engine_of: Engines, body: dict[str, Any]) -> None:
    engine = engine_of(Shared(Away("not yet"), Away("not yet"), b"hello"))
    assert await engine.said(body) == b"hello"


@pytest.mark.parametrize("body", [STREAMED, {}])
async def test_another_is_asked_where_one_has_died(engine_of: Engines, body: dict[str, Any]) -> None:
    engine = engine_of(Shared(ActorDiedError()), Shared(b"hello"))
    assert await engine.said(body) == b"hello"


@pytest.mark.parametrize("error", [ActorDiedError(), Away("the engine has died")])
async def test_an_answer_that_breaks_off_is_away(engine_of: Engines, error: Exception) -> None:
    engine = engine_of(Shared((b"hel", error)), Shared(b"lo"))
    items = engine.generate(MODEL, "chat", STREAMED)
    assert await anext(items) == b"hel"
    with pytest.raises(Away, match="the answer of the model 'small' broke off"):
        await anext(items)


async def test_an_error_of_the_model_is_raised_as_it_is(engine_of: Engines) -> None:
    with pytest.raises(BadInput, match="too long"):
        await engine_of(Shared(BadInput("too long"))).said({})
    with pytest.raises(BadInput, match="too long"):
        await engine_of(Shared((b"", BadInput("too long")))).said()


async def test_there_is_an_end_of_waiting(engine_of: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_engine, "AWAY_S", -1)
    with pytest.raises(Away, match="not yet"):
        await engine_of(Shared(Away("not yet"))).said()
    with pytest.raises(Away, match="what asks the models does not answer"):
        await engine_of(Shared(ActorDiedError())).said({})


def test_configs_are_told_apart() -> None:
    other = Config.parse({"models": [SMALL], "agents": {"warm": 2}}, "another config")
    assert fingerprint(CONFIG) == fingerprint(CONFIG.model_copy())
    assert fingerprint(CONFIG) != fingerprint(other)


def test_actors_of_code_in_another_folder_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    of_this = fingerprint(CONFIG)
    monkeypatch.setattr("serve_apps.shared_engine.ROOT", "/mnt/stack/code/next")
    assert fingerprint(CONFIG) != of_this
