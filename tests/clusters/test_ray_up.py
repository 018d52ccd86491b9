"""clusters/local.yaml on hosts that are reached by SSH: what docs/clusters.md has its user do, from first to last."""

import configparser
import json
import re
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import psycopg
import pytest
import yaml
from moto.server import ThreadedMotoServer

from stack.config import GATEWAY, ROOT
from tests import postgres
from tests.clusters import ssh_hosts
from tests.hosts import Host, Network, network
from tests.ports import reached
from tests.running_stack import MODEL, command_of, wait_for, write_config

pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]

PREFIX = "10.78.0"
LAPTOP = 5
NUMBERS = {"head": 10, "one": 11, "other": 12}
FILE = "clusters/local.yaml"
SECRETS = Path("/root/.config/llama-stack-ray")
QUESTION = {"role": "user", "content": "What is the capital of France?"}
BUCKET = "stack"
# What the docs have an administrator run once Ray is up.
DEPLOY = """cd ~/llama-stack-ray && . clusters/environment.sh &&
  python -m stack keys create --tenant me --name first --scopes inference,data,training,agents,admin &&
  serve deploy serve_apps/cluster.yaml"""

STOP = "~/llama-stack-ray/clusters/stop.sh"
# What Ray's autoscaler knows of the hosts, which the head keeps in its /tmp.
STATE = "cluster-llama-stack.state"
# Of a start of the head, as Ray gives itself 30 s for it.
TRIES = 3


