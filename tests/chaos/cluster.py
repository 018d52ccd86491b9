"""A stack on a cluster of hosts (tests/hosts.py): Ray as clusters/local.yaml starts it, served like cluster.yaml.

A head without CPUs, with Redis; workers; PostgreSQL and object storage on this machine, which does not fail. The
language model is scripted, the embedding model a real one.
"""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import s3fs
import yaml

from scripts import local_stack
from stack import config
from tests import hosts, postgres
from tests.running_stack import wait_for

ROOT = local_stack.ROOT
LOCAL = yaml.safe_load((ROOT / "clusters" / "local.yaml").read_text())
PORT = 8321
DASHBOARD = "http://127.0.0.1:8265"  # of the head itself
HEAD = 10  # what its address ends with; those of the workers follow
LANGUAGE_MODEL = "scripted"
EMBEDDING_MODEL = "all-MiniLM-L6-v2"
TOKENIZER = "SmolLM2-135M-Instruct"
OBJECT_STORE_BYTES = 150 * 2**20
# How long Ray's autoscaler, which starts workers again, takes to give one up (AUTOSCALER_HEARTBEAT_TIMEOUT_S).
AWAY_S = 30.0
REQUEST_S = 60.0  # what an answer of a model may take
START_S = 600.0
TRIES = 5
SCOPES = "inference,data,training,agents,admin"
STORAGE = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class Cluster:
    """Hosts by their names, `head` and `worker-1` and so on, and what runs on them."""

    def __init__(self, folder: Path, network: hosts.Network, store: str, storage: str, bucket: str) -> None:
        self.folder = folder
        self.storage = STORAGE | {"AWS_ENDPOINT_URL_S3": storage}
        self.bucket = bucket
        self.hosts: dict[str, hosts.Host] = {}
        self.key = ""
        self.home = folder / "home"
        self._network = network
        self._secrets = {"auth_token": uuid.uuid4().hex * 2, "redis_password": uuid.uuid4().hex}
        self._prepare_home()
        self.document = _document(store, bucket)
        self.file = folder / "serve.yaml"
        self._write()

    @property
    def workers(self) -> list[hosts.Host]:
        return [host for name, host in self.hosts.items() if name != "head"]

    def url(self, host: hosts.Host) -> str:
        """The address of the gateway at a host."""
        return f"http://{host.address}:{PORT}"

    @property
    def urls(self) -> list[str]:
        return [self.url(host) for host in self.workers]

    def start(self, workers: int) -> None:
        """Starts all of it, and returns when all of it is ready."""
        self.switch_on("head", HEAD)
        for number in range(1, workers + 1):
            self.switch_on(f"worker-{number}", HEAD + number)
        made = self.run(
            "head", f"{sys.executable} -m stack keys create --tenant chaos --name load --scopes {SCOPES} --json"
        )
        self.key = json.loads(made)["key"]
        self.deploy()
        last: dict[str, Any] = {}
        wait_for(lambda: self.is_whole(last), START_S, lambda: last)

    def switch_on(self, name: str, number: int | None = None) -> None:
        """Starts a host, one that has lost its power among them, and Ray on it."""
        number = number or int(self.hosts[name].address.rpartition(".")[2])
        folder = self.folder / name
        self._write_files(folder / "root")
        self.hosts[name] = self._network.host(name, number)
        self.start_ray(name)

    def start_ray(self, name: str) -> None:
        """Runs on a host what `ray up` runs there, again where Ray has not started within its own 30 s."""
        for tries_left in reversed(range(TRIES)):
            try:
                for command in self._commands("head" if name == "head" else "worker"):
                    self.run(name, command)
                return
            except RuntimeError:
                if not tries_left:
                    raise

    def start_anew(self, name: str) -> None:
        """The same where Ray still runs."""
        self.run(name, "ray stop --grace-period 30")
        self.start_ray(name)

    def _commands(self, kind: str) -> Iterator[str]:
        for command in LOCAL[f"{kind}_start_ray_commands"]:
            given = command.replace(LOCAL["provider"]["head_ip"], f"{self._prefix}.{HEAD}")
            given = given.replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "").strip()
            yield f"{given} --object-store-memory={OBJECT_STORE_BYTES}" if "ray start" in given else given

    def run(self, name: str, command: str) -> str:
        """What a command says, which must succeed, on a host, in the environment of Ray's processes."""
        script = f". ~/llama-stack-ray/clusters/environment.sh; export RAY_HEAD_IP={self._prefix}.{HEAD}; {command}"
        done = self.hosts[name].run("bash", "-c", script)
        if done.returncode:
            raise RuntimeError(
                f"{name}: {command!r} ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
            )
        return done.stdout

    def client(self, url: str) -> httpx.Client:
        """A client of a gateway, with a key."""
        return httpx.Client(base_url=url, headers={"authorization": f"Bearer {self.key}"}, timeout=120)

    def deploy(self) -> None:
        """Has Serve serve what the document says now."""
        self._write()
        self.run("head", f"serve deploy {self.file} --address {DASHBOARD}")

    def is_deployed(self) -> bool:
        """Whether Serve runs all that it was told last."""
        status = yaml.safe_load(self.run("head", f"serve status --address {DASHBOARD}"))
        found = [one["status"] for one in status["applications"].values()]
        found += [one["status"] for app in status["applications"].values() for one in app["deployments"].values()]
        return set(found) <= {"RUNNING", "HEALTHY"}

    def kill(self, host: hosts.Host, part: str) -> int:
        """kill -9 of a host's processes whose command line has this part. Returns how many there were."""
        found = host.processes(part)
        for process in found:
            process.kill()
        psutil.wait_procs(found, timeout=30)
        return len(found)

    def is_whole(self, last: dict[str, Any]) -> bool:
        """Whether all gateways that answer say that all is ready, and two do; what they say is put into `last`."""
        for url in self.urls:
            try:
                reply = httpx.get(f"{url}/health", timeout=5)
                last[url] = reply.text
            except httpx.TransportError:  # a worker that serves nothing has no proxy
                last[url] = ""
        answers = [text for text in last.values() if text]
        return len(answers) >= 2 and all('"status":"ready"' in text for text in answers)

    @property
    def _prefix(self) -> str:
        return self._network.address.rpartition(".")[0]

    def _write(self) -> None:
        self.file.write_text(yaml.safe_dump(self.document))

    def _prepare_home(self) -> None:
        """STACK_HOME, which all hosts see: /root, where it may lie on this machine, they do not."""
        models = self.home / "models"
        for name, without in ((EMBEDDING_MODEL, ()), (TOKENIZER, ("*.safetensors",))):
            shutil.copytree(config.home() / "models" / name, models / name, ignore=shutil.ignore_patterns(*without))

    def _write_files(self, root: Path) -> None:
        """The home folder of a host's user: the code, and secrets."""
        clusters, secrets = root / "llama-stack-ray" / "clusters", root / "secrets"
        for folder in (clusters, secrets):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "clusters" / "is_up.py", clusters)
        for name, text in self._secrets.items():
            (secrets / name).write_text(text)
            (secrets / name).chmod(0o600)
        ours = self.storage | {
            "STACK_HOME": str(self.home),
            "STACK_CONFIG": str(self.file),
            "PYTHONPATH": str(ROOT),
            # Ray's workers would give way to whatever else runs on this one machine, its own load generator too.
            "RAY_worker_niceness": "0",
            "PATH": f"{Path(sys.executable).parent}:$PATH",
        }
        lines = [f". {ROOT}/clusters/environment.sh", "unset PGPASSFILE AWS_SHARED_CREDENTIALS_FILE"]
        lines += [f'export {name}="{value}"' for name, value in ours.items()]
        (clusters / "environment.sh").write_text("\n".join(lines) + "\n")


