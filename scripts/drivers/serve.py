"""Adds a model to a stack that runs, or removes one, waits until that is done, and shows all models.

    python -m scripts.drivers.serve                              waits until none starts or stops
    python -m scripts.drivers.serve --add model.yaml             an entry as in the config file, see stack/config.py
    python -m scripts.drivers.serve --remove Llama-3.2-1B

The model's files lie in STACK_HOME of the stack's nodes, or at an absolute path that all of them have.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from scripts.drivers.client import LOOK_S, Refused, Stack, drive, say

# The states that pass by themselves.
CHANGING = ("starting", "stopping")


def options(parser: argparse.ArgumentParser) -> None:
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--add", type=Path, metavar="FILE", help="the entry of a language model, in YAML or JSON")
    change.add_argument("--remove", metavar="ID", help="a model that was added, or that a job has made")


def run(stack: Stack, arguments: argparse.Namespace) -> dict[str, Any]:
    changed: str | None = arguments.remove
    if arguments.add:
        changed = stack.post("/models/add", yaml.safe_load(arguments.add.read_text()))["id"]
        say(f"adding {changed}")
    if arguments.remove:
        stack.post("/models/remove", {"model_id": arguments.remove})
        say(f"removed {arguments.remove}")
    return {"models": ready(stack, changed)}


def ready(stack: Stack, changed: str | None = None, wait: Callable[[float], None] = time.sleep) -> list[dict[str, Any]]:
    """All models, once the one that was added or removed is started or gone; without one, once none starts or stops.

    Raises Refused where that one cannot start. Of others, which may be anybody's, the list tells it.
    """
    said = ""
    while True:
        models: list[dict[str, Any]] = stack.get("/models/list")["data"]
        awaited = [model for model in models if changed is None or model["id"] == changed]
        for model in awaited:
            if changed is not None and model["state"] == "failed":
                raise Refused(f"the model {changed} cannot start: {model.get('reason') or 'no reason given'}")
        waiting = [_told(model) for model in awaited if model["state"] in CHANGING]
        if not waiting:
            return models
        if (told := ", ".join(waiting)) != said:
            said = told
            say(f"waiting for {told}")
        wait(LOOK_S)


def _told(model: dict[str, Any]) -> str:
    reason = model.get("reason")
    return f"{model['id']} ({model['state']}{f': {reason}' if reason else ''})"


def words(result: dict[str, Any]) -> str:
    return "\n".join(
        f"{one['id']}  {one['source']}, {one['state']}, {one['replicas']} replicas"
        + (f": {one['reason']}" if one.get("reason") else "")
        for one in result["models"]
    )


if __name__ == "__main__":
    sys.exit(drive(__doc__, options, run, words))
