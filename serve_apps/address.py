"""Where Ray Serve listens, as far as that can be asked from within a deployment."""

import logging
from collections.abc import Mapping
from typing import Any

import ray
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.job_submission import JobSubmissionClient
from ray.serve import HTTPOptions

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