def _document(store: str, bucket: str) -> dict[str, Any]:
    """serve_apps/cluster.yaml with small models."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "serve_apps" / "cluster.yaml").read_text())
    gateway = document["applications"][0]
    small = {
        "id": LANGUAGE_MODEL, "path": f"models/{TOKENIZER}", "min_replicas": 2, "max_replicas": 2, "adapters": 0,
        "target_ongoing_requests": 64, "request_timeout_s": REQUEST_S,
        "cpus": 1.2,  # of two: one replica on a worker, as one that fills the GPUs of its node
    }  # fmt: skip
    embedding = {
        "id": EMBEDDING_MODEL, "path": f"models/{EMBEDDING_MODEL}", "dimensions": 384, "cpus": 0.5, "min_replicas": 2,
        "max_replicas": 2, "request_timeout_s": REQUEST_S,
    }  # fmt: skip
    gateway["args"] = {
        "store": store,
        "artifacts": f"{bucket}/artifacts",
        "data_roots": [f"{bucket}/data"],
        "memory_banks": {"folder": f"{bucket}/memory_banks"},
        "max_running_jobs": 1,
        "agents": {"warm": 2},
        "models": [small],
        "embedding_models": [embedding],
    }
    document["applications"] = [
        gateway,
        {
            "name": LANGUAGE_MODEL,
            "import_path": local_stack.SCRIPTED_IMPORT_PATH,
            "route_prefix": None,
            "args": {"model": small, "artifacts": f"{bucket}/artifacts"},
        },
        {
            "name": EMBEDDING_MODEL,
            "import_path": local_stack.EMBEDDINGS_IMPORT_PATH,
            "route_prefix": None,
            "args": {"model": embedding},
        },
    ]
    return document


@contextmanager
def object_storage(address: str, log: Path) -> Iterator[str]:
    """The address of a server that speaks S3, a process of its own, for this block."""
    with log.open("wb") as output:
        # As one that has a machine of its own, which is not busy with what asks it.
        command = ["nice", "-n", "-10", sys.executable, "-m", "moto.server", "-H", address, "-p", "9000"]
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://{address}:9000"

    def answers() -> bool:
        try:
            return httpx.get(url).status_code < 500
        except httpx.TransportError:
            return False

    try:
        wait_for(answers, 60, log.read_text)
        yield url
    finally:
        server.kill()
        server.wait()


@contextmanager
def cluster(folder: Path, prefix: str, workers: int) -> Iterator[Cluster]:
    """A cluster that serves, for this block. All addresses of its hosts begin with the prefix."""
    with ExitStack() as held:
        store = held.enter_context(held.enter_context(postgres.server()).database())
        network = held.enter_context(hosts.network(folder, prefix))
        storage = held.enter_context(object_storage(network.address, folder / "storage.log"))
        os.environ |= STORAGE | {"AWS_ENDPOINT_URL_S3": storage}
        s3fs.S3FileSystem.clear_instance_cache()
        name = f"bucket-{uuid.uuid4().hex}"
        s3fs.S3FileSystem().mkdir(name)
        made = Cluster(folder, network, store, storage, f"s3://{name}/stack")
        made.start(workers)
        yield made
