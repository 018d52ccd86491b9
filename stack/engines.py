"""What an engine of a language model takes of Ray's nodes, and what a job takes that asks models about rows: by the
deployments that serve, or by an engine of its own (jobs/own_engine.py)."""

from typing import Any

from stack.api.openai import MAX_STOPS
from stack.config import LanguageModel
from stack.jobs import ASKER_CPUS


def bundles(model: LanguageModel) -> list[dict[str, float]]:
    """What an engine reserves, worker by worker."""
    bundle: dict[str, float] = {"GPU": 1} if model.gpus else {"CPU": model.cpus}
    if model.accelerator_type:
        bundle[f"accelerator_type:{model.accelerator_type}"] = 0.001  # Ray's way to say: a node that has these
    return [dict(bundle) for _ in range(model.workers)]


def strategy(model: LanguageModel) -> str:
    """How its workers may be spread. Those of a layer talk for every token: on one node. Those of a pipeline pass on,
    to another node if need be."""
    return "STRICT_PACK" if model.pipeline_parallel == 1 else "PACK"


def environment(model: LanguageModel) -> dict[str, str]:
    """The variables that an engine's processes find."""
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_MAX_STOP_STRINGS": str(MAX_STOPS)}
    if not model.gpus:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(model.kv_cache_gb)
    return environment


def bundles_of_job(own: LanguageModel | None) -> list[dict[str, float]]:
    """What a job that asks reserves: its worker, which is beside the first of its own engine's, if it has one."""
    first, *others = bundles(own) if own is not None else [{}]
    return [first | {"CPU": first.get("CPU", 0) + ASKER_CPUS}, *others]


def resources_of_job(own: LanguageModel | None) -> dict[str, Any]:
    """The same as what is told of a job that runs: it has one worker, which takes all of that."""
    reserved = bundles_of_job(own)
    total = {name: sum(bundle.get(name, 0) for bundle in reserved) for name in ("CPU", "GPU")}
    return {"workers": 1, "per_worker": {name: amount for name, amount in total.items() if amount}}
