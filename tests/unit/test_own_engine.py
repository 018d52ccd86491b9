"""An engine of a job's own: what it is asked, what goes to the deployments that serve, how it starts and fails."""

import asyncio
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

    from jobs.asking import Asker
    from jobs.own_engine import OwnEngine
    from serve_apps import llm

OWN = LanguageModel(id="small", path="models/small", request_timeout_s=60)
BODY: dict[str, Any] = {"model": "small", "messages": [], "stream": False}
SOON_S = 5
Answer = Callable[[dict[str, Any]], Any]


class Server:
    """What LLM.here gives: it answers with what `answers` makes of a body, or raises it."""

    def __init__(self) -> None:
        self.answers: Answer = lambda body: b"mine"
        self.starts = 0
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
        # The attempt is lost by this (jobs/driver.py), and another one has another engine.
        (EngineDeadError(), Unavailable, "own engine of the model 'small' has died"),
    ],
    ids=str,
)
async def test_what_fails_is_told_as_by_the_model_that_serves(
    engine: OwnEngine, server: Server, answer: Any, kind: type[StackError], words: str
) -> None:
    server.answers = lambda body: answer
    with pytest.raises(kind, match=words):
        await ask(engine)


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
