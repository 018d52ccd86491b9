"""scripts/bench fleet: the stacks that it measures, and its figures."""

import warnings
from pathlib import Path

import pytest
import yaml

from scripts.load_generator import Found, Request
from scripts.local_stack import read_serve_file
from stack.config import GATEWAY

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of as it is imported
    from tests import bench_fleet
    from tests.bench_fleet import PARTS, Load, Look, Measured, comparisons, document, load_of, part_of, table

RAY = "/venv/lib/python3.11/site-packages/ray"
REST = dict.fromkeys(PARTS, 0.1)


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("ray::ServeReplica:gateway:Gateway", bench_fleet.GATEWAYS),
        ("ray::ServeReplica:gateway:JobSupervisor", bench_fleet.OTHERS),
        ("ray::ServeReplica:scripted:ScriptedLLM:scripted", bench_fleet.REPLICAS),
        ("ray::ProxyActor.receive_asgi_messages", bench_fleet.PROXIES),
        ("ray::ServeController", bench_fleet.CONTROLLER),
        (f"{RAY}/core/src/ray/gcs/gcs_server --log_dir=/tmp/ray/session/logs", bench_fleet.GCS),
        (
            f"{RAY}/core/src/ray/raylet/raylet --raylet_socket_name=/tmp/ray/raylet "
            f"--dashboard_agent_command=python {RAY}/dashboard/agent.py --node-ip-address=127.0.1.1",
            bench_fleet.RAYLETS,
        ),
        ("ray::DashboardAgent", bench_fleet.AGENTS),
        ("ray::RuntimeEnvAgent", bench_fleet.AGENTS),
        ('ray-dashboard-ServeHead-0 (python -c "…")', bench_fleet.DASHBOARD),
        (f"python -u {RAY}/_private/log_monitor.py --session-dir=/tmp/ray", bench_fleet.DASHBOARD),
        ("ray::SharedEngine", bench_fleet.OTHERS),
    ],
)
def test_each_process_is_of_its_part(command: str, part: str) -> None:
    assert part_of(command) == part


def test_the_stack_that_is_measured_is_one_with_all_of_each_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STACK_HOME", str(tmp_path))
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(document(3, 8_000, "postgresql:///stack", "s3://bucket")))
    made = read_serve_file(file)
    (model,) = made.config.models
    assert (model.min_replicas, model.max_replicas) == (3, 3)
    (gateway,) = (one for one in made.document["applications"] if one["name"] == GATEWAY)
    assert gateway["deployments"] == [{"name": "Gateway", "num_replicas": 3, "max_replicas_per_node": 1}]
    assert made.document["proxy_location"] == "EveryNode"


def look(gateways: tuple[float, float], proxy: float) -> Look:
    """So many CPU seconds of two gateways and a proxy."""
    first, second = gateways
    return {
        (1, 0.0): (bench_fleet.GATEWAYS, first),
        (2, 0.0): (bench_fleet.GATEWAYS, second),
        (3, 0.0): (bench_fleet.PROXIES, proxy),
    }


def test_what_is_taken_at_rest_is_taken_off() -> None:
    requests = [Request(0, 200, 1.0, 2, 2, 9, 100, number / 1_000, 0.9, None, []) for number in range(20)]
    found = Found(10.0, 0.5, requests)
    load = load_of(found, 2, look((1, 1), 5), look((5, 3), 8), 10.0, REST)
    assert load.cpu_s[bench_fleet.GATEWAYS] == pytest.approx(6 - 10 * 0.1)
    assert load.per_1000_tokens[bench_fleet.PROXIES] == pytest.approx((3 - 1) / 2)
    assert load.ms_per_request[bench_fleet.PROXIES] == pytest.approx(1_000 * 2 / 20)
    assert load.cpu_s_with_rest == 9
    assert load.busiest_gateway == pytest.approx(4 / 6)
    assert (load.first_ms_p50, load.first_ms_p99) == (10, 18)


def measured(nodes: int, cpu_of_a_request: float) -> Measured:
    """A fleet whose parts each take so much for each of 100 requests of 10 tokens, of each node."""
    requests = 100 * nodes
    cpu = dict.fromkeys(PARTS, cpu_of_a_request * requests)
    load = Load(8 * nodes, requests, 10 * requests, 10.0, 20.0, 30.0, cpu, 9.0, 1 / nodes, 0.1)
    rest = dict.fromkeys(PARTS, 0.01 * nodes)
    return Measured(nodes, 60.0, rest, dict.fromkeys(PARTS, nodes), load, load)


def test_what_grows_more_than_in_proportion_is_missed() -> None:
    assert all(one.met for one in comparisons(measured(1, 0.01), measured(3, 0.0124)))
    tokens, requests, node, *_ = comparisons(measured(1, 0.01), measured(3, 0.0126))
    assert (tokens.met, requests.met, node.met) == (False, False, True)
    assert tokens.peer == pytest.approx(3 * 0.01 * 100)
    assert node.ratio == pytest.approx(1)


def test_the_table_has_a_column_for_each_size() -> None:
    lines = table([measured(1, 0.01), measured(2, 0.01), measured(3, 0.01)]).splitlines()
    assert lines[0] == "| | 1 node | 2 nodes | 3 nodes |"
    assert "| streams | 8 | 16 | 24 |" in lines
    assert all(line.count("|") == 5 for line in lines)
