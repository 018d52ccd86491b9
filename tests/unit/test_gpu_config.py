"""The applications of every Serve config file here, built without starting them: no Ray, no GPU, no model's files."""

import importlib
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray._private.label_utils import validate_label_selector
from ray.util.accelerators import accelerators
from safetensors.numpy import save_file

from scripts.local_stack import read_serve_file
from stack.config import DEFAULT_FILE, GATEWAY, Accelerator, Config, EmbeddingModel, LanguageModel
from stack.errors import BadInput
from tests.conftest import WEIGHTS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from serve_apps.gateway import Gateway
    from serve_apps.job_supervisor import JobSupervisor
    from serve_apps.memory_writer import MemoryWriter
    from serve_apps.placement import NOT_HEAD, NOT_SPOT
    from serve_apps.session_pool import SessionPool

FILES = sorted(set(DEFAULT_FILE.parent.glob("*.yaml")) - {DEFAULT_FILE.with_name("kustomization.yaml")})
GPU_FILE = DEFAULT_FILE.parent / "gpu.yaml"
SMALL, LARGE = "Llama-3.1-8B-Instruct", "Llama-3.1-70B-Instruct"


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The stack's home, which is not there. ray.serve.llm asks Ray for the environment of the process that builds."""
    monkeypatch.setenv("STACK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env={}))
    return tmp_path / "home"


def built(application: dict[str, Any]) -> Any:
    """The deployment at the root of an application."""
    module, attribute = application["import_path"].split(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Ray and vLLM warn of as they are imported
        build = getattr(importlib.import_module(module), attribute)
    return build(application["args"])._bound_deployment


def application(id: str, file: Path = GPU_FILE) -> dict[str, Any]:
    applications = yaml.safe_load(file.read_text())["applications"]
    return next(one for one in applications if one["name"] == id)


def built_of(id: str = "m", **entry: Any) -> Any:
    """The deployment of a model with this entry."""
    model = {"id": id, "path": f"models/{id}"} | entry
    return built({"import_path": "serve_apps.llm:build", "args": {"model": model}})


def engine_of(deployment: Any) -> dict[str, Any]:
    arguments = deployment.init_kwargs["llm_config"].engine_kwargs
    assert isinstance(arguments, dict)
    return arguments


def bundles_of(deployment: Any) -> Any:
    return deployment._replica_config.placement_group_bundles


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_application_of_every_config_file_is_built_without_ray_and_without_files(
    file: Path, without_ray: Path
) -> None:
    applications = yaml.safe_load(file.read_text())["applications"]
    for one in applications:
        assert built(one).name
    assert not ray.is_initialized()
    assert not without_ray.exists()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_config_file_serves_each_of_its_models(file: Path) -> None:
    config = Config.from_file(file)
    applications = {one["name"]: one for one in yaml.safe_load(file.read_text())["applications"]}
    assert set(applications) == {GATEWAY, *(model.id for model in config.all_models)}
    for model in config.embedding_models:
        assert EmbeddingModel.model_validate(applications[model.id]["args"]["model"]) == model
    for model in config.models:
        args = applications[model.id]["args"]
        assert LanguageModel.model_validate(args["model"]) == model
        assert args["artifacts"] == config.artifacts
        assert applications[model.id]["route_prefix"] is None, "only the gateway is public"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_that_serves_is_put_on_spot_nodes_and_what_reserves_nothing_not_on_the_head(file: Path) -> None:
    assert validate_label_selector(NOT_SPOT | NOT_HEAD) is None, "Ray takes it"
    for deployment in (Gateway, MemoryWriter, SessionPool):
        assert deployment.ray_actor_options["label_selector"] == NOT_SPOT | NOT_HEAD  # type: ignore[attr-defined]
    for one in yaml.safe_load(file.read_text())["applications"]:
        if one["name"] == GATEWAY:
            continue
        deployment = built(one)
        if bundles_of(deployment) is None:
            assert deployment.ray_actor_options["label_selector"] == NOT_SPOT
        else:
            selectors = deployment._replica_config.placement_group_bundle_label_selector
            assert selectors == [NOT_SPOT] * len(bundles_of(deployment))


def test_jobs_are_handed_to_ray_on_its_head_where_alone_it_takes_them() -> None:
    options = JobSupervisor.ray_actor_options  # type: ignore[attr-defined]
    assert options["resources"] == {HEAD_NODE_RESOURCE_NAME: 0.001}
    assert options["num_cpus"] == 0


def test_the_models_of_the_gpu_file_fit_on_its_8_gpus_at_once() -> None:
    models = Config.from_file(GPU_FILE).models
    assert [model.id for model in models] == [SMALL, LARGE]
    assert sum(model.gpus * model.most_replicas for model in models) == 8


def test_the_gpu_file_has_a_shield_with_the_lines_that_are_comments(tmp_path: Path) -> None:
    file = tmp_path / "guarded.yaml"
    text = GPU_FILE.read_text().replace("#: ", "").replace("max_replicas: 4 # GPUs 1 to 4", "max_replicas: 3 #")
    file.write_text(text)
    config = read_serve_file(file).config
    assert sum(model.gpus * model.most_replicas for model in config.models) == 8
    (shield,) = config.shields
    assert config.model_shields[SMALL].output == [shield.id]
    assert built(application("Llama-Guard-3-8B", file)).name


def test_the_small_model_has_several_replicas_of_one_gpu_each() -> None:
    deployment = built(application(SMALL))
    assert bundles_of(deployment) == [{"GPU": 1, "CPU": 0, "accelerator_type:H100": 0.001}]
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 64)
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (10, 600)
    assert (deployment.max_ongoing_requests, deployment.max_queued_requests) == (128, 256)
    router = deployment._deployment_config.request_router_config.get_request_router_class()
    assert router.__name__ == "PrefixRouter"
    engine = engine_of(deployment)
    assert (engine["dtype"], engine["max_loras"], engine["max_lora_rank"]) == ("bfloat16", 8, 64)
    assert "quantization" not in engine


def test_the_large_model_is_spread_over_4_gpus_of_a_node_in_fp8_and_scales_to_zero() -> None:
    deployment = built(application(LARGE))
    assert [bundle["GPU"] for bundle in bundles_of(deployment)] == [1, 1, 1, 1]
    assert deployment._replica_config.placement_group_strategy == "STRICT_PACK"
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (0, 1)
    engine = engine_of(deployment)
    assert (engine["tensor_parallel_size"], engine["quantization"]) == (4, "fp8")
    assert "enable_lora" not in engine


def test_a_pipeline_may_lie_on_several_nodes() -> None:
    deployment = built_of(tensor_parallel=2, pipeline_parallel=2, gpus=4)
    assert len(bundles_of(deployment)) == 4
    assert deployment._replica_config.placement_group_strategy == "PACK"
    assert engine_of(deployment)["pipeline_parallel_size"] == 2


def test_prompts_are_read_whole_on_cpu_and_in_parts_where_vllm_likes_on_gpus() -> None:
    assert engine_of(built_of())["enable_chunked_prefill"] is False
    assert engine_of(built_of(engine={"enable_chunked_prefill": True}))["enable_chunked_prefill"] is True
    assert "enable_chunked_prefill" not in engine_of(built_of(gpus=1))


def test_a_fixed_number_of_replicas_does_not_follow_the_load() -> None:
    deployment = built_of(min_replicas=3)
    assert deployment.num_replicas == 3
    assert deployment._deployment_config.autoscaling_config is None


def test_a_replica_that_is_stopped_may_first_end_its_requests() -> None:
    assert built_of(request_timeout_s=1_200)._deployment_config.graceful_shutdown_timeout_s == 1_200


def test_without_gpus_a_worker_takes_cpus() -> None:
    deployment = built_of(cpus=1.5, kv_cache_gb=3)
    assert bundles_of(deployment) == [{"CPU": 1.5, "GPU": 0}]
    environment = deployment.ray_actor_options["runtime_env"]["env_vars"]
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3"


def test_the_engine_reads_safetensors_alone_and_writes_json_without_blanks() -> None:
    engine = engine_of(built_of())
    assert engine["load_format"] == "safetensors"
    assert engine["structured_outputs_config"] == {"backend": "xgrammar", "disable_any_whitespace": True}
    own = engine_of(built_of(engine={"structured_outputs_config": {"backend": "guidance"}, "max_num_seqs": 8}))
    assert own["structured_outputs_config"] == {"backend": "guidance", "disable_any_whitespace": True}
    assert own["max_num_seqs"] == 8


def test_answers_are_not_held_back_and_the_gateways_templates_are_taken() -> None:
    deployment = built_of()
    assert deployment.init_kwargs["llm_config"].experimental_configs == {"stream_batching_interval_ms": 0}
    assert engine_of(deployment)["trust_request_chat_template"] is True


def test_the_engines_arguments_are_arguments_of_vllm(tmp_path: Path) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    known = set(AsyncEngineArgs.__dataclass_fields__) | set(FrontendArgs.__dataclass_fields__)
    assert set(engine_of(built(application(SMALL)))) <= known
    assert set(engine_of(built(application(LARGE)))) <= known


def test_accelerators_have_rays_names() -> None:
    names = {value for name, value in vars(accelerators).items() if name.isupper() or name.startswith("AMD")}
    assert set(Accelerator.__args__) <= names


def test_args_that_are_wrong_are_refused_with_the_key() -> None:
    with pytest.raises(BadInput, match="model: gpus is 3"):
        built_of(gpus=3)


def test_adapters_are_of_the_layers_that_a_model_has_and_not_of_its_output(without_ray: Path) -> None:
    """With the output layer among them, the logprobs of a prompt would end vLLM's engine."""
    folder = without_ray / "models" / "m"
    folder.mkdir(parents=True)
    save_file(WEIGHTS, folder / "model.safetensors")
    modules = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert engine_of(built_of(adapters=1))["lora_target_modules"] == modules
    assert "lora_target_modules" not in engine_of(built_of(adapters=0))
    assert engine_of(built_of(adapters=1, engine={"lora_target_modules": ["q_proj"]}))["lora_target_modules"] == [
        "q_proj"
    ]


def test_where_the_layers_are_not_known_adapters_may_be_of_any() -> None:
    assert "lora_target_modules" not in engine_of(built_of(adapters=1))
