"""One stack for all tests of this folder: `scripts/serve` as a child, on a port and in a home folder of its own."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts import local_stack
from stack import config

MODEL = "SmolLM2-135M-Instruct"
START_S = 400


@dataclass(frozen=True)
class Stack:
    """A running stack."""

    url: str
    ray_address: str
    home: Path
    log: Path
    process: subprocess.Popen[bytes]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of this environment as a user of this stack would."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        ray = {"RAY_API_SERVER_ADDRESS": self.ray_address, "RAY_AUTH_MODE": "token"}
        given = os.environ | ray | {"STACK_HOME": str(self.home), "PATH": path}
        return subprocess.run(
            command,
            env=given | environment,
            cwd=local_stack.ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    reporter.write_line("starting a stack for the tests (one to three minutes)")
    home = prepared_home(tmp_path_factory.mktemp("stack"))
    port = free_port()
    log = home / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "scripts.serve", "--port", str(port), "--stop-with-stdin"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"STACK_HOME": str(home)},
            cwd=local_stack.ROOT,
        )
    try:
        wait_for(lambda: "ready after" in log.read_text() or process.poll() is not None, START_S, log.read_text)
        assert process.poll() is None, log.read_text()
        ray_address = next(line.split()[1] for line in log.read_text().splitlines() if line.startswith("  Ray"))
        yield Stack(f"http://127.0.0.1:{port}", ray_address, home, log, process)
    finally:
        # Whatever ends a stack, nothing of it is left: not Ray, not its workers, not the engines' own processes.
        process.kill()
        process.wait(timeout=60)
        assert process.stdin is not None
        process.stdin.close()
        # Ray's agents of a node notice after a minute or so that it is gone.
        wait_for(lambda: not processes_of(home), 180, lambda: processes_of(home))


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client() as client:
        yield client


def prepared_home(folder: Path) -> Path:
    """A new home folder with the model and the data that are prepared already."""
    home = folder / "home"
    home.mkdir()
    prepared = config.home()
    if not (prepared / "models" / MODEL / "config.json").is_file():
        pytest.fail(f"the model is not in {prepared}: run scripts/setup")
    for name in ("models", "packaged-data"):
        (home / name).symlink_to(prepared / name)
    return home


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def processes_of(home: Path) -> list[str]:
    """The command lines of all processes whose STACK_HOME is this folder."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if f"STACK_HOME={home}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # it has ended, or is another user's
                continue
    return [command for command in found if command]


def wait_for(condition: Callable[[], Any], seconds: float, explain: Callable[[], Any] = lambda: "") -> Any:
    """Polls until a condition holds, and fails with an explanation when it does not in time."""
    deadline = time.monotonic() + seconds
    between = threading.Event()
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s: {explain()}")
        between.wait(0.25)
    return value


def ended(client: httpx.Client, api: str, job_uuid: str, seconds: float = 300) -> dict[str, Any]:
    """The status of a job once it has ended."""

    def look() -> dict[str, Any] | None:
        reply = client.get(f"/{api}/job/status", params={"job_uuid": job_uuid})
        assert reply.status_code == 200, reply.text
        status: dict[str, Any] = reply.json()
        return status if status["status"] in ("completed", "failed") else None

    result: dict[str, Any] = wait_for(look, seconds, lambda: client.get(f"/{api}/job/status?job_uuid={job_uuid}").text)
    return result
