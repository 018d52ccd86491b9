"""A stack that keeps its things in local files does not start on several nodes, and says what is to be changed."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from scripts import local_stack
from stack.config import GATEWAY
from tests import stack_on_nodes
from tests.running_stack import free_port, prepared_home, wait_for

pytestmark = pytest.mark.long

NODES = 3
REFUSED_S = 240


def test_the_config_of_one_node_is_refused_on_several(tmp_path: Path) -> None:
    document = yaml.safe_load(local_stack.CONFIG.read_text())
    document["http_options"]["port"] = free_port()
    with stack_on_nodes.cluster(prepared_home(tmp_path), NODES) as ray_address:
        local_stack.deploy(document, ray_address, lambda: False)
        serve = ServeSubmissionClient(ray_address)

        def gateway() -> dict[str, Any]:
            applications: dict[str, Any] = serve.get_serve_details()["applications"]
            deployments = applications.get(GATEWAY, {}).get("deployments", {})
            found: dict[str, Any] = deployments.get("Gateway", {})
            return found

        wait_for(lambda: gateway().get("status") == "DEPLOY_FAILED", REFUSED_S, gateway)
        told = gateway()["message"]
    assert f"this Ray has {NODES} nodes" in told
    for key in ("store is 'stack.db'", "artifacts is 'artifacts'", "data_roots has 'data'", "memory_banks.folder is"):
        assert key in told
    assert "serve_apps/cluster.yaml shows how" in told
