"""Adds a model to a stack that runs, or removes one, waits until all are ready, and shows them.

    python -m scripts.drivers.serve                              all models, and how they are
    python -m scripts.drivers.serve --add model.yaml             an entry as in the config file, see stack/config.py
    python -m scripts.drivers.serve --remove Llama-3.2-1B

The model's files lie in STACK_HOME of the stack's nodes, or at an absolute path that all of them have.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from scripts.drivers.client import LOOK_S, Refused, Stack, drive, say


def options(parser: argparse.ArgumentParser) -> None:
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--add", type=Path, metavar="FILE", help="the entry of a language model, in YAML or JSON")
    change.add_argument("--remove", metavar="ID", help="a model that was added, or that a job has made")


def run(stack: Stack, arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.add:
        entry = yaml.safe_load(arguments.add.read_text())
        say(f"adding {stack.post('/models/add', entry)['id']}")
    if arguments.remove:
        stack.post("/models/remove", {"model_id": arguments.remove})
        say(f"removed {arguments.remove}")
    return {"models": ready(stack)}


def ready(stack: Stack, wait: Any = time.sleep) -> list[dict[str, Any]]:
    """All models, once none is starting or stopping. Raises Refused for one that cannot start."""
    said = ""
    while True:
        models: list[dict[str, Any]] = stack.get("/models/list")["data"]
        for model in models:
            if model["state"] == "failed":
                raise Refused(f"the model {model['id']} cannot start: {model.get('reason') or 'no reason given'}")
        waiting = [f"{model['id']} ({model['state']})" for model in models if model["state"] != "running"]
        if not waiting:
            return models
        if (told := ", ".join(waiting)) != said:
            said = told
            say(f"waiting for {told}")
        wait(LOOK_S)


def words(result: dict[str, Any]) -> str:
    rows = [f"{one['id']}  {one['source']}, {one['state']}, {one['replicas']} replicas" for one in result["models"]]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(drive(__doc__, options, run, words))
