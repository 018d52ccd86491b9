"""A whole stack on this machine: a Ray of its own and the Serve applications on it, ended together.

The Ray belongs to the process that starts it and dies with it, whatever ends that process. `scripts/serve` runs this
in the foreground; the quickstart and the tests start `scripts/serve` as a child.
"""

import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "serve_apps" / "local.yaml"
OBJECT_STORE_BYTES = 512 * 2**20


class StartFailed(Exception):
    """The stack cannot start; the message says why and what to do."""


def gateway_address(config: Path, port: int | None) -> tuple[str, int]:
    """The host and port at which a Serve config file puts the gateway."""
    options = yaml.safe_load(config.read_text()).get("http_options", {})
    return options.get("host", "127.0.0.1"), port or options.get("port", 8000)


def require_free(host: str, port: int) -> None:
    """Raises StartFailed if something else listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartFailed(
                f"{host}:{port} cannot be used ({error.strerror}): stop what listens there, or choose a --port"
            ) from error


def start_ray() -> str:
    """Starts a Ray on loopback in this process. Returns the address of its job API, which is its dashboard's too."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        # Ray's switch between one machine and many: off, every port of Ray's binds to loopback.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # So that `ray job submit -- python …` means this environment's Python.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    import ray

    started = ray.init(
        address="local",
        # These are places to schedule, not threads: a laptop's two cores must hold a model that mostly waits, a
        # training and an evaluation at once.
        num_cpus=max(4, os.cpu_count() or 1),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    return f"http://{started.dashboard_url}"


def deploy(config: Path, port: int | None, ray_address: str) -> None:
    """Deploys a Serve config file on a running Ray, as `serve deploy` does."""
    document = yaml.safe_load(config.read_text())
    if port is not None:
        document.setdefault("http_options", {})["port"] = port
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(document, file)
        file.flush()
        command = [str(Path(sys.executable).with_name("serve")), "deploy", file.name, "--address", ray_address]
        deployed = subprocess.run(command, capture_output=True, text=True, check=False)
    if deployed.returncode:
        lines = (deployed.stderr or deployed.stdout).strip().splitlines()
        raise StartFailed(f"Ray Serve refused {config}: {lines[-1] if lines else 'no reason given'}")


def wait_until_ready(url: str, timeout: float, stopped: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Waits for the gateway's /health to answer 200, saying what is waited for. Raises StartFailed if it cannot be."""
    from ray import serve

    deadline = time.monotonic() + timeout
    while not stopped():
        for name, application in serve.status().applications.items():
            if application.status == "DEPLOY_FAILED":
                raise StartFailed(f"the application {name!r} cannot start: {application.message.strip()[-2000:]}")
        waiting = what_is_missing(url)
        if not waiting:
            return
        if time.monotonic() > deadline:
            raise StartFailed(f"after {timeout:.0f} s still waiting for: {waiting}")
        say(waiting)
        time.sleep(1)


def what_is_missing(url: str) -> str:
    """What a stack is waiting for, in words; empty when it is ready."""
    try:
        reply = httpx.get(f"{url}/health", timeout=5)
        if reply.status_code == 200:
            return ""
        return ", ".join(f"{name} ({state.lower()})" for name, state in reply.json()["waiting_for"].items())
    except (httpx.HTTPError, ValueError, KeyError):
        return "the gateway"