@dataclass
class Cluster:
    """Hosts on which a stack is started by the administrator's laptop, from a checkout of the code."""

    laptop: Host
    outsider: Host
    head: Host
    workers: list[Host]
    checkout: Path
    switch_on: Callable[[str], Host]
    key: str = ""

    @property
    def hosts(self) -> list[Host]:
        return [self.head, *self.workers]

    def ray(self, *arguments: str, seconds: float = 1800) -> str:
        """Runs a command of Ray's on the laptop, in the checkout. Returns what it said."""
        where = ["env", "-C", str(self.checkout), f"PATH={ROOT}/.venv/bin:/usr/bin:/bin:/usr/sbin"]
        done = self.laptop.run(*where, "ray", *arguments, seconds=seconds)
        said = done.stdout + done.stderr
        print(said)  # for whoever reads why a test has failed
        assert done.returncode == 0, said
        return said

    def up_again(self) -> None:
        """`ray up` on a cluster that runs, again where Ray has not started within its own 30 s, as the docs say."""
        for tries_left in reversed(range(TRIES)):
            try:
                self.ray("up", "-y", FILE)
                return
            except AssertionError:
                if not tries_left:
                    raise

    def start_head(self) -> None:
        """Does on the head what clusters/head.service has systemd do when the host is switched on."""
        unit = configparser.ConfigParser(interpolation=None, strict=False)
        unit.read(ROOT / "clusters" / "head.service")
        user = unit["Service"]["User"]
        command = shlex.split(unit["Service"]["ExecStart"])
        clean = ["env", "-i", f"HOME=/home/{user}", f"USER={user}", "PATH=/usr/bin:/bin:/usr/sbin:/sbin"]
        condition = self.head.run("test", "-e", unit["Unit"]["ConditionPathExists"])
        assert condition.returncode == 0, "systemd would not start it"
        assert unit["Service"]["Restart"] == "on-failure"
        for _ in range(TRIES):
            done = self.head.run(*clean, "runuser", "-u", user, "--", *command)
            print(done.stdout + done.stderr)  # for whoever reads why a test has failed
            if done.returncode == 0:
                return
        pytest.fail(done.stdout + done.stderr)

    def tags(self) -> dict[str, str]:
        """What the head's autoscaler has last said of each worker."""
        try:
            known = json.loads((self.head.folder / "ray" / STATE).read_text())
        except (FileNotFoundError, json.JSONDecodeError):  # not yet, or as it is written
            return {}
        return {
            host.name: known[host.address]["tags"].get("ray-node-status", known[host.address]["state"])
            for host in self.workers
        }

    def nodes(self) -> dict[str, tuple[int, float]]:
        """Ray's own process on each worker, and when it was started."""
        found = {}
        for host in self.workers:
            for process in host.processes("/raylet/raylet "):
                found[host.name] = (process.pid, process.create_time())
        return found

    @contextmanager
    def asked_all_the_while(self) -> Iterator[list[str]]:
        """Has each worker's gateway answer one question after the other, until the block ends. Gives the answers."""
        over, answers = threading.Event(), list[str]()

        def ask(host: Host) -> None:
            while not over.is_set():
                answers.append(self.ask(host))

        with ThreadPoolExecutor(len(self.workers)) as pool:
            asking = [pool.submit(ask, host) for host in self.workers]
            try:
                yield answers
            finally:
                over.set()
        for one in asking:
            one.result()

    def ask(self, host: Host) -> str:
        """The answer of a host's gateway to the question."""
        body = {"model": MODEL, "messages": [QUESTION], "temperature": 0, "max_tokens": 16}
        headers = {"authorization": f"Bearer {self.key}"}
        reply = httpx.post(f"http://{host.address}:8321/v1/chat/completions", json=body, headers=headers, timeout=120)
        assert reply.status_code == 200, reply.text
        answer: str = reply.json()["choices"][0]["message"]["content"]
        return answer


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A stack on a head and two workers, which was started as the docs say; all ends with the hosts."""
    folder = tmp_path_factory.mktemp("cluster")
    with network(folder, PREFIX) as net, database(net) as password, storage(net) as s3, ExitStack() as held:
        shared = ssh_hosts.shared_folder(folder / "shared")
        checkout = checkout_of(folder / "home" / "llama-stack-ray", net, s3)
        venv = ssh_hosts.environment(checkout, shared)
        laptop, outsider = net.host("laptop", LAPTOP), net.host("outsider", 200)
        public_key = ssh_hosts.key_pair(laptop.folder / "root" / ".ssh" / "id_ed25519")

        def switch_on(name: str) -> Host:
            host = net.host(name, NUMBERS[name], keeps=[venv])
            ssh_hosts.prepare(host, shared, venv, public_key, held)
            loaded = host.run("nft", "--file", str(checkout / "clusters" / "firewall.nft"))
            assert loaded.returncode == 0, loaded.stderr
            return host

        head, *workers = map(switch_on, NUMBERS)
        write_secrets(laptop, net, password)
        cluster = Cluster(laptop, outsider, head, workers, checkout, switch_on)
        cluster.ray("up", "-y", FILE)
        said = cluster.ray("exec", FILE, DEPLOY)
        (cluster.key,) = re.findall(r"lsr_\S+", said)
        for host in cluster.workers:
            wait_for(lambda host=host: ready(host), 1200, lambda host=host: health(host))
        yield cluster


def test_each_gateway_answers(cluster: Cluster) -> None:
    for host in cluster.workers:
        assert cluster.ask(host) == "The capital of France is Paris."


def test_others_reach_the_gateways_alone(cluster: Cluster) -> None:
    for host in cluster.hosts:
        assert list(reached(cluster.outsider, host)) == [8321]
        assert set(reached(cluster.laptop, host)) == {22, 8321}
    assert all(map(cluster.ask, cluster.workers)), "the cluster works meanwhile"
    # Among themselves they reach Ray, and the same probe finds it.
    assert {6379, 6380, 8321} <= set(reached(cluster.workers[0], cluster.head))
    assert {6380, 6381, 8321} <= set(reached(cluster.head, cluster.workers[0]))


def test_a_head_that_was_off_goes_on_with_the_workers_as_they_are(cluster: Cluster) -> None:
    """It has lost what is in /tmp, as at every start of the host: its autoscaler knows of no node then."""
    before = cluster.nodes()
    assert len(before) == len(cluster.workers)
    with cluster.asked_all_the_while() as answers:
        cluster.head.lose_power()
        cluster.head = cluster.switch_on("head")
        assert not (cluster.head.folder / "ray" / STATE).exists()
        cluster.start_head()
        wait_for(lambda: set(cluster.tags().values()) == {"up-to-date"}, 600, cluster.tags)
        asked = len(answers)
        wait_for(lambda: len(answers) > asked + len(cluster.workers), 120, lambda: len(answers))
    assert cluster.nodes() == before, "Ray was not started anew on them"
    assert set(answers) == {"The capital of France is Paris."}
    said = cluster.ray("exec", FILE, "ray status")
    active = re.findall(r"^ (\d+) \S+", said.partition("Active:")[2].partition("Idle:")[0], re.M)
    assert sum(map(int, active)) == len(cluster.hosts), said
    assert "(no pending nodes)" in said


def test_ray_up_with_other_code_has_it_run_on_the_workers(cluster: Cluster) -> None:
    before = cluster.nodes()
    with (cluster.checkout / "stack" / "__init__.py").open("a") as code:
        code.write("# as it is tomorrow\n")
    cluster.up_again()
    wait_for(lambda: all(other(cluster.nodes().get(name), node) for name, node in before.items()), 600, cluster.tags)
    for host in cluster.workers:
        wait_for(lambda host=host: ready(host), 600, lambda host=host: health(host))
        assert cluster.ask(host) == "The capital of France is Paris."


def test_after_ray_down_nothing_of_ray_is_on_any_host(cluster: Cluster) -> None:
    cluster.ray("exec", FILE, STOP)
    cluster.ray("down", "-y", FILE)
    for host in cluster.hosts:
        wait_for(lambda host=host: not of_ray(host), 60, lambda host=host: of_ray(host))


def other(now: tuple[int, float] | None, before: tuple[int, float]) -> bool:
    return now is not None and now != before


def of_ray(host: Host) -> list[str]:
    """The command lines of the processes of Ray, and of what it has started, on a host."""
    return [line for line in map(command_of, host.processes()) if re.search(r"/\.venv/|ray::|VLLM", line)]


def health(host: Host) -> str:
    try:
        return httpx.get(f"http://{host.address}:8321/health", timeout=10).text
    except httpx.TransportError as error:
        return repr(error)


def ready(host: Host) -> bool:
    return '"status":"ready"' in health(host)


@contextmanager
def database(net: Network) -> Iterator[str]:
    """A database `stack` at the network's address, for a user `stack`. Gives the password."""
    password = "of-the-database"
    with postgres.private(net.address) as server:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute(f"CREATE ROLE stack LOGIN PASSWORD '{password}'")
            connection.execute("CREATE DATABASE stack OWNER stack")
        yield password


