"""An engine of a job's own: what it is asked, what goes to the deployments that serve, how it starts and fails."""

import asyncio
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from stack.config import Config, EmbeddingModel, LanguageModel, SequenceClassifier
from stack.context import Context
from stack.errors import BadInput, EngineFailed, StackError, TooManyRequests, Unavailable
from stack.models import Endpoint, Failure, Model
from tests.conftest import CONFIG
from tests.scripted_engine import ScriptedEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray and vLLM warn of as they are imported
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    from jobs.asking import Asker, patiently
    from jobs.own_engine import EngineDied, OwnEngine
    from serve_apps import llm
    from tests.asked_here import answered

OWN = LanguageModel(id="small", path="models/small", request_timeout_s=60)
BODY: dict[str, Any] = {"model": "small", "messages": [], "stream": False}
SOON_S = 5
Answer = Callable[[dict[str, Any]], Any]


class Server:
    """What LLM.here gives: it answers with what `answers` makes of a body, or raises it."""

    def __init__(self) -> None:
        self.answers: Answer = lambda body: b"mine"
        self.starts = self.closed = 0
        self.loaded: list[str] = []
        self.fails_to_start: BaseException | None = None
        self.let_go = asyncio.Event()
        self.let_go.set()

    async def start(self, model: LanguageModel, artifacts: str) -> "Server":
        assert (model, artifacts) == (OWN, "file:///artifacts")
        self.starts += 1
        await self.let_go.wait()
        if self.fails_to_start is not None:
            raise self.fails_to_start
        return self

    def close(self) -> None:
        self.closed += 1

    async def load_adapter(self, id: str) -> None:
        await asyncio.sleep(0)
        self.loaded.append(id)

    async def answer(self, endpoint: Endpoint, body: dict[str, Any]) -> bytes | Failure:
        found = self.answers(body)
        if isinstance(found, BaseException):
            raise found
        return await found if asyncio.iscoroutine(found) else found  # type: ignore[no-any-return]


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(llm.LLM, "here", server.start)
    return server


@pytest.fixture
def others() -> ScriptedEngine:
    return ScriptedEngine(tokens=("theirs",))


@pytest.fixture
def engine(server: Server, others: ScriptedEngine) -> OwnEngine:
    return OwnEngine(OWN, "file:///artifacts", others)


async def ask(engine: OwnEngine, model: Model | None = None, **changes: Any) -> bytes:
    async with asyncio.timeout(SOON_S):
        items = engine.generate(model or Model("small", OWN, is_adapter=False), "chat", BODY | changes)
        return b"".join([item async for item in items])


def adapter(job: str) -> Model:
    return Model(f"small:{job}", OWN, is_adapter=True)


async def test_its_own_model_is_asked_here_and_all_else_where_it_serves(
    engine: OwnEngine, server: Server, others: ScriptedEngine
) -> None:
    assert await ask(engine) == b"mine"
    assert not others.asked
    other = LanguageModel(id="other", path="models/other")
    assert b"theirs" in await ask(engine, Model("other", other, is_adapter=False))
    assert [one.model.id for one in others.asked] == ["other"]
    vectors = await engine.embed(EmbeddingModel(id="vectors", path="models/vectors"), ["a"], True)
    assert vectors.vectors.dtype == np.float32
    await engine.classify(SequenceClassifier(id="classifier", path="models/classifier"), ["a"], True)
    assert (len(others.asked_to_embed), len(others.asked_to_classify)) == (1, 1)


async def test_nothing_starts_before_it_is_asked(engine: OwnEngine, server: Server) -> None:
    await ask(engine, Model("other", LanguageModel(id="other", path="models/other"), is_adapter=False))
    assert server.starts == 0


async def test_it_starts_once_for_all_that_ask_at_once(engine: OwnEngine, server: Server) -> None:
    server.let_go.clear()
    asking = [asyncio.create_task(ask(engine)) for _ in range(5)]
    await asyncio.sleep(0)
    asking[0].cancel()  # whoever leaves does not take it from the others
    server.let_go.set()
    found = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert found[1:] == [b"mine"] * 4
    assert server.starts == 1


async def test_each_adapter_of_its_model_is_loaded_once(engine: OwnEngine, server: Server) -> None:
    jobs = ["tune-1", "tune-2", "tune-1", "tune-1"]
    assert await asyncio.gather(*(ask(engine, adapter(job)) for job in jobs)) == [b"mine"] * 4
    assert await ask(engine, adapter("tune-2")) == b"mine"
    assert sorted(server.loaded) == ["small:tune-1", "small:tune-2"]


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (Failure(400, "too long", "messages"), BadInput, "too long"),
        (Failure(429, "full"), TooManyRequests, "full"),
        (Failure(500, "it failed"), EngineFailed, "it failed"),
        (EngineGenerateError("one generation failed"), EngineFailed, "one generation failed"),
        (EngineDeadError(), EngineDied, "own engine of the model 'small' has died"),
    ],
    ids=str,
)
async def test_what_fails_is_told_as_by_the_model_that_serves(
    engine: OwnEngine, server: Server, answer: Any, kind: type[StackError], words: str
) -> None:
    server.answers = lambda body: answer
    with pytest.raises(kind, match=words):
        await ask(engine)


async def test_an_engine_that_has_died_is_followed_by_one_other(engine: OwnEngine, server: Server) -> None:
    async def dies() -> bytes:
        await asyncio.sleep(0)
        raise EngineDeadError

    await ask(engine, adapter("tune-1"))
    server.answers = lambda body: dies()
    found = await asyncio.gather(*(ask(engine) for _ in range(5)), return_exceptions=True)
    assert [type(one) for one in found] == [EngineDied] * 5
    assert (server.starts, server.closed) == (1, 1), "it is not started before somebody asks"
    server.answers = lambda body: b"another's"
    assert await asyncio.gather(*(ask(engine, adapter("tune-1")) for _ in range(5))) == [b"another's"] * 5
    assert (server.starts, server.closed) == (2, 1)
    assert server.loaded == ["small:tune-1"] * 2, "each has its adapters"


