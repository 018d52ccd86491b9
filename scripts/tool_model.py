"""A stack with the model that calls tools, for the tests and benches that want one: scripts/prepare_for_tests.py."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from scripts.bench_servers import BenchFailed, Server, free_port, running, stack_document
from scripts.prepare_for_tests import TOOL_MODEL
from stack.config import GATEWAY, LanguageModel

ENTRY: dict[str, Any] = {
    "id": TOOL_MODEL,
    "path": f"models/{TOOL_MODEL}",
    "dtype": "float32",
    "context": 4096,
    "adapters": 0,
    "kv_cache_gb": 1,
    "prompt_format": "hermes",
    "engine": {"enforce_eager": True},
}


@contextmanager
def serving(folder: Path, **agents: Any) -> Iterator[Server]:
    """A stack whose only model it is, with these bounds of agents' turns. Raises BenchFailed where it cannot be had."""
    model = LanguageModel.model_validate(ENTRY)
    if not (model.folder / "config.json").is_file():
        raise BenchFailed(f"the model is not in {model.folder}: run python -m scripts.prepare_for_tests tool-model")
    document = stack_document(model, is_scripted=False)
    gateway = next(one for one in document["applications"] if one["name"] == GATEWAY)
    gateway["args"]["agents"] = agents
    folder.mkdir()
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(document))
    port = free_port()
    command = [sys.executable, "-m", "scripts.serve", "--config", str(file), "--port", str(port), "--stop-with-stdin"]
    with running("the stack", command, folder, port, "/health") as server:
        yield server
