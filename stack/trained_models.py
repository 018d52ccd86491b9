"""Copies of whole models that jobs have trained, where artifacts are in object storage: engines load files of a node.

They lie in STACK_HOME, which all nodes of a cluster share, and go when their model is removed.
"""

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stack import disk
from stack.config import home

FOLDER = "trained"


def keep(artifact: str, made: Path) -> Path:
    """Copies the files of a model that a job has made, in the place of what an earlier attempt had copied.

    What lies in folders beside them is no engine's. Raises StorageFull.
    """
    target = home() / FOLDER / artifact
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
    try:
        with disk.telling_full("the disk of STACK_HOME"):
            part.mkdir(parents=True)
            for file in filter(Path.is_file, made.iterdir()):
                shutil.copy2(file, part)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def forget(entry: Mapping[str, Any]) -> None:
    """Deletes the copy of a model that is not served any more, if its entry names one."""
    path = Path(entry["path"])
    if path.is_relative_to(home() / FOLDER):
        shutil.rmtree(path, ignore_errors=True)
