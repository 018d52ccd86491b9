"""Where Ray Serve and Ray's dashboard listen, as far as that can be asked from within a deployment."""

import logging
from collections.abc import Mapping
from typing import Any

import psutil
import ray
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.experimental.internal_kv import _internal_kv_get
from ray.job_submission import JobSubmissionClient
from ray.serve import HTTPOptions

from stack.keys import is_loopback

logger = logging.getLogger("ray.serve")


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
