"""How several workers share a training: what the Trainer is told for it, and how what was trained is written.

Each worker has the whole model and its own share of every batch (DDP), or also only its share of the model (FSDP), or
of the optimizer's state, the gradients and the model (DeepSpeed's ZeRO-1, -2 and -3). What DeepSpeed is told is in
jobs/templates; where a template says "auto", the Trainer fills in its own value.
"""

import json
from pathlib import Path
from typing import Any

from stack.api.post_training import Parallelism

TEMPLATES = Path(__file__).with_name("templates")


def arguments(parallelism: Parallelism, *, wrap_blocks: bool, offload: bool, is_cpu: bool) -> dict[str, Any]:
    """The arguments of a TRL trainer's config. It is called before that is made.

    FSDP shards each transformer block by itself if `wrap_blocks`; with `offload` the shards lie in the host's memory.
    """
    backend = {"ddp_backend": "gloo"} if is_cpu else {}
    if parallelism == Parallelism.ddp:
        return {**backend, "ddp_find_unused_parameters": False}
    if parallelism == Parallelism.fsdp:
        config = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP" if wrap_blocks else "NO_WRAP",
            "cpu_offload": offload,
            "state_dict_type": "FULL_STATE_DICT",  # with sharded ones, save_model writes nothing
        }
        return {**backend, "fsdp": True, "fsdp_config": config}
    if is_cpu:
        _compile_nothing()
    return {**backend, "deepspeed": json.loads((TEMPLATES / f"{parallelism}.json").read_text())}


def _compile_nothing() -> None:
    """DeepSpeed would build an operator for workers that share memory as it starts, which takes a compiler and a
    minute. Without it they talk by gloo."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def prepare(args: Any, parallelism: Parallelism) -> None:
    """Is called with a trainer's config, before the trainer is made of it.

    Accelerate knows FSDP for accelerators alone: between CPUs it drops it without a word and trains by DDP. It shards
    there as well once it takes the workers for GPUs; the device stays what it is.
    """
    from accelerate.utils import DistributedType  # type: ignore[import-untyped]

    if parallelism == Parallelism.fsdp and args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU


def save(trainer: Any, folder: Path) -> None:
    """Writes the adapter, or the whole model, from rank 0. All ranks call it: where weights are sharded, all give."""
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()  # no rank goes on before the files are there
