"""A stack on a Ray of several nodes, all of them on this machine: on PostgreSQL and S3, with two gateways.

Its config is that of tests/running_stack.py, changed as docs/clusters.md says, and deployed by `serve deploy`. Each
node has an address of its own on loopback. The proxies of all nodes listen at one port, among which the kernel spreads
the connections, as a balancer would.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from scripts import local_stack
from stack import config
from tests import postgres, s3
from tests.otlp import receiver
from tests.running_stack import (
    CHANGES,
    GONE_S,
    START_S,
    Stack,
    free_port,
    prepared_home,
    processes_of,
    wait_for,
    with_scripted_models,
    write_config,
)

# Of each node: places to schedule, not cores.
CPUS = 2
GATEWAYS = 2
BIN = Path(sys.executable).parent
# Tests that are right on one node alone, by their ids, and why.
ONE_NODE = {
    "tests/ray/test_readme.py": "the examples are those of a laptop, and put data sets into its folder",
    "tests/ray/test_life_cycle.py::test_a_job_that_cannot_fit_on_the_disk_is_refused": "of artifacts on a disk",
    "tests/ray/test_life_cycle.py::test_a_disk_that_fills_up_fails_the_job_and_leaves_no_half_written_adapter": (
        "of artifacts on a disk"
    ),
    "tests/ray/test_jobs_that_make_data.py::test_the_loop_closes_on_a_few_prompts": (
        "scripts/improve_model.py writes its data sets into a folder of the stack"
    ),
}


@contextmanager
def started(folder: Path, nodes: int) -> Iterator[Stack]:
    """A stack on so many nodes for this block, in a folder of its own."""
    with ExitStack() as held:
        traces = held.enter_context(receiver())
        storage = held.enter_context(s3.server())
        server = held.enter_context(postgres.server())
        database = held.enter_context(server.database())
        held.enter_context(environment(s3.variables(storage.address)))
        stack = Stack(prepared_home(folder), free_port(), traces.address, storage=storage.bucket(), database=database)
        (stack.home / "data").mkdir()
        file = write_serve_file(stack)
        stack.ray_address = held.enter_context(cluster(stack.home, nodes, STACK_CONFIG=str(file)))
        local_stack.deploy(yaml.safe_load(file.read_text()), stack.ray_address, lambda: False)
        wait_for(lambda: not what_is_missing(stack), START_S, lambda: what_is_missing(stack))
        yield stack


@contextmanager
def cluster(home: Path, nodes: int, **variables: str) -> Iterator[str]:
    """A Ray of so many nodes whose processes have these variables. Gives the address of its dashboard."""
    environment_of_nodes = {
        "STACK_HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(home),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    with environment(environment_of_nodes | variables):
        subprocess.run([BIN / "ray", "get-auth-token", "--generate"], check=True, stdout=subprocess.DEVNULL)
        from ray._raylet import Config
        from ray.cluster_utils import Cluster

        Config.initialize("")  # where Ray was imported before, it has not seen that it asks for a token
        ray = Cluster()
        dashboard = free_port()
        head: dict[str, Any] = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": dashboard}
        try:
            for number in range(1, nodes + 1):
                # Not 127.0.0.1: Ray takes that for the address of the node that reads it.
                address, port = f"127.0.1.{number}", free_port()
                given: dict[str, Any] = {
                    "node_ip_address": address,
                    "num_cpus": CPUS,
                    "dashboard_agent_listen_port": port,
                }
                ray.add_node(**(given | head if number == 1 else given))
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            ray.shutdown()  # type: ignore[no-untyped-call]
            wait_for(lambda: not processes_of(home), GONE_S, lambda: processes_of(home))


def what_is_missing(stack: Stack) -> str:
    return local_stack.what_is_missing(stack.url, just_deployed=True)


def write_serve_file(stack: Stack) -> Path:
    """The config of the stack, in its home."""
    places = {name: stack.place(name) for name in ("artifacts", "data", "memory_banks")}
    changes = CHANGES | {
        # Its nodes are at loopback, whatever other addresses this machine has.
        "firewalled": True,
        "otlp_address": stack.traces,
        "store": stack.database,
        "artifacts": places["artifacts"],
        "data_roots": [places["data"]],
        "memory_banks": CHANGES["memory_banks"] | {"folder": places["memory_banks"]},
    }
    file = with_scripted_models(write_config(stack.home / "serve.yaml", **changes))
    document = yaml.safe_load(file.read_text())
    document["proxy_location"] = "EveryNode"
    document["http_options"] = {"host": "127.0.0.1", "port": stack.port}
    (gateway,) = (one for one in document["applications"] if one["name"] == config.GATEWAY)
    gateway["deployments"] = [{"name": "Gateway", "num_replicas": GATEWAYS, "max_replicas_per_node": 1}]
    file.write_text(yaml.safe_dump(document))
    return file


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Has these variables in the environment of this process, and of those that it starts, for this block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
