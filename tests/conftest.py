"""What the tests share: a home folder of their own and a context on a scripted engine."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from safetensors.numpy import save_file

from stack.config import Config
from stack.context import Context
from stack.store import Store
from tests import postgres
from tests.running_stack import stack as stack  # for all folders: one stack a session
from tests.s3 import s3 as s3
from tests.s3 import s3_server as s3_server
from tests.scripted_engine import ScriptedEngine

# An example that takes long on a busy machine is no fault of what is tested.
hypothesis.settings.register_profile("stack", deadline=None)
hypothesis.settings.load_profile("stack")

CONFIG: dict[str, Any] = {
    "max_body_bytes": 64 * 1024,
    "max_dataset_bytes": 64 * 1024,
    "models": [{"id": "small", "path": "models/small", "context": 256, "adapter_rank": 16}],
}
# The model's weights: of the names that those of Llama have, and small.
_LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
WEIGHTS = {
    "model.embed_tokens.weight": np.zeros((8, 4), np.float16),
    **{f"model.layers.{n}.{name}.weight": np.zeros((4, 4), np.float16) for n in (0, 1) for name in (*_LAYERS, *_MLP)},
    **{f"model.layers.{n}.input_layernorm.weight": np.zeros(4, np.float16) for n in (0, 1)},
    "lm_head.weight": np.zeros((8, 4), np.float16),
}
WITH_BOTH_DATABASES = {
    f"tests.api.test_{name}"
    for name in ("agentic_system", "datasets", "experiments", "keys", "life_cycle", "metrics", "telemetry", "tenants")
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """STACK_HOME, in a temporary folder, with a data folder and the files of a model."""
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (home / "models" / "small").mkdir(parents=True)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    (home / "models" / "small" / "config.json").write_text(json.dumps(shape))
    save_file(WEIGHTS, home / "models" / "small" / "model.safetensors")
    monkeypatch.setenv("STACK_HOME", str(home))
    monkeypatch.delenv("STACK_CONFIG", raising=False)
    return home


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Server]:
    with postgres.server() as server:
        yield server


@pytest.fixture(scope="session")
def new_sqlite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without rows; a copy of it is made faster than another one."""
    file = tmp_path_factory.mktemp("store") / "stack.db"
    Store(f"sqlite:///{file}").close()
    return file


@pytest.fixture
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a store without rows. Where the database matters, tests run once with each: see below."""
    if getattr(request, "param", "sqlite") == "postgresql":
        with request.getfixturevalue("postgres_server").database() as url:
            yield url
    else:
        shutil.copy(request.getfixturevalue("new_sqlite_file"), tmp_path / "stack.db")
        yield f"sqlite:///{tmp_path}/stack.db"


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    store = Store(store_url)
    yield store
    store.close()


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def context(home: Path, store_url: str, engine: ScriptedEngine) -> Iterator[Context]:
    context = Context.open(Config.parse(CONFIG | {"store": store_url}, "the tests' config"), engine=engine)
    yield context
    context.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The tests without HTTP run with both databases, and of the others those whose routes do more than read a row."""
    module = metafunc.module.__name__
    if "store_url" in metafunc.fixturenames and (module.startswith("tests.unit.") or module in WITH_BOTH_DATABASES):
        metafunc.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
