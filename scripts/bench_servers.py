"""The servers that scripts/bench compares: how each is started and ended, and what its processes take."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from scripts import local_stack
from stack.config import GATEWAY, LanguageModel, home

START_S, ASK_S, END_S, LOOK_S = 300.0, 20.0, 60.0, 0.5
ENGINE, PROXY, INGRESS, MODEL, OTHER = "engine", "proxy", "ingress", "model replica", "Ray and others"
# What the command line of a process, or its title where it has set one, tells of its part; the first that fits.
_PARTS = (
    ("VLLM::", ENGINE),
    ("haproxy", PROXY),
    ("ProxyActor", PROXY),
    ("HAProxyManager", PROXY),
    ("LLMServer:", MODEL),
    ("LLM:", MODEL),
    ("JobSupervisor", OTHER),
    ("ServeReplica:", INGRESS),
    ("vllm.entrypoints", INGRESS),
)


class BenchFailed(Exception):
    """The bench cannot go on; the message says why."""


@dataclass
class Server:
    """A server that answers. Its processes are those whose STACK_HOME is its home folder."""

    name: str
    url: str
    home: Path

    def cpu(self) -> dict[tuple[int, float], tuple[str, float]]:
        """The part of each of its processes, by id and time of its start, and the CPU seconds it has taken so far."""
        taken = {}
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                times = process.cpu_times()
                taken[process.pid, process.create_time()] = (part_of(command_of(process)), times.user + times.system)
        return taken

    def forget_peaks(self) -> None:
        """Lets the peaks of memory begin anew (proc(5), clear_refs)."""
        for process in self.processes():
            with contextlib.suppress(OSError):  # it has just ended
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")

    def peak_mb(self) -> float:
        """The greatest memory that each process has had, added up: what several share counts in each."""
        return sum(_peak_kb(process.pid) for process in self.processes()) / 1_024

    def private_kb(self, *parts: str) -> float:
        """The memory that the processes of these parts share with no other."""
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if part_of(command_of(process)) in parts:
                    total += process.memory_full_info().uss / 1_024
        return total

    def processes(self) -> list[psutil.Process]:
        return processes_of(self.home)


def part_of(command: str) -> str:
    """The part in the serving of a process with this command line."""
    return next((part for word, part in _PARTS if word in command), OTHER)


def spent(before: dict[tuple[int, float], tuple[str, float]], after: dict[Any, tuple[str, float]]) -> dict[str, float]:
    """The CPU seconds of each part between two looks. A process that ended in between counts until the first."""
    parts: dict[str, float] = {}
    for key, (part, seconds) in after.items():
        parts[part] = parts.get(part, 0.0) + seconds - before.get(key, (part, 0.0))[1]
    return parts


# The servers


@contextmanager
def stack(folder: Path, model: LanguageModel, *, is_scripted: bool, haproxy: bool, **args: Any) -> Iterator[Server]:
    """The stack, by scripts/serve, with one model; `args` are more of those of its application."""
    port = free_port()
    file = _written(folder, stack_document(model, is_scripted, **args))
    command = [sys.executable, "-m", "scripts.serve", "--config", str(file), "--port", str(port), "--stop-with-stdin"]
    with running("the stack", command, folder, port, "/health", **_proxy(haproxy)) as server:
        yield server


def stack_document(model: LanguageModel, is_scripted: bool, **args: Any) -> dict[str, Any]:
    """serve_apps/local.yaml, with this as its only model, whose application has these arguments, too."""
    document: dict[str, Any] = yaml.safe_load(local_stack.CONFIG.read_text())
    gateway = next(one for one in document["applications"] if one["name"] == GATEWAY)
    entry = model.model_dump(exclude_unset=True)
    others = ("embedding_models", "classifiers", "reward_models", "shields", "model_shields")
    gateway["args"] = {key: value for key, value in gateway["args"].items() if key not in others} | {"models": [entry]}
    path = local_stack.SCRIPTED_IMPORT_PATH if is_scripted else local_stack.MODEL_IMPORT_PATH
    mine = {"model": entry, "artifacts": gateway["args"].get("artifacts", "artifacts")} | args
    served = {"name": model.id, "import_path": path, "route_prefix": None, "args": mine}
    return document | {"applications": [gateway, served]}


@contextmanager
def ray_serve_llm(folder: Path, model: LanguageModel, *, haproxy: bool) -> Iterator[Server]:
    """ray.serve.llm's own OpenAI ingress, before a scripted engine."""
    port = free_port()
    file = _written(folder, ray_serve_llm_document(model, port))
    address = f"http://127.0.0.1:{port}/v1/models"
    command = [sys.executable, "-m", "scripts.bench_peer", str(file), address]
    with running("ray.serve.llm", command, folder, port, "/v1/models", **_proxy(haproxy)) as server:
        yield server


