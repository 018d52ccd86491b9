"""Several nodes share a database and object storage, or nothing is started."""

from typing import Any

import pytest

from stack.config import Config
from stack.errors import BadInput
from stack.shared_state import require_shared

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
