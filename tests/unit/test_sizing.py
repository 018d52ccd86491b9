"""The formulas of docs/sizing.md, against what is known of models, and the document against them."""

import json
import warnings
from contextlib import ExitStack, closing
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.pool import QueuePool

from scripts import sizing
from scripts.sizing import LLAMAS, Jobs, Shape
from stack.config import ROOT
from stack.store import Store
from tests.postgres import Server
from tests.running_stack import wait_for

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from serve_apps.session_pool import MEMORY_BYTES

SMOLLM2 = Shape("SmolLM2-135M", 30, 576, 1_536, 9, 3, 64, 49_152, tied=True)
B1, B3, B8, B70, B405 = LLAMAS


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        (SMOLLM2, 134_515_008),
        (B1, 1_235_814_400),
        (B3, 3_212_749_824),
        (B8, 8_030_261_248),
        (B70, 70_553_706_496),
        (B405, 405_853_388_800),
    ],
    ids=lambda value: value.name if isinstance(value, Shape) else "",
)
def test_the_parameters_of_models_are_those_that_they_have(shape: Shape, parameters: int) -> None:
    assert shape.parameters == parameters


def test_the_cache_of_a_context_is_what_the_gpu_file_says() -> None:
    """`context: 32768 # … takes 4 GB of KV cache`, and 12 of them fit beside weights and adapters."""
    assert 32_768 * B8.kv_bytes == 4 * 2**30
    assert sizing.kv_tokens(B8, "bfloat16", 80, 1) // 32_768 >= 12


def test_an_adapter_has_two_matrices_for_each_linear_module() -> None:
    assert B8.adapter_parameters(1) == 32 * (8_192 + 2 * 5_120 + 8_192 + 3 * 18_432)
    assert B8.adapter_parameters(64) == 64 * B8.adapter_parameters(1)
    assert 2 * B8.adapter_parameters(64) / 1e9 == pytest.approx(0.336, abs=0.001)


@pytest.mark.parametrize(
    ("shape", "precision", "gpu_gb", "gpus"),
    [
        (B8, "bfloat16", 80, 1),
        (B8, "bfloat16", 24, 2),
        (B8, "fp8", 24, 1),
        (B70, "fp8", 80, 2),
        (B70, "bfloat16", 80, 4),
        (B405, "fp8", 80, 8),
        (B405, "bfloat16", 80, 16),
        (B405, "bfloat16", 24, None),
    ],
)
def test_a_replica_takes_as_many_gpus_as_hold_its_weights_and_a_request(
    shape: Shape, precision: str, gpu_gb: float, gpus: int | None
) -> None:
    assert sizing.least_gpus(shape, precision, gpu_gb, 32_768) == gpus


def test_what_does_not_fit_has_no_cache() -> None:
    assert sizing.kv_tokens(B70, "bfloat16", 80, 1) == 0


def test_a_whole_training_takes_16_bytes_of_each_parameter_and_lora_hardly_more_than_the_weights() -> None:
    assert sizing.training_gb(B8, "full") == pytest.approx(16 * 8.03, abs=0.1)
    assert sizing.training_gb(B8, "lora") == pytest.approx(16.06 + 16 * 0.0419, abs=0.05)
    assert sizing.training_gb(B8, "qlora") < sizing.training_gb(B8, "lora") / 3
    assert sizing.activations_gb(B8, 4_096) == pytest.approx(2 * 32 * 4_096 * 4_096 / 1e9)


def test_growth_is_in_proportion_but_for_the_gateways_that_may_be_lost() -> None:
    one, many = sizing.growth(8, 1_000), sizing.growth(800, 1_000)
    assert many.nodes == 100 * one.nodes
    assert many.tokens == 100 * one.tokens
    assert many.gateways - many.gateways_per_node >= 276
    assert many.gateways < 1.02 * 276
    assert many.sessions_gb == pytest.approx(801 * 0.157, rel=0.01)
    assert sizing.growth(1, 1_000).gateways == 1


@pytest.mark.parametrize(
    ("tokens", "nodes", "gateways"), [(1_000, 1, 1), (2_900, 1, 1), (2_901, 1, 3), (1_000, 2, 2), (64_000, 8, 27)]
)
def test_what_is_left_of_the_gateways_bears_the_load(tokens: float, nodes: int, gateways: int) -> None:
    """27 on 8 nodes: that with four of them leaves 23, and 23 · 2,900 is more than 64,000."""
    assert sizing.gateways_for(tokens, nodes) == gateways


def test_every_process_with_a_store_has_its_pool() -> None:
    """Beside gateways: the supervisor, the writer and the pool of sessions."""
    none = Jobs(asking=0, trainings=0)
    assert sizing.connections(1, 1, 0, none) == (10 + 2 + 1 + 1, 30 * 4)
    assert sizing.connections(2, 1, 0, none) == (24, 30 * 5)
    # A SharedEngine on each of three nodes, and the actors of five sessions.
    assert sizing.connections(1, 3, 5, none) == (14 + 3 + 5, 30 * (4 + 3 + 5))
    # A driver, who asks and who reads; a driver and four workers.
    assert sizing.connections(1, 1, 0, Jobs(1, 0)) == (14 + 2 + 2, 30 * (4 + 3))
    assert sizing.connections(1, 1, 0, Jobs(0, 1, workers=4)) == (14 + 2 + 4, 30 * (4 + 5))


def test_a_pool_is_as_large_as_the_formula_takes_it(postgres_server: Server) -> None:
    with postgres_server.database() as url, closing(Store(url)) as store, ExitStack() as held:
        assert connections_of(url) == 1, "opening it has taken one"
        for _ in range(3):
            assert store.jobs.get("default", "none") is None
        assert connections_of(url) == 1, "who asks one after the other needs no other"
        for _ in range(sizing.MOST):
            held.enter_context(store.engine.connect())
        assert connections_of(url) == sizing.MOST
        pool = store.engine.pool
        assert isinstance(pool, QueuePool)
        assert pool.size() + pool._max_overflow == sizing.MOST
        held.close()
        wait_for(lambda: connections_of(url) == sizing.KEPT, 10, lambda: connections_of(url))


def connections_of(url: str) -> int:
    """How many a database has, but for the one that asks."""
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        row = connection.execute(query).fetchone()
        assert row is not None
        return int(row[0])


def test_a_session_reserves_what_the_formula_takes() -> None:
    assert pytest.approx(MEMORY_BYTES / sizing.GB) == sizing.ACTOR_GB


def test_the_shape_of_a_folder_is_read(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1_536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = Shape.of(tmp_path)
    assert shape.parameters == SMOLLM2.parameters
    assert (shape.kv_bytes, shape.name) == (SMOLLM2.kv_bytes, tmp_path.name)
    assert "0.13 billion parameters" in sizing.told(shape, 2_048)


@pytest.mark.parametrize("table", [sizing.serving_table, sizing.training_table, sizing.growth_table])
def test_the_document_has_the_tables_that_the_formulas_give(table: object) -> None:
    assert callable(table)
    assert table() in (ROOT / "docs" / "sizing.md").read_text()
