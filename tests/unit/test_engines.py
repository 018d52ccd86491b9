"""What engines take, and jobs that have one of their own."""

from typing import Any

import pytest

from stack import engines
from stack.config import DEFAULT_FILE, Config, LanguageModel


def model(**entry: Any) -> LanguageModel:
    return LanguageModel.model_validate({"id": "m", "path": "models/m"} | entry)


def test_a_job_without_an_engine_takes_its_worker_alone() -> None:
    assert engines.bundles_of_job(None) == [{"CPU": 0.25}]
    assert engines.resources_of_job(None) == {"workers": 1, "per_worker": {"CPU": 0.25}}


@pytest.mark.parametrize(
    ("entry", "bundles", "all_in_all", "strategy"),
    [
        ({"cpus": 1.5}, [{"CPU": 1.75}], {"CPU": 1.75}, "STRICT_PACK"),
        ({"tensor_parallel": 2}, [{"CPU": 1.25}, {"CPU": 1}], {"CPU": 2.25}, "STRICT_PACK"),
        ({"gpus": 1}, [{"GPU": 1, "CPU": 0.25}], {"CPU": 0.25, "GPU": 1}, "STRICT_PACK"),
        (
            {"gpus": 2, "pipeline_parallel": 2, "accelerator_type": "H100"},
            [
                {"GPU": 1, "accelerator_type:H100": 0.001, "CPU": 0.25},
                {"GPU": 1, "accelerator_type:H100": 0.001},
            ],
            {"CPU": 0.25, "GPU": 2},
            "PACK",
        ),
    ],
    ids=str,
)
def test_a_job_with_an_engine_of_its_own_takes_what_a_replica_takes_besides(
    entry: dict[str, Any], bundles: list[dict[str, float]], all_in_all: dict[str, float], strategy: str
) -> None:
    own = model(**entry)
    assert engines.bundles_of_job(own) == bundles
    assert engines.resources_of_job(own) == {"workers": 1, "per_worker": all_in_all}
    assert engines.strategy(own) == strategy


def test_the_models_of_the_gpu_file_fit_a_job_on_its_8_gpus() -> None:
    for one in Config.from_file(DEFAULT_FILE.parent / "gpu.yaml").models:
        assert engines.resources_of_job(one)["per_worker"] == {"CPU": 0.25, "GPU": one.gpus}


def test_an_engine_on_cpu_is_told_how_much_memory_it_has() -> None:
    assert engines.environment(model(kv_cache_gb=3))["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert "VLLM_CPU_KVCACHE_SPACE" not in engines.environment(model(gpus=1))
    assert engines.environment(model())["HF_HUB_OFFLINE"] == "1"