def ray_serve_llm_document(model: LanguageModel, port: int) -> dict[str, Any]:
    """The Serve config file of ray.serve.llm's builder of OpenAI applications."""
    config = {
        "model_loading_config": {"model_id": model.id, "model_source": str(model.folder)},
        "accelerator_type": None,
        "placement_group_config": {"bundles": [{"CPU": 1}]},
        "engine_kwargs": model.engine,
        "deployment_config": {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}},
        "runtime_env": {"env_vars": {"RAYLLM_VLLM_ENGINE_CLS": "serve_apps.scripted_engine.ScriptedEngine"}},
    }
    application = {
        "name": "openai",
        "import_path": "ray.serve.llm:build_openai_app",
        "route_prefix": "/",
        "args": {"llm_configs": [config]},
    }
    options = {"host": "127.0.0.1", "port": port}
    return {"proxy_location": "HeadOnly", "http_options": options, "applications": [application]}


@contextmanager
def vllm(folder: Path, model: LanguageModel) -> Iterator[Server]:
    """vLLM's own server, with the engine's settings as in the model's entry, without adapters."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"),
        *("--model", str(model.folder), "--served-model-name", model.id),
        *("--dtype", model.dtype, "--max-model-len", str(model.context)),
        *(["--enforce-eager"] if model.engine.get("enforce_eager") else []),
    ]
    settings = {"VLLM_CPU_KVCACHE_SPACE": str(model.kv_cache_gb), "VLLM_NO_USAGE_STATS": "1"}
    with running("vLLM's server", command, folder, port, "/health", **settings) as server:
        yield server


def prepared_home(folder: Path) -> Path:
    """A new home folder with the models that are prepared already."""
    made = folder / "home"
    made.mkdir(parents=True)
    (made / "models").symlink_to(home() / "models")
    return made


def local_model(**changes: Any) -> LanguageModel:
    """The model of serve_apps/local.yaml, with changes of its entry."""
    document = yaml.safe_load(local_stack.CONFIG.read_text())
    gateway = next(one for one in document["applications"] if one["name"] == GATEWAY)
    return LanguageModel.model_validate(gateway["args"]["models"][0] | changes)


@contextmanager
def running(name: str, command: list[str], folder: Path, port: int, path: str, **settings: str) -> Iterator[Server]:
    """A server in a session of its own, from when `path` answers on, until its end, for which it is asked.

    It is asked by the end of its standard input, and by SIGTERM if that is not enough. `settings` are variables of its
    environment. Raises BenchFailed where it ends before it answers, or does not answer in time.
    """
    made = prepared_home(folder)
    environment = os.environ | settings | {"STACK_HOME": str(made), "HF_HUB_OFFLINE": "1"}
    environment["RAY_worker_niceness"] = "0"  # Ray's workers would give way to whatever else runs, and others would not
    log = folder / "server.log"
    server = Server(name, f"http://127.0.0.1:{port}", made)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment,
            cwd=local_stack.ROOT, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_until_ready(process, server.url + path, name, log)
        yield server
    finally:
        _end(process, server)


def _proxy(haproxy: bool) -> dict[str, str]:
    return {"RAY_SERVE_ENABLE_HA_PROXY": str(int(haproxy))}


def _written(folder: Path, document: dict[str, Any]) -> Path:
    folder.mkdir()
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, name: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchFailed(f"{name} ended while it started: {log.read_text()[-2000:].strip()}")
        with contextlib.suppress(httpx.TransportError):  # it does not listen yet
            if httpx.get(url, timeout=10).status_code == 200:
                return
        time.sleep(LOOK_S)
    raise BenchFailed(f"{name} was not ready within {START_S:.0f} s: {log.read_text()[-2000:].strip()}")


def _end(process: subprocess.Popen[bytes], server: Server) -> None:
    """Ends it in good order if it can be, and waits until none of its processes is left."""
    assert process.stdin is not None
    process.stdin.close()
    for ask, seconds in ((None, ASK_S), (process.terminate, END_S), (process.kill, END_S)):
        if ask is not None:
            ask()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
            break
    deadline = time.monotonic() + END_S
    while server.processes() and time.monotonic() < deadline:
        time.sleep(LOOK_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def processes_of(folder: Path) -> list[psutil.Process]:
    """All processes whose STACK_HOME is this folder, and theirs: who sets a long title overwrites its environment."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended, or is another user's
            if process.environ().get("STACK_HOME") == str(folder):
                found |= {one.pid: one for one in (process, *process.children(recursive=True))}
    return [process for process in found.values() if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def command_of(process: psutil.Process) -> str:
    """The command line of a process, or its title where it has set one."""
    return " ".join(process.cmdline())


def _peak_kb(pid: int) -> int:
    with contextlib.suppress(OSError):  # it has just ended
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0
