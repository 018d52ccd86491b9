"""Whether what the nodes of a cluster share lies where all of them reach it.

On one node it may lie in local files. On several, each would have a database, artifacts and memory banks of its own,
and what one has written the others would not find.
"""

from stack.config import Config
from stack.errors import BadInput

_DATABASE = "postgresql://USER@HOST/NAME"
_STORAGE = "s3://bucket/prefix"
_ANY_STORAGE = f"{_STORAGE}, gs://bucket/prefix"


def require_shared(config: Config, nodes: int) -> None:
    """Raises BadInput, naming each key that is to be changed, where something is local to one of several nodes.

    `nodes` are those of Ray's cluster that are there now; a config with `autoscaled_nodes` is for several in any case.
    """
    if nodes <= 1 and not config.autoscaled_nodes:
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
