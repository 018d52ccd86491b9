"""On which of Ray's nodes what serves may run: not on spot nodes, which a cloud takes back within minutes.

A node says what it is by Ray's own label ray.io/market-type, which the files of clusters/ set; one without the label is
no spot node. What jobs run goes anywhere: it goes on from its last checkpoint on another node.

What answers requests is not on the head of several nodes either, so that the loss of the head takes nothing of it:
while the head is away, nothing is started again. The files of clusters/ give the head the label llama-stack/head.

What hands jobs to Ray runs on the head: there Ray takes them, at an address that is the head's alone.
"""

from typing import Any

import ray

NOT_SPOT = {"ray.io/market-type": "!spot"}
NOT_HEAD = {"llama-stack/head": "!true"}
# Of an actor that reserves nothing, as it mostly waits.
WAITS = {"num_cpus": 0, "label_selector": NOT_SPOT | NOT_HEAD}
# The same on the head, by the resource that Ray gives to each head.
ON_HEAD: dict[str, Any] = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}


def alive_nodes() -> list[dict[str, float]]:
    """What each living node of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def addresses() -> list[str]:
    """Those of the living nodes, to which Ray's ports are bound."""
    return list(addresses_by_id().values())


def addresses_by_id() -> dict[str, str]:
    """The same, by the ids of the nodes."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


def cluster() -> str:
    """The name of this Ray: each that is started has another, and a head that is started again by Redis the same."""
    return ray.get_runtime_context().get_session_name()


def of_bundles(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a deployment that has bundles of resources, with those nodes alone for each of the bundles."""
    return options | {"placement_group_bundle_label_selector": [NOT_SPOT for _ in options["placement_group_bundles"]]}
