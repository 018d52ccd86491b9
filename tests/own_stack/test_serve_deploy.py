"""The stack on a Ray that somebody else has started, by `serve deploy`: with keys, on PostgreSQL and S3."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from scripts import local_stack
from tests import postgres, samples
from tests.running_stack import MODEL, START_S, ended, free_port, prepared_home, processes_of, wait_for, write_config
from tests.s3 import S3

BIN = Path(sys.executable).parent
QUESTION = {"role": "user", "content": "What is the capital of France?"}


@pytest.fixture
def bucket(s3: S3) -> str:
    """The address of an empty bucket; the processes that are started here find its server in their environment."""
    return s3.bucket()


@pytest.fixture
def database(postgres_server: postgres.Server) -> Iterator[str]:
    with postgres_server.database() as url:
        yield url


@pytest.fixture
def ray_of_a_user(bucket: str, database: str, tmp_path: Path) -> Iterator[tuple[Path, str, dict[str, str]]]:
    """The home folder, the dashboard's address and the environment of a `ray start --head`."""
    home = prepared_home(tmp_path)
    environment = os.environ | {
        "STACK_HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    dashboard = free_port()
    command = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--num-cpus", "4"]
    command += [
        "--port",
        str(free_port()),
        "--dashboard-port",
        str(dashboard),
        "--ray-client-server-port",
        str(free_port()),
    ]
    command += ["--dashboard-agent-listen-port", str(free_port()), "--object-store-memory", str(256 * 2**20)]
    log = tmp_path / "ray.log"
    with log.open("wb") as output:
        ray = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{dashboard}"
    wait_for(lambda: answers(url) or ray.poll() is not None, 60, log.read_text)
    assert ray.poll() is None, log.read_text()
    yield home, url, environment
    ray.terminate()
    ray.wait(timeout=60)
    wait_for(lambda: not processes_of(home), 60, lambda: processes_of(home))


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/api/version").status_code < 500
    except httpx.TransportError:
        return False


def test_tenants_use_a_stack_on_a_running_ray(
    ray_of_a_user: tuple[Path, str, dict[str, str]], tmp_path: Path, bucket: str, database: str
) -> None:
    home, ray_address, environment = ray_of_a_user
    file = write_config(tmp_path / "stack.yaml", artifacts=bucket, store=database)
    document = yaml.safe_load(file.read_text())
    document["http_options"]["port"] = free_port()
    file.write_text(yaml.safe_dump(document))
    command = [str(BIN / "serve"), "deploy", str(file), "--address", ray_address]
    deployed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    url = f"http://127.0.0.1:{document['http_options']['port']}"
    last = {}

    def ready() -> bool:
        try:
            last["health"] = httpx.get(f"{url}/health", timeout=10).text
        except httpx.TransportError as error:
            last["health"] = repr(error)
        return '"status":"ready"' in last["health"]

    wait_for(ready, START_S, lambda: last)
    assert httpx.get(f"{url}/health").json()["home"] == str(home)
    # As long as there are no keys, whoever reaches loopback is the user of this machine.
    with httpx.Client(base_url=url, timeout=60) as anybody:
        assert answer(anybody, MODEL) == "The capital of France is Paris."

    def client_of(tenant: str) -> httpx.Client:
        """A client with a new key of a tenant."""
        command = [sys.executable, "-m", "stack", "keys", "create", "--tenant", tenant, "--name", "a test"]
        command += ["--scopes", "inference,data,training", "--json"]
        given = environment | {"STACK_CONFIG": str(file)}
        made = subprocess.run(command, env=given, cwd=local_stack.ROOT, capture_output=True, text=True, check=True)
        headers = {"authorization": f"Bearer {json.loads(made.stdout)['key']}"}
        return httpx.Client(base_url=url, timeout=60, headers=headers)

    with client_of("acme") as acme, client_of("other") as other:
        wait_for(lambda: httpx.get(f"{url}/v1/models").status_code == 401, 30)
        rows = "".join(json.dumps(row) + "\n" for row in samples.dialogs(8))
        sent = acme.post("/datasets/upload", files={"file": ("rows.jsonl", rows.encode())})
        assert sent.status_code == 200, sent.text
        data = {"columns": {"dialog": "dialog"}, "content_url": sent.json()["content_url"]}
        request = samples.fine_tuning(data, job_uuid="tune", model=MODEL)
        assert acme.post("/post_training/supervised_fine_tune", json=request).status_code == 200
        status = ended(acme, "post_training", "tune")
        assert status["status"] == "completed", status
        (checkpoint,) = status["checkpoints"]
        assert checkpoint["path"].startswith(bucket)
        # The adapter comes from S3 into the model's replica.
        assert checkpoint["model"] == f"{MODEL}:acme/tune"
        assert answer(acme, checkpoint["model"])
        (artifact,) = artifacts_of(acme)
        (weights,) = [file for file in checkpoint["files"] if file["name"] == "adapter_model.safetensors"]
        address = {"artifact_id": artifact["id"], "file": weights["name"]}
        content = acme.get("/artifacts/content", params=address).content
        assert hashlib.sha256(content).hexdigest() == weights["sha256"]
        # Another tenant finds nothing of it.
        assert other.get("/post_training/job/status", params={"job_uuid": "tune"}).status_code == 404
        assert other.get("/artifacts/content", params=address).status_code == 404
        assert other.get("/post_training/jobs").json() == []
        question = {"model": checkpoint["model"], "messages": [QUESTION]}
        assert other.post("/v1/chat/completions", json=question).status_code == 404


def answer(client: httpx.Client, model: str) -> str:
    body = {"model": model, "messages": [QUESTION], "temperature": 0, "max_tokens": 16}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


def artifacts_of(client: httpx.Client) -> list[dict[str, Any]]:
    """The artifacts of a tenant's only experiment."""
    (experiment,) = client.get("/experiments/list").json()
    listed: list[dict[str, Any]] = client.post(
        "/experiments/artifacts/get", json={"experiment_id": experiment["id"]}
    ).json()
    return listed
