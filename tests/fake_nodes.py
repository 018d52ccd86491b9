"""A cluster that grows and shrinks as that of clusters/aws.yaml does, on this machine: python -m tests.fake_nodes

Its node types are those of the file, with fewer CPUs, of Ray's provider of nodes that are processes. It stops every Ray
that it sees before: it is for a host of its own (tests/hosts.py), and ends with it.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray.cluster_utils import AutoscalingCluster

from tests.hosts import Host

AWS = Path(__file__).parents[1] / "clusters" / "aws.yaml"
HEAD = "ray.head.default"  # what Ray's provider calls it
CPUS = {"cpu": 1, "serving": 4, "training": 4}
OBJECT_STORE_BYTES = 80 * 2**20  # of each node
IDLE_MINUTES = 0.1


class Cluster(AutoscalingCluster):
    """Ray's own, but for the file from which it makes its config, which Ray's packages leave out."""

    def _generate_config(
        self, head_resources: dict[str, Any], worker_node_types: dict[str, Any], autoscaler_v2: bool = False, **_: Any
    ) -> dict[str, Any]:
        assert autoscaler_v2, "as `ray up` has it"
        document: dict[str, Any] = yaml.safe_load(AWS.read_text())
        head = {"resources": dict(head_resources), "node_config": {}, "max_workers": 0}
        provider = {
            "type": "external",  # as its own type has its defaults in that file
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
        }
        return {
            "cluster_name": document["cluster_name"],
            "max_workers": document["max_workers"],
            "upscaling_speed": document["upscaling_speed"],
            "idle_timeout_minutes": IDLE_MINUTES,
            "provider": provider,
            "auth": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            "docker": {},
            **{f"{name}commands": [] for name in ("initialization_", "setup_", "head_setup_", "worker_setup_")},
            **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
            "head_node_type": HEAD,
            "available_node_types": {HEAD: head, **worker_node_types},
        }


def node_types() -> dict[str, Any]:
    """Those of the file but the head's, of a size for this machine: of each that has a minimum, one is there.

    Of the type `cpu` there are no more, as they would be started for jobs without GPUs, which are all that run here.
    """
    kinds: dict[str, Any] = yaml.safe_load(AWS.read_text())["available_node_types"]
    return {
        name: kind
        | {
            "node_config": {},
            "min_workers": min(1, kind["min_workers"]),
            "max_workers": 1 if name == "cpu" else kind["max_workers"],
            "resources": kind["resources"] | {"CPU": CPUS[name], "object_store_memory": OBJECT_STORE_BYTES},
        }
        for name, kind in kinds.items()
        if name != "head"
    }


def nodes_of(host: Host) -> Counter[str]:
    """How many nodes of each type there are on a host, the head aside."""
    found: Counter[str] = Counter()
    for process in host.processes("/raylet/raylet "):
        try:
            found[process.environ().get("RAY_NODE_TYPE_NAME", "")] += process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            continue
    return +Counter({name: count for name, count in found.items() if name in CPUS})


if __name__ == "__main__":
    Cluster({"CPU": 0, "object_store_memory": OBJECT_STORE_BYTES}, node_types(), autoscaler_v2=True).start()
