"""Whether what the nodes of a cluster share lies where all of them reach it.

On one node it may lie in local files. On several, each would have a database, artifacts and memory banks of its own,
and what one has written the others would not find.
"""

import os
import uuid
from contextlib import suppress
from pathlib import Path

from stack.config import Config, home
from stack.errors import BadInput
from stack.store import Store

_DATABASE = "postgresql://USER@HOST/NAME"
_STORAGE = "s3://bucket/prefix"
_ANY_STORAGE = f"{_STORAGE}, gs://bucket/prefix"


# In STACK_HOME, the id that the database has of it.
ID_FILE = "stack-id"


def require_shared(config: Config, nodes: int) -> None:
    """Raises BadInput, naming each key that is to be changed, where something is local to one of several nodes.

    `nodes` are those of Ray's cluster that are there now; a config with `autoscaled_nodes` is for several in any case.
    """
    if not _are_several(config, nodes):
        return
    wrong = []
    if config.store_url.startswith("sqlite"):
        wrong.append(f"store is {config.store!r} (allowed: {_DATABASE})")
    if config.artifacts_url.startswith("file:"):
        wrong.append(f"artifacts is {config.artifacts!r} (allowed: {_ANY_STORAGE})")
    wrong += [f"data_roots has {root!r} (allowed: {_ANY_STORAGE})" for root in config.data_roots if "://" not in root]
    if "://" not in config.memory_banks.folder:
        wrong.append(f"memory_banks.folder is {config.memory_banks.folder!r} (allowed: {_STORAGE})")
    if wrong:
        several = f"has {nodes} nodes" if nodes > 1 else "grows beyond one node (autoscaled_nodes)"
        raise BadInput(
            f"this Ray {several}, and what they share must lie where each of them reaches it: {'; '.join(wrong)}. "
            "serve_apps/cluster.yaml shows how"
        )


def require_one_home(config: Config, store: Store, nodes: int) -> None:
    """Raises BadInput where STACK_HOME of this one of several nodes is not the folder that the others have.

    The first that is asked writes an id into it and into the database; others find both, or another folder.
    """
    if not _are_several(config, nodes):
        return
    file = home() / ID_FILE
    known = store.home.id()
    if known is None:
        _write(file)
        store.home.settle(file.read_text().strip())
        known = store.home.id()
    found = _read(file)
    if found != known:
        has = "has no such file" if found is None else f"has {found!r} there"
        raise BadInput(
            f"STACK_HOME must be one folder that all nodes mount, and that of this node, {home()}, is another one than "
            f"the first node's: it {has}; allowed: {known!r} in the file {ID_FILE}. Mount the first node's folder; of "
            "one that was moved, write that into the file"
        )


def _are_several(config: Config, nodes: int) -> bool:
    return nodes > 1 or bool(config.autoscaled_nodes)


def _write(file: Path) -> None:
    """Makes the file, whole from the beginning, unless there is one: on NFS too a link is made by one alone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    part.write_text(uuid.uuid4().hex)
    try:
        with suppress(FileExistsError):
            os.link(part, file)
    finally:
        part.unlink()


def _read(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except FileNotFoundError:
        return None
