"""Several nodes share a database and object storage, or nothing is started."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from stack.config import Config
from stack.errors import BadInput
from stack.shared_state import ID_FILE, require_one_home, require_shared
from stack.store import Store

SHARED: dict[str, Any] = {
    "store": "postgresql://stack@db/stack",
    "artifacts": "s3://bucket/artifacts",
    "data_roots": ["s3://bucket/data", "gs://bucket/data"],
    "memory_banks": {"folder": "s3://bucket/banks"},
}
NODES = [{"resources": {"CPU": 8}, "most": 3}]


def config(**changes: Any) -> Config:
    return Config.model_validate({"models": [{"id": "m", "path": "models/m"}]} | SHARED | changes)


def test_what_all_nodes_reach_is_taken_however_many_they_are() -> None:
    for nodes in (1, 2, 1_000):
        require_shared(config(), nodes)
    require_shared(config(artifacts="gs://bucket/artifacts", autoscaled_nodes=NODES), 3)


def test_one_node_may_keep_all_to_itself() -> None:
    require_shared(Config.model_validate({"models": [{"id": "m", "path": "models/m"}]}), 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"store": "stack.db"}, "store is 'stack.db' (allowed: postgresql://USER@HOST/NAME)"),
        ({"store": "sqlite:////mnt/stack.db"}, "store is 'sqlite:////mnt/stack.db'"),
        ({"artifacts": "artifacts"}, "artifacts is 'artifacts' (allowed: s3://bucket/prefix, gs://bucket/prefix)"),
        ({"artifacts": "file:///mnt/artifacts"}, "artifacts is 'file:///mnt/artifacts'"),
        ({"data_roots": ["s3://bucket/data", "/mnt/data"]}, "data_roots has '/mnt/data'"),
        ({"memory_banks": {"folder": "banks"}}, "memory_banks.folder is 'banks' (allowed: s3://bucket/prefix)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_several_nodes_are_refused_what_is_local_to_one(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput) as refused:
        require_shared(config(**changes), 2)
    assert "this Ray has 2 nodes" in refused.value.message
    assert words in refused.value.message
    assert refused.value.message.count("allowed") == 1, "the others are right"
    require_shared(config(**changes), 1)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(BadInput) as refused:
        require_shared(Config.model_validate({"models": [{"id": "m", "path": "models/m"}]}), 3)
    for key in ("store", "artifacts", "data_roots", "memory_banks.folder"):
        assert key in refused.value.message


def test_a_cluster_that_will_grow_is_refused_while_it_has_one_node() -> None:
    with pytest.raises(BadInput, match="grows beyond one node"):
        require_shared(config(store="stack.db", autoscaled_nodes=NODES), 1)


def test_nodes_that_share_a_home_are_taken_and_others_refused(
    store: Store, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        require_one_home(config(), store, 2)
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("STACK_HOME", str(tmp_path / "other"))
    with pytest.raises(BadInput, match="has no such file") as refused:
        require_one_home(config(), store, 2)
    known = store.home.id()
    assert f"allowed: {known!r} in the file {ID_FILE}" in refused.value.message
    (tmp_path / "other" / ID_FILE).write_text("of another stack")
    with pytest.raises(BadInput, match="has 'of another stack' there"):
        require_one_home(config(autoscaled_nodes=NODES), store, 1)
    (tmp_path / "other" / ID_FILE).write_text(f"{known}\n")  # the first one was moved here
    require_one_home(config(), store, 2)


def test_a_home_of_one_node_is_its_own(store: Store, home: Path) -> None:
    require_one_home(config(), store, 1)
    assert store.home.id() is None
    assert not (home / ID_FILE).exists()


def test_nodes_that_start_at_once_agree_on_their_home(store: Store, home: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        for started in [threads.submit(require_one_home, config(), store, 8) for _ in range(8)]:
            started.result()
    assert [file.name for file in home.glob(f"{ID_FILE}*")] == [ID_FILE]
    assert (home / ID_FILE).read_text() == store.home.id()


def test_of_two_homes_at_once_the_database_takes_one(
    store: Store, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other node, too, has seen no id yet."""
    require_one_home(config(), store, 2)
    monkeypatch.setenv("STACK_HOME", str(tmp_path / "other"))
    seen = iter([None, store.home.id()])
    monkeypatch.setattr(store.home, "id", lambda: next(seen, (home / ID_FILE).read_text()))
    with pytest.raises(BadInput, match="must be one folder that all nodes mount"):
        require_one_home(config(), store, 2)
