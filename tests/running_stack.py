"""One stack for all tests that need one: `scripts/serve` as a child, on a port and in a home folder of its own.

Where tests/shared_stack.py has started one already, the tests of all its processes ask that one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import httpx
import psutil
import pytest
import yaml

from scripts import local_stack
from stack import config
from tests.otlp import Span, receiver, spans_at

MODEL = "SmolLM2-135M-Instruct"
SCRIPTED = "scripted"
SCRIPTED_MODEL = {
    "id": SCRIPTED,
    "path": f"models/{MODEL}",
    "min_replicas": 0,
    "max_replicas": 1,
    "target_ongoing_requests": 2,
    "max_ongoing_requests": 2,
    "max_queued_requests": 2,
    "request_timeout_s": 8,
    "adapters": 0,
    "cpus": 0.1,
}
GUARDED = "guarded"
GUARD = {"id": "guard", "type": "llama_guard", "model": MODEL}
JUDGE = {"kind": "judge", "id": "judge", "model": MODEL, "rubric": "How well does the answer fit the question?"}
# What is due in memory banks is done at once, where tests would wait for it, and beside all that they write; actors of
# sessions that have nothing to do end soon, and so do the calls of a model that knows no end.
CHANGES: dict[str, Any] = {"memory_banks": {"maintenance_s": 1}, "agents": {"idle_s": 1, "max_tool_calls": 4}}
START_S = 400
# The environment variable that describes a stack which is there already.
SHARED = "STACK_UNDER_TEST"
# Ray's agents of a node notice after a minute or so that it is gone.
GONE_S = 180


@dataclass
class Stack:
    """A stack that runs, until it is killed, in its home folder, behind its port; its traces go to `traces`.

    One of several nodes (tests/stack_on_nodes.py) has its rows in the PostgreSQL `database`, and under `storage`, a
    prefix of object storage, what one of one node has in its home.
    """

    home: Path
    port: int
    traces: str
    ray_address: str = ""
    storage: str = ""
    database: str = ""
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.home / "serve.log"

    def start(self) -> None:
        """Starts it and waits until it answers."""
        file = with_scripted_models(write_config(self.home / "serve.yaml", otlp_address=self.traces, **CHANGES))
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "scripts.serve", "--config", str(file), "--port", str(self.port)),
                    "--stop-with-stdin",
                ],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"STACK_HOME": str(self.home), "WANDB_MODE": "offline", "WANDB_DIR": str(self.home)},
                cwd=local_stack.ROOT,
            )
        wait_for(lambda: "ready after" in self.log.read_text() or self.process.poll() is not None, START_S, self._said)
        assert self.process.poll() is None, self._said()
        self.ray_address = next(line.split()[1] for line in self._said().splitlines() if line.startswith("  Ray"))

    def kill(self) -> None:
        """Kills it, and waits until nothing of it is left: not Ray, not its workers, not the engines' processes."""
        self.process.kill()
        self.process.wait(timeout=60)
        assert self.process.stdin is not None
        self.process.stdin.close()
        wait_for(lambda: not processes_of(self.home), GONE_S, lambda: processes_of(self.home))

    @property
    def spans(self) -> list[Span]:
        """Those of its traces so far."""
        return spans_at(self.traces)

    def described(self) -> str:
        return json.dumps([str(self.home), self.port, self.traces, self.ray_address, self.storage, self.database])

    @property
    def store_url(self) -> str:
        return self.database or f"sqlite:///{self.home}/stack.db"

    def place(self, name: str) -> str:
        """Where its `artifacts`, `data` or `memory_banks` are: a folder, or a prefix of object storage."""
        return f"{self.storage}/{name}" if self.storage else str(self.home / name)

    def data_at(self, file: Path) -> str:
        """The address by which it reads a file of its home's folder `data`. Object storage gets a copy of it."""
        if not self.storage:
            return file.as_uri()
        address = f"{self.storage}/{file.relative_to(self.home)}"
        with fsspec.open(address, "wb") as copy:
            copy.write(file.read_bytes())
        return address

    def files_at(self, address: str) -> Path:
        """The folder of the files at an address of its own; those in object storage are fetched."""
        if not self.storage:
            return Path(address.removeprefix("file://"))
        assert address.startswith(self.storage)
        folder = self.home / "fetched" / address.removeprefix(f"{self.storage}/")
        files, prefix = fsspec.url_to_fs(address, skip_instance_cache=True)  # which knows of no files that come later
        files.get(prefix, str(folder), recursive=True)
        return folder

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

    def processes(self, part: str) -> list[psutil.Process]:
        """Its processes whose command line has a part."""
        return [process for process in processes_of(self.home) if part in command_of(process)]

    def kill_9(self, part: str) -> None:
        """Kills those, of which there must be some, with no chance to say goodbye."""
        found = self.processes(part)
        assert found, f"no process of the stack is {part!r}"
        for process in found:
            process.send_signal(signal.SIGKILL)
        psutil.wait_procs(found, timeout=60)

    def _said(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if described := os.environ.get(SHARED):
        home, *others = json.loads(described)
        yield Stack(Path(home), *others)
        return
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    reporter.write_line("starting a stack for the tests (one to three minutes)")
    with started(tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@contextmanager
def started(folder: Path) -> Iterator[Stack]:
    """A stack for this block, in a folder of its own."""
    with receiver() as traces:
        stack = Stack(prepared_home(folder), free_port(), traces.address)
        try:
            stack.start()
            yield stack
        finally:
            stack.kill()


def write_config(file: Path, **changes: Any) -> Path:
    """serve_apps/local.yaml with changes of the stack's configuration."""
    document = yaml.safe_load(local_stack.CONFIG.read_text())
    for application in document["applications"]:
        if application["name"] == config.GATEWAY:
            application["args"] |= changes
        elif "artifacts" in changes and "artifacts" in application["args"]:
            application["args"]["artifacts"] = changes["artifacts"]
    file.write_text(yaml.safe_dump(document))
    return file


def with_scripted_models(file: Path) -> Path:
    """Adds to a Serve config file two models of the scripted engine, which have no replica until somebody asks, the
    injection shield before one of them, a judge, and a Llama Guard on a model that is none."""
    document = yaml.safe_load(file.read_text())
    (gateway,) = (one for one in document["applications"] if one["name"] == config.GATEWAY)
    args = gateway["args"]
    args.setdefault("reward_models", []).append(JUDGE)
    args["shields"].append(GUARD)
    args["model_shields"] = {GUARDED: {"input": ["injection_shield"], "output": ["injection_shield"]}}
    for name in (SCRIPTED, GUARDED):
        model = SCRIPTED_MODEL | {"id": name}
        args["models"].append(model)
        document["applications"].append(
            {
                "name": name,
                "import_path": local_stack.SCRIPTED_IMPORT_PATH,
                "route_prefix": None,
                "args": {"model": model, "artifacts": args["artifacts"]},
            }
        )
    file.write_text(yaml.safe_dump(document))
    return file


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


def processes_of(home: Path) -> list[psutil.Process]:
    """All processes whose STACK_HOME is this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("STACK_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended, or is another user's
            continue
    return found


def command_of(process: psutil.Process) -> str:
    """The command line of a process, or its title where it has set one; nothing if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


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
        return status if status["status"] in ("completed", "failed", "cancelled") else None

    result: dict[str, Any] = wait_for(look, seconds, lambda: client.get(f"/{api}/job/status?job_uuid={job_uuid}").text)
    return result