async def test_whoever_learns_late_of_a_death_does_not_bury_the_next_engine(engine: OwnEngine, server: Server) -> None:
    late = asyncio.Event()

    async def dies_late() -> bytes:
        await late.wait()
        raise EngineDeadError

    def answers(body: dict[str, Any]) -> Any:
        if "late" in body:
            return dies_late()
        return EngineDeadError() if server.starts == 1 else b"another's"

    server.answers = answers
    last = asyncio.create_task(ask(engine, late=True))
    with pytest.raises(EngineDied):
        await ask(engine)
    assert await ask(engine) == b"another's"
    late.set()
    with pytest.raises(EngineDied):
        await last
    assert await ask(engine) == b"another's"
    assert server.starts == 2


class Chat(Asker):
    """Asks for the answer to each row's text."""

    harmless: ClassVar[dict[str, Any]] = {"text": "Hello"}

    async def ask(self, row: int, value: dict[str, Any]) -> dict[str, Any]:
        body = BODY | {"messages": [{"role": "user", "content": value["text"]}]}
        return {"result": (await patiently(lambda: self._context.models.answer("chat", body))).decode()}


def test_a_row_that_kills_its_own_engine_is_the_only_one_that_fails(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each engine dies of it with all that is asked beside it."""
    starts = []

    class Fragile:
        def __init__(self) -> None:
            self.is_dead = False

        def close(self) -> None:
            """It has nothing to close."""

        async def answer(self, endpoint: Endpoint, body: dict[str, Any]) -> bytes:
            self.is_dead = self.is_dead or body["messages"][-1]["content"] == "poison"
            await asyncio.sleep(0.01)
            if self.is_dead:
                raise EngineDeadError
            return b"answer"

    async def start(model: LanguageModel, artifacts: str) -> Fragile:
        starts.append(model.id)
        return Fragile()

    monkeypatch.setattr(llm.LLM, "here", start)
    (own,) = Config.parse(CONFIG, "the tests' config").models
    worker = Chat(CONFIG, "default", own)
    try:
        rows = [{"row": n, "value": json.dumps({"text": text})} for n, text in enumerate(("a", "poison", "b", "c"), 1)]
        found = list(answered(rows, worker))
    finally:
        worker._context.close()
    assert [one["result"] for one in found] == ["answer", "", "answer", "answer"]
    assert [one["away"] for one in found] == [""] * 4
    assert "has died" in json.loads(found[1]["error"])["message"]
    assert len(starts) == 4, "it has died in a batch, again, and alone"


async def test_it_has_the_time_of_a_request_and_no_more(
    others: ScriptedEngine, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = OWN.model_copy(update={"request_timeout_s": 0.05})

    async def start(model: LanguageModel, artifacts: str) -> Server:
        return server

    monkeypatch.setattr(llm.LLM, "here", start)
    server.answers = lambda body: asyncio.Event().wait()
    with pytest.raises(Unavailable, match=r"within 0\.05 s"):
        await ask(OwnEngine(own, "file:///artifacts", others))


async def test_an_engine_that_does_not_start_is_tried_once(engine: OwnEngine, server: Server) -> None:
    server.fails_to_start = RuntimeError("Engine core initialization failed")
    for _ in range(2):
        with pytest.raises(Unavailable, match="has not started: Engine core initialization failed"):
            await ask(engine)
    assert server.starts == 1


async def test_it_does_not_stream(engine: OwnEngine, server: Server) -> None:
    with pytest.raises(BadInput, match="does not stream"):
        await ask(engine, stream=True)


async def test_a_worker_with_an_own_engine_asks_it(home: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    config = Config.parse(CONFIG, "the tests' config")
    (own,) = config.models
    addresses = []

    async def start(model: LanguageModel, artifacts: str) -> Server:
        addresses.append((model, artifacts))
        return server

    monkeypatch.setattr(llm.LLM, "here", start)
    worker = Asker(CONFIG, "default", own)
    try:
        assert await worker._context.models.answer("chat", BODY) == b"mine"
    finally:
        worker._context.close()
    assert addresses == [(own, config.artifacts_url)]


async def test_a_server_loads_an_adapter_from_the_artifacts(home: Path) -> None:
    folder = home / "artifacts"
    (context := Context.open(Config.parse(CONFIG, "the tests' config"), engine=ScriptedEngine())).close()
    made = home / "made"
    made.mkdir()
    (made / "adapter_config.json").write_text("{}")
    context.artifacts.publish("adapters/tune-1", made)
    resolved: list[Any] = []

    class Engine:
        async def resolve_lora(self, found: Any) -> None:
            if resolved:
                raise ValueError("Failed to load lora model: it is there")
            resolved.append(found)

    class Loading(llm.LLM):
        def __del__(self) -> None:
            """There is nothing to stop."""

    server = Loading.__new__(Loading)
    server._llm_config = llm.engine_config(OWN)
    server._adapters = llm.AdapterLoader(context.config.artifacts_url)
    server.engine = Engine()
    await server.load_adapter("small:tune-1")
    assert resolved[0].model_id == "small:tune-1"
    assert resolved[0].local_path == str(folder / "adapters" / "tune-1")
    with pytest.raises(BadInput, match="Failed to load"):
        await server.load_adapter("small:tune-1")
