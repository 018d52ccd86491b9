"""A gateway that others reach does not start on a Ray that they could use: on a host, with `ray start`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import local_stack
from stack.config import GATEWAY
from tests.hosts import Host, network
from tests.running_stack import SCRIPTED_MODEL, wait_for

pytestmark = pytest.mark.long

INNER, PUBLIC = "10.76.0.10", "198.41.0.4"
BIN = Path(sys.executable).parent
TOKEN = {"RAY_AUTH_MODE": "token"}
# A gateway that is refused is tried three times, and each try starts a process.
DECIDED_S = 300


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with network(tmp_path, "10.76.0") as net:
        host = net.host("stack", 10)
        host.run("ip", "address", "add", f"{PUBLIC}/32", "dev", "lo")
        yield host


@pytest.mark.parametrize(
    ("address", "dashboard", "environment", "firewalled", "refusal"),
    [
        (INNER, "127.0.0.1", TOKEN, False, f"of which some are of the internet ({PUBLIC})"),
        (INNER, "127.0.0.1", TOKEN, True, ""),
        (INNER, "127.0.0.1", {"RAY_AUTH_MODE": "disabled"}, True, "it asks nobody for a token"),
        (PUBLIC, "127.0.0.1", TOKEN, True, f"bound to addresses of the internet ({PUBLIC})"),
        (INNER, "0.0.0.0", TOKEN, True, f"listens beyond loopback ({INNER})"),
        (INNER, INNER, TOKEN, True, f"listens beyond loopback ({INNER})"),
        ("127.0.0.1", "127.0.0.1", TOKEN, False, ""),
        ("127.0.0.1", "0.0.0.0", TOKEN, False, "listens beyond loopback (0.0.0.0)"),
    ],
)
def test_a_gateway_starts_on_a_locked_ray_alone(
    host: Host,
    tmp_path: Path,
    address: str,
    dashboard: str,
    environment: dict[str, str],
    firewalled: bool,
    refusal: str,
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(document(firewalled)))
    (tmp_path / "home" / str(SCRIPTED_MODEL["path"])).mkdir(parents=True)
    given = environment | {"STACK_HOME": str(tmp_path / "home"), "STACK_CONFIG": str(file)}
    api = ("--address", f"http://{INNER if dashboard == INNER else '127.0.0.1'}:8265")

    def run(*command: str) -> str:
        done = host.run("env", "-C", str(local_stack.ROOT), *command, environment=given)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "stack", "keys", "create", "--name", "a test", "--scopes", "inference")
    if environment is TOKEN:
        run(f"{BIN}/ray", "get-auth-token", "--generate")
    run(f"{BIN}/ray", "start", "--head", f"--node-ip-address={address}", f"--dashboard-host={dashboard}")
    run(f"{BIN}/serve", "deploy", str(file), *api)

    def ended() -> bool:
        gateway = yaml.safe_load(run(f"{BIN}/serve", "status", *api))["applications"][GATEWAY]
        said.update(gateway)
        return gateway["status"] in ("RUNNING", "DEPLOY_FAILED")

    said: dict[str, Any] = {}
    wait_for(ended, DECIDED_S, lambda: said)
    assert said["status"] == ("DEPLOY_FAILED" if refusal else "RUNNING"), said
    assert refusal in said["deployments"]["Gateway"]["message"]


def document(firewalled: bool) -> dict[str, object]:
    """The smallest stack that others reach: its model starts when it is asked first, which nobody does."""
    gateway = {
        "name": GATEWAY,
        "import_path": "serve_apps.gateway:build",
        "route_prefix": "/",
        "args": {"models": [SCRIPTED_MODEL], "firewalled": firewalled},
    }
    scripted = {
        "name": SCRIPTED_MODEL["id"],
        "import_path": local_stack.SCRIPTED_IMPORT_PATH,
        "route_prefix": None,
        "args": {"model": SCRIPTED_MODEL},
    }
    return {"http_options": {"host": "0.0.0.0", "port": 8321}, "applications": [gateway, scripted]}
