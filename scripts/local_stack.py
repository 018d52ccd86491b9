"""A whole stack on this machine: a Ray of its own and the Serve applications on it, ended together.

The Ray belongs to the process that starts it and dies with it, whatever ends that process; after a kill -9, Ray's two
agents of the node notice only after a minute or two. `scripts/serve` runs this in the foreground; the quickstart and
the tests start `scripts/serve` as a child.
"""

import fcntl
import ipaddress
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from stack import keys
from stack.api.wire import describe
from stack.config import Config, ServedModel
from stack.store import Store, faults

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "serve_apps" / "local.yaml"
OBJECT_STORE_BYTES = 512 * 2**20
SERVICE = "llama-stack-ray"
# The port of the agent that each Ray node has, and how long the agent of a killed Ray may hold it.
AGENT_PORT = 52_365
AGENT_PORT_S = 180.0
# The first port that the dashboard may have, as of any Ray.
DASHBOARD_PORT = 8265
MODEL_IMPORT_PATH = "serve_apps.llm:build"
EMBEDDINGS_IMPORT_PATH = "serve_apps.embeddings:build"
CLASSIFIERS_IMPORT_PATH = "serve_apps.classifiers:build"
SCRIPTED_IMPORT_PATH = "serve_apps.scripted_engine:build"  # the same without a model, for tests and benches


class StartFailed(Exception):
    """The stack cannot start; the message says why and what to do."""


@dataclass(frozen=True)
class ServeFile:
    """A Serve config file whose parts that concern the stack are checked."""

    document: dict[str, Any]
    config: Config
    host: str
    port: int

    @property
    def url(self) -> str:
        """The address at which this machine reaches it, also where it listens at all of its addresses."""
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:  # a name
            return f"http://{self.host}:{self.port}"
        if address.version == 4:
            return f"http://{'127.0.0.1' if address.is_unspecified else address}:{self.port}"
        return f"http://[{'::1' if address.is_unspecified else address}]:{self.port}"


def read_serve_file(file: Path, port: int | None = None) -> ServeFile:
    """A Serve config file, with another port for the gateway if one is given.

    Raises StartFailed or BadInput, in one line, for what would otherwise only show when Ray Serve tries to deploy it.
    """
    config = Config.from_file(file)
    document: dict[str, Any] = yaml.safe_load(file.read_text())
    options = document.get("http_options")
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise StartFailed(f"{file}: http_options must be a mapping such as {{port: 8321}}, not {options!r}")
    host = options.get("host", "127.0.0.1")
    if not isinstance(host, str) or not host:
        raise StartFailed(f"{file}: http_options.host must be a string such as 127.0.0.1, not {host!r}")
    given = options.get("port", 8000)
    port = checked_port(given, f"{file}: http_options.port") if port is None else checked_port(port, "--port")
    _require_applications(file, document["applications"], config)
    # Written out, because Ray Serve's own default is to listen at every address of the machine.
    document["http_options"] = options | {"host": host, "port": port}
    return ServeFile(document, config, host, port)


def checked_port(value: object, name: str) -> int:
    """A port, or StartFailed with the name of where it stands."""
    # True is an int to Python, but no port.
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65_535:
        raise StartFailed(f"{name} must be an integer from 1 to 65535, not {value!r}")
    return value


