"""The stack on a Ray that somebody else has started: `serve deploy` does what `scripts/serve` does."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from scripts import local_stack
from tests.running_stack import MODEL, START_S, free_port, prepared_home, processes_of, wait_for

BIN = Path(sys.executable).parent


@pytest.fixture
def ray_of_a_user(tmp_path: Path) -> Iterator[tuple[Path, str, dict[str, str]]]:
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


def test_the_stack_answers_on_a_running_ray(ray_of_a_user: tuple[Path, str, dict[str, str]], tmp_path: Path) -> None:
    home, ray_address, environment = ray_of_a_user
    document = yaml.safe_load(local_stack.CONFIG.read_text())
    document["http_options"]["port"] = free_port()
    file = tmp_path / "stack.yaml"
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
    message = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": MODEL, "messages": [message], "temperature": 0}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
