"""What the tests on GPUs share: a stack of their own, whose model is served on a GPU while it is asked."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from scripts import local_stack
from tests.otlp import receiver
from tests.running_stack import MODEL, Stack, free_port, prepared_home


@pytest.fixture(scope="module")
def gpu_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("gpu-stack")
    with receiver() as traces, pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_stack, "CONFIG", gpu_config(folder / "gpu.yaml"))
        stack = Stack(prepared_home(folder), free_port(), traces)
        try:
            stack.start()
            yield stack
        finally:
            stack.kill()


@pytest.fixture
def client(gpu_stack: Stack) -> Iterator[httpx.Client]:
    with gpu_stack.client() as client:
        yield client


def gpu_config(file: Path) -> Path:
    """serve_apps/local.yaml with the language model on a GPU, which trainings have when nobody asks the model."""
    document = yaml.safe_load(local_stack.CONFIG.read_text())
    by_name = {application["name"]: application["args"] for application in document["applications"]}
    model = by_name[MODEL]["model"] | {"dtype": "bfloat16", "gpus": 1, "min_replicas": 0, "downscale_delay_s": 2}
    model["engine"] = {"enforce_eager": True, "gpu_memory_utilization": 0.5}
    del model["kv_cache_gb"]
    by_name[MODEL]["model"] = model
    by_name["gateway"]["models"] = [model]
    file.write_text(yaml.safe_dump(document))
    return file