@contextmanager
def storage(net: Network) -> Iterator[str]:
    """An object storage at the network's address that speaks S3, with a bucket. Gives its address."""
    server = ThreadedMotoServer(net.address, 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-west-2"}
        client = boto3.client("s3", endpoint_url=address, **keys)
        client.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": "us-west-2"})
        yield address
    finally:
        server.stop()


def checkout_of(folder: Path, net: Network, s3: str) -> Path:
    """The code as a user has it, with the changes that the docs ask for: addresses, and what is served."""
    document = yaml.safe_load((ROOT / FILE).read_text())
    for there in (one for one in document["file_mounts"].values() if not one.startswith("~")):
        copy_of(ROOT / there, folder / there)
    for name in (FILE, "clusters/firewall.nft"):
        text = (folder / name).read_text().replace("10.0.0.0/24", f"{PREFIX}.{LAPTOP}").replace("10.0.0.", f"{PREFIX}.")
        (folder / name).write_text(text)
    environment = folder / "clusters" / "environment.sh"
    example = "# export AWS_ENDPOINT_URL=https://s3.example.com"
    assert example in environment.read_text()
    environment.write_text(environment.read_text().replace(example, f"export AWS_ENDPOINT_URL={s3}"))
    write_serve_file(folder / "serve_apps" / "cluster.yaml", net)
    return folder


def copy_of(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "--recursive", "--preserve=mode,timestamps", str(source), str(target)], check=True)


def write_serve_file(file: Path, net: Network) -> None:
    """What serve_apps/local.yaml serves, served as in serve_apps/cluster.yaml."""
    given: dict[str, Any] = yaml.safe_load(file.read_text())
    write_config(
        file,
        store=f"postgresql://stack@{net.address}/stack",
        artifacts=f"s3://{BUCKET}/artifacts",
        data_roots=[f"s3://{BUCKET}/data"],
        memory_banks={"folder": f"s3://{BUCKET}/memory_banks"},
    )
    document = yaml.safe_load(file.read_text())
    document |= {key: given[key] for key in ("proxy_location", "http_options")}
    for application in document["applications"]:
        if application["name"] == GATEWAY:
            (application["deployments"],) = (
                one["deployments"] for one in given["applications"] if one["name"] == GATEWAY
            )
    file.write_text(yaml.safe_dump(document))


def write_secrets(laptop: Host, net: Network, password: str) -> None:
    """Those that the docs have a user make, in the home of the laptop's."""
    folder = laptop.folder / "root" / SECRETS.relative_to("/root")
    folder.mkdir(parents=True, mode=0o700)
    for name, text in {
        "auth_token": "a1" * 32,
        "redis_password": "b2" * 32,
        "pgpass": f"{net.address}:5432:stack:stack:{password}\n",
        "aws_credentials": "[default]\naws_access_key_id = test\naws_secret_access_key = test\n",
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