def _require_applications(file: Path, applications: list[Any], config: Config) -> None:
    """Raises StartFailed unless each of the gateway's models has its application, and the other way round."""
    by_name = {}
    for application in applications:
        if not isinstance(application, dict) or not isinstance(application.get("name"), str):
            raise StartFailed(f"{file}: each of the applications must be a mapping with a name, not {application!r}")
        by_name[application["name"]] = application
    language_models = {model.id: model for model in config.models}
    embedding_models = {model.id: model for model in config.embedding_models}
    classifiers = {model.id: model for model in (*config.classifiers, *config.reward_classifiers)}
    _require_served(file, by_name, "models", language_models, (MODEL_IMPORT_PATH, SCRIPTED_IMPORT_PATH))
    _require_served(file, by_name, "embedding_models", embedding_models, (EMBEDDINGS_IMPORT_PATH,))
    _require_served(file, by_name, "classifiers and reward_models", classifiers, (CLASSIFIERS_IMPORT_PATH,))
    for model in config.all_models:
        place = f"{file}, args of the application {model.id!r}"
        args = _require_same_model(place, by_name[model.id].get("args"), model)
        if model.id in language_models and args.get("artifacts", "artifacts") != config.artifacts:
            raise StartFailed(f"{place}: artifacts must be {config.artifacts!r}, as in the gateway's args")


def _require_served(
    file: Path, applications: dict[str, Any], key: str, models: Mapping[str, object], import_paths: tuple[str, ...]
) -> None:
    """Raises StartFailed unless the applications with these import paths are just those of the gateway's models."""
    for name, application in applications.items():
        if application.get("import_path") in import_paths and name not in models:
            raise StartFailed(
                f"{file}: the application {name!r} serves a model that is not among the gateway's {key} "
                f"({', '.join(models) or 'none'}): add it there, or remove the application"
            )
    for name in models:
        if applications.get(name, {}).get("import_path") not in import_paths:
            raise StartFailed(
                f"{file}: the gateway's model {name!r} needs an application of the same name with "
                f"import_path: {import_paths[0]}"
            )


def _require_same_model(place: str, args: object, model: ServedModel) -> dict[str, Any]:
    """The args of a model's application, once they are those of the gateway's model. Raises StartFailed."""
    if not isinstance(args, dict):
        raise StartFailed(f"{place}: must be a mapping with the key model, not {args!r}")
    try:
        served = type(model).model_validate(args.get("model"))
    except ValidationError as error:
        raise StartFailed(f"{place}, model: {describe(error)}") from error
    for key in type(model).model_fields:
        here, there = getattr(served, key), getattr(model, key)
        if here != there:
            raise StartFailed(
                f"{place}: model.{key} is {here!r}, but {there!r} in the gateway's models: make them equal"
            )
    return args


@contextmanager
def only_stack(home: Path) -> Iterator[None]:
    """Keeps other stacks from a home folder: two on one store would take each other's jobs for lost and fail them."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = (home / "serve.lock").open("w")
    except OSError as error:
        raise StartFailed(f"STACK_HOME {home} cannot be written to ({error.strerror}): set another one") from error
    with file:
        try:
            # The kernel lets go of it however this process ends, and no child inherits the file.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StartFailed(f"another stack uses STACK_HOME {home}: stop it, or set another STACK_HOME") from error
        yield


def require_free(host: str, port: int) -> None:
    """Raises StartFailed if something else listens there."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise StartFailed(
            f"{host}:{port} cannot be used ({error.strerror}): stop what listens there, or choose a --port"
        ) from error


def _is_free(host: str, port: int) -> bool:
    try:
        require_free(host, port)
    except StartFailed:
        return False
    return True


def require_keys(file: ServeFile) -> None:
    """Raises Unauthorized where other machines would be listened to and no API key was ever made."""
    if keys.is_loopback(file.host):
        return
    try:
        with closing(Store(file.config.store_url)) as store:
            keys.require_keys(store, file.host)
    except SQLAlchemyError as error:
        raise StartFailed(f"the database cannot be used: {faults.reason(error)}") from error


