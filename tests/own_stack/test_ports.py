"""A stack of one machine that listens to others: of all its ports and Ray's, they reach the gateway's alone."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from scripts import local_stack
from stack import config
from tests.hosts import Host, Network, network
from tests.ports import listening, reached
from tests.running_stack import MODEL, START_S, prepared_home, wait_for, write_config

PORT = 8321
QUESTION = {"role": "user", "content": "What is the capital of France?"}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Network]:
    with network(tmp_path / "hosts", "10.78.0") as net:
        yield net


def test_others_reach_the_gateway_and_nothing_else(hosts: Network, tmp_path: Path) -> None:
    host, other = hosts.host("stack", 10, keeps=[config.home()]), hosts.host("other", 11)
    home = prepared_home(tmp_path)
    file = write_config(tmp_path / "stack.yaml")
    document = yaml.safe_load(file.read_text())
    document["http_options"] = {"host": "0.0.0.0", "port": PORT}
    file.write_text(yaml.safe_dump(document))
    environment = {"STACK_HOME": str(home), "STACK_CONFIG": str(file)}
    create = (sys.executable, "-m", "stack", "keys", "create", "--name", "a test", "--scopes", "inference")
    made = host.run("env", "-C", str(local_stack.ROOT), *create, environment=environment)
    assert made.returncode == 0, made.stderr
    with serving(host, file, environment):
        body = {"model": MODEL, "messages": [QUESTION], "temperature": 0, "max_tokens": 16}
        headers = {"authorization": f"Bearer {made.stdout.strip()}"}
        asked = httpx.post(f"http://{host.address}:{PORT}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert asked.status_code == 200, asked.text
        assert len(listening(host)) > 10, "Ray's ports are there"
        assert list(reached(other, host)) == [PORT], reached(other, host)


@contextmanager
def serving(host: Host, file: Path, environment: dict[str, str]) -> Iterator[None]:
    """scripts/serve on a host, for this block."""
    log = file.with_suffix(".log")
    command = ["env", "-C", str(local_stack.ROOT), sys.executable, "-m", "scripts.serve", "--config", str(file)]
    with log.open("wb") as output:
        served = host.start(*command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment)
    try:
        wait_for(lambda: "ready after" in log.read_text() or served.poll() is not None, START_S, log.read_text)
        assert served.poll() is None, log.read_text()
        yield
    finally:
        host.lose_power()
        served.wait()
