"""Where Ray, Ray Serve and Ray's dashboard listen, as far as that can be asked from within a deployment."""

import logging
import socket
from collections.abc import Iterable, Mapping
from typing import Any

import psutil
import ray
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.experimental.internal_kv import _internal_kv_get
from ray.job_submission import JobSubmissionClient
from ray.serve import HTTPOptions

from serve_apps.placement import ON_HEAD
from stack.keys import is_loopback

logger = logging.getLogger("ray.serve")

# The head starts a process for it.
HEAD_S = 120.0
# A node of one of these has Ray's ports there alone. To Ray, 127.0.1.1 is an address like any other.
LOOPBACK = ("127.0.0.1", "::1")


def listening_host() -> str | None:
    """The host that Serve's proxies listen at; None where Ray has no dashboard to ask.

    Of Serve's Python API nothing tells it. Its REST API does (GET /api/serve/applications/), by the client of the
    `serve` command, which knows Ray's token.
    """
    try:
        dashboard = JobSubmissionClient(ray.get_runtime_context().gcs_address).get_address()
        details = ServeSubmissionClient(dashboard).get_serve_details()
    except (OSError, RuntimeError) as error:
        logger.warning("it cannot be asked where Serve listens: %s", error)
        return None
    return host_of(details)


def host_of(details: Mapping[str, Any]) -> str:
    """The host in Serve's details, which leave out what was not set when Serve was started."""
    return str(details.get("http_options", {}).get("host", HTTPOptions().host))


def is_open(nodes: Iterable[str]) -> bool:
    """Whether a Ray with nodes at these addresses listens beyond loopback."""
    return not set(nodes).issubset(LOOPBACK)


def interfaces() -> set[str]:
    """All addresses at which Ray listens on this node and on the head.

    Raises GetTimeoutError where the head does not say its own in HEAD_S.
    """
    asked = ray.remote(addresses_here).options(**ON_HEAD).remote()
    of_head: list[str] = ray.get(asked, timeout=HEAD_S)
    return {*addresses_here(), *of_head}


def addresses_here() -> list[str]:
    """The addresses of this machine's interfaces, of which a node on loopback uses loopback alone."""
    own: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    if own in LOOPBACK:
        return [own]
    families = (socket.AF_INET, socket.AF_INET6)
    return [one.address for all_of in psutil.net_if_addrs().values() for one in all_of if one.family in families]


def dashboard_hosts() -> list[str]:
    """The addresses at which Ray's dashboard listens; none where there is no dashboard.

    It makes known its head's address unless it listens at loopback alone. Of a Ray on loopback both are the same, so
    there this machine's own table is asked.
    """
    known: bytes | None = _internal_kv_get("dashboard", namespace="dashboard")
    if not known:
        return []
    host, _, port = known.decode().rpartition(":")
    host = host.strip("[]")
    if is_loopback(ray.util.get_node_ip_address()):  # type: ignore[no-untyped-call]
        return [host, *_listening_here(int(port))]
    return [host]


def _listening_here(port: int) -> list[str]:
    """The addresses at which something listens on this machine, at a port."""
    return [
        one.laddr.ip
        for one in psutil.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port
    ]
