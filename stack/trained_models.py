"""Copies of whole models that jobs have trained, where artifacts are in object storage: engines load files of a node.

They lie in STACK_HOME, which all nodes of a cluster share. Each attempt makes one of its own, which counts once a row
names it as a model's path, and is never changed then; it goes when its model is removed, and others are swept.
"""

import datetime as dt
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stack import disk
from stack.config import home
from stack.context import DEFAULT_TENANT, Context

FOLDER = "trained"
# Where in it copies are, by the names that stack.jobs gives to artifacts.
COPIES = ("models/*", "tenants/*/models/*")
SWEEP_AFTER = dt.timedelta(days=1)


def keep(artifact: str, made: Path) -> Path:
    """Copies the files of a model that an attempt at a job has made, and gives the copy's folder.

    What lies in folders beside them is no engine's. Raises StorageFull.
    """
    copy = home() / FOLDER / f"{artifact}@{uuid.uuid4().hex}"
    try:
        with disk.telling_full("the disk of STACK_HOME"):
            copy.mkdir(parents=True)
            for file in filter(Path.is_file, made.iterdir()):
                shutil.copy2(file, copy)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return copy


def forget(entry: Mapping[str, Any]) -> None:
    """Deletes the copy of a model that is not served any more, if its entry names one."""
    path = Path(entry["path"])
    if path.is_relative_to(home() / FOLDER):
        shutil.rmtree(path, ignore_errors=True)


def sweep(context: Context) -> list[str]:
    """Removes copies that are no model's: of attempts that were lost while or after they copied. Returns the names.

    One that was written to within SWEEP_AFTER stays: it may be under way, or about to become a model's. So does one of
    a job that the database does not know: it may be another's, or was restored. What is no folder is none of ours.
    """
    root = home() / FOLDER
    oldest = time.time() - SWEEP_AFTER.total_seconds()
    left = sorted(
        copy for places in COPIES for copy in root.glob(places) if copy.is_dir() and _written_at(copy) < oldest
    )
    if not left:
        return []
    named = [model.path for model in context.config.all_models]
    named += [row.entry["path"] for row in context.store.models.list()]
    known = {(home() / Path(path).expanduser()).resolve() for path in named}
    unknown = [copy for copy in left if copy.resolve() not in known and _is_of_a_job(context, copy.relative_to(root))]
    for copy in unknown:
        shutil.rmtree(copy, ignore_errors=True)
    return [str(copy.relative_to(home())) for copy in unknown]


def _is_of_a_job(context: Context, copy: Path) -> bool:
    """Whether the job of `models/JOB@…` or `tenants/TENANT/models/JOB@…` has a row."""
    tenant = copy.parts[1] if copy.parts[0] == "tenants" else DEFAULT_TENANT
    uuid = copy.name.partition("@")[0]
    return uuid in context.store.jobs.statuses(tenant, [uuid])


def _written_at(copy: Path) -> float:
    """When something was written last in a copy. One file after the other has its original's time, once it is whole."""
    try:
        return max(path.stat().st_mtime for path in (copy, *copy.iterdir()))
    except FileNotFoundError:  # it is being removed with its model
        return time.time()
