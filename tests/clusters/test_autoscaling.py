"""Nodes that come with the load and go with it: the node types of clusters/aws.yaml, on Ray's fake nodes."""

import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from scripts import local_stack
from tests import postgres, s3, samples
from tests.fake_nodes import CPUS, node_types, nodes_of
from tests.hosts import Host, network
from tests.running_stack import ended, wait_for
from tests.tiny_training import save_model

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
NETWORK = "10.79.0"
PORT = 8321
START_S = 300
# Serve looks back over 30 s before it takes a replica away, and then a node must be idle for a while.
GONE_S = 150
TWO_WORKERS = {"n_epochs": 1, "n_iters": 2, "batch_size": 4, "shuffle": True, "workers": 2}
SERVED = {
    "id": "served",
    "path": "models/tiny",
    "cpus": CPUS["serving"],  # all of a node
    "adapters": 0,
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 2,
    "max_ongoing_requests": 8,
    "upscale_delay_s": 1,
    "downscale_delay_s": 1,
    "request_timeout_s": 60,
}
TRAINED = {"id": "trained", "path": "models/tiny", "context": 256, "min_replicas": 0, "max_replicas": 1}


@dataclass
class Cluster:
    """The one on the host, and a client of the stack on it."""

    host: Host
    client: httpx.Client

    def nodes(self) -> dict[str, int]:
        """How many of each type there are, the head aside."""
        return dict(nodes_of(self.host))

    def waits_for(self) -> str:
        return local_stack.what_is_missing(str(self.client.base_url).rstrip("/"), just_deployed=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    home = folder / "home"
    save_model(home / "models" / "tiny")
    with ExitStack() as held:
        hosts = held.enter_context(network(folder / "hosts", NETWORK))
        storage = held.enter_context(s3.server(hosts.address))
        server = held.enter_context(postgres.server())
        database = held.enter_context(server.database())
        environment = s3.variables(storage.address) | {
            "STACK_HOME": str(home),
            "STACK_CONFIG": str(home / "serve.yaml"),
            "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
        }
        write_serve_file(home / "serve.yaml", database, storage.bucket())
        host = hosts.host("head", 2)

        def run(*command: str) -> str:
            done = host.run("env", "-C", str(ROOT), *command, environment=environment)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        run("ray", "get-auth-token", "--generate")
        run("python", "-m", "tests.fake_nodes")
        key = "python -m stack keys create --tenant me --name first --scopes inference,data,training --json"
        made = json.loads(run(*key.split()))
        run("serve", "deploy", str(home / "serve.yaml"), "--address", "http://127.0.0.1:8265")
        headers = {"authorization": f"Bearer {made['key']}"}
        client = held.enter_context(httpx.Client(base_url=f"http://{host.address}:{PORT}", headers=headers, timeout=60))
        started = Cluster(host, client)
        wait_for(lambda: not started.waits_for(), START_S, started.waits_for)
        yield started


def write_serve_file(file: Path, database: str, bucket: str) -> None:
    """That of a cluster: two models on the scripted engine, and one kind of nodes that jobs may have started."""
    training = node_types()["training"]
    args = {
        "store": database,
        "artifacts": f"{bucket}/artifacts",
        "data_roots": [f"{bucket}/data"],
        "memory_banks": {"folder": f"{bucket}/memory_banks"},
        "autoscaled_nodes": [
            {
                "resources": {name: training["resources"][name] for name in ("CPU", "GPU", "accelerator_type:H100")},
                "most": training["max_workers"],
            }
        ],
        "models": [SERVED, TRAINED],
    }
    applications: list[dict[str, Any]] = [
        {"name": "gateway", "import_path": "serve_apps.gateway:build", "route_prefix": "/", "args": args}
    ]
    for model in (SERVED, TRAINED):
        application = {"model": model, "artifacts": args["artifacts"]}
        scripted = {"import_path": local_stack.SCRIPTED_IMPORT_PATH, "route_prefix": None, "args": application}
        applications.append({"name": model["id"]} | scripted)
    document = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": PORT},
        "applications": applications,
    }
    file.write_text(yaml.safe_dump(document))


@contextmanager
def load(cluster: Cluster, streams: int) -> Iterator[None]:
    """So many streams of the served model, one after the other each, until the block ends."""
    over = threading.Event()

    def ask() -> None:
        body = {"model": "served", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100}
        while not over.is_set():
            with cluster.client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as reply:
                assert reply.status_code == 200, reply.read()
                assert "data: [DONE]" in reply.iter_lines()

    with ThreadPoolExecutor(streams) as pool:
        asking = [pool.submit(ask) for _ in range(streams)]
        try:
            yield
        finally:
            over.set()
    for one in asking:
        one.result()


def test_nodes_come_with_a_job_and_with_load_and_go_with_them(cluster: Cluster) -> None:
    assert cluster.nodes() == {"cpu": 1, "serving": 1}, "those that are always there"
    rows = b"".join(json.dumps(row).encode() + b"\n" for row in samples.dialogs(8))
    sent = cluster.client.post("/datasets/upload", files={"file": ("rows.jsonl", rows)}).json()
    data = {"columns": {"dialog": "dialog"}, "content_url": sent["content_url"]}
    request = samples.fine_tuning(data, job_uuid="tune", model="trained", training_config=TWO_WORKERS)
    reply = cluster.client.post("/post_training/supervised_fine_tune", json=request)
    assert reply.status_code == 200, reply.text
    # Two CPUs are free on no nodes: there is one on that of the type `cpu`, and what serves takes those of its own.
    wait_for(lambda: cluster.nodes().get("training"), START_S, cluster.nodes)
    assert cluster.nodes() == {"cpu": 1, "serving": 1, "training": 1}

    with load(cluster, 6):
        wait_for(lambda: cluster.nodes()["serving"] == 2, START_S, cluster.nodes)
        assert cluster.nodes().get("training", 0) <= 1, "what serves is on no spot node"
    status = ended(cluster.client, "post_training", "tune")
    assert status["status"] == "completed", status
    wait_for(lambda: cluster.nodes() == {"cpu": 1, "serving": 1}, GONE_S, cluster.nodes)