def wait_for_agent_port(stopped: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Waits until the port of Ray's node agent is free. Raises StartFailed if it is not in time.

    Without its agent a Ray takes no jobs, and `ray.init` neither says so nor takes another port for it. The agent of a
    Ray that was killed holds the port until it notices, a minute or two later.
    """
    deadline = time.monotonic() + AGENT_PORT_S
    said = False
    while not stopped():
        try:
            require_free("127.0.0.1", AGENT_PORT)
            return
        except StartFailed as error:
            if time.monotonic() > deadline:
                raise StartFailed(f"another Ray runs on this machine: {error}") from error
            if not said:
                say(f"waiting for the agent of an earlier Ray to leave port {AGENT_PORT}")
                said = True
        time.sleep(1)


def start_ray() -> str:
    """Starts a Ray on loopback in this process. Returns the address of its job API, which is its dashboard's too."""
    port = next(port for port in range(DASHBOARD_PORT, 65_536) if _is_free("127.0.0.1", port))
    os.environ |= {
        # Ray's processes ask the dashboard by it. Without it they go by a file in /tmp that may name a Ray of earlier:
        # what Ray Train runs to clean up after a training then does not end before twelve seconds are over.
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}",
        "HF_HUB_OFFLINE": "1",
        # Any user of this machine can reach loopback: Ray asks for the token in ~/.ray/auth_token.
        "RAY_AUTH_MODE": "token",
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
        dashboard_port=port,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    return f"http://{started.dashboard_url}"


def deploy(document: dict[str, Any], ray_address: str, stopped: Callable[[], bool]) -> None:
    """Deploys the document of a Serve config file on a running Ray, as `serve deploy` does."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(document, file)
        file.flush()
        command = [str(Path(sys.executable).with_name("serve")), "deploy", file.name, "--address", ray_address]
        # In a session of its own, Ctrl-C in the terminal does not reach it.
        deployed = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if deployed.returncode and not stopped():
        lines = (deployed.stderr or deployed.stdout).strip().splitlines()
        raise StartFailed(f"Ray Serve refused the config file: {lines[-1] if lines else 'no reason given'}")


def wait_until_ready(url: str, timeout: float, stopped: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Waits for the stack just deployed to be ready, saying what is waited for. Raises StartFailed if it cannot be."""
    from ray import serve

    deadline = time.monotonic() + timeout
    while not stopped():
        for name, application in serve.status().applications.items():
            if application.status == "DEPLOY_FAILED":
                raise StartFailed(f"the application {name!r} cannot start: {application.message.strip()[-2000:]}")
        waiting = what_is_missing(url, just_deployed=True)
        if not waiting:
            return
        if time.monotonic() > deadline:
            raise StartFailed(f"after {timeout:.0f} s still waiting for: {waiting}")
        say(waiting)
        time.sleep(1)


@dataclass(frozen=True)
class RunningStack:
    """A stack that answers: its home folder, and what it waits for in words, nothing when it is ready."""

    home: str
    waiting_for: str


def running_stack(url: str, just_deployed: bool = False) -> RunningStack | None:
    """The stack that answers at an address; None if nothing answers. Raises StartFailed if something else answers.

    Where a stack was just deployed, Ray Serve's proxy answers in its place with 404 or 503 until it knows the gateway.
    """
    try:
        reply = httpx.get(f"{url}/health", timeout=5)
        answer = reply.json()
    except httpx.TransportError:
        return None
    except (httpx.HTTPError, ValueError, RecursionError):  # an answer, but no JSON
        answer = None
    if isinstance(answer, dict) and answer.get("service") == SERVICE:
        running_home = str(answer.get("home", ""))
        if reply.status_code == 200 and answer.get("status") == "ready":
            return RunningStack(running_home, "")
        if reply.status_code == 503:
            waiting_for = answer.get("waiting_for")
            waiting = waiting_for.items() if isinstance(waiting_for, dict) else []
            return RunningStack(running_home, ", ".join(f"{k} ({str(v).lower()})" for k, v in waiting) or "the gateway")
    if just_deployed and (reply.status_code == 404 or reply.status_code >= 500):
        return None
    raise StartFailed(f"something else answers at {url}: choose another port with --port")


def what_is_missing(url: str, just_deployed: bool = False) -> str:
    """What the stack at an address waits for, in words; empty when it is ready. Raises as running_stack does."""
    running = running_stack(url, just_deployed)
    return "the gateway" if running is None else running.waiting_for
