"""Two gateways on two nodes: both answer, and what one has made the other one has too."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from stack.config import GATEWAY
from tests import samples
from tests.agent_clients import CODE, Agent, calls
from tests.memory import document
from tests.running_stack import MODEL, SCRIPTED, Stack, ended, wait_for

pytestmark = pytest.mark.alone

CONNECTIONS, ASKED = 100, 16
Pair = tuple[httpx.Client, httpx.Client]


@pytest.fixture(scope="module")
def gateways(stack: Stack) -> Iterator[Pair]:
    """A client of each, with a connection to it alone: by the proxy of its node.

    The third node's proxy has a connection's requests answered by the one or the other.
    """
    with ExitStack() as held:
        found: dict[str, httpx.Client] = {}
        for _ in range(CONNECTIONS):
            # httpx itself would close a connection after 5 seconds without a request, and the next went anywhere.
            limits = httpx.Limits(max_connections=1, keepalive_expiry=None)
            client = held.enter_context(httpx.Client(base_url=stack.url, timeout=120, limits=limits))
            answering = {who_answers(client) for _ in range(ASKED)}
            if len(answering) == 1:
                found.setdefault(answering.pop(), client)
            if len(found) == 2:
                break
        first, second = found.values()
        yield first, second


@pytest.fixture(scope="module")
def model(stack: Stack) -> None:
    """The scripted model has a replica."""
    body = {"model": SCRIPTED, "messages": [{"role": "user", "content": "Hello"}]}
    with stack.client() as client:
        wait_for(lambda: client.post("/v1/chat/completions", json=body).status_code == 200, 120)


def who_answers(client: httpx.Client) -> str:
    """When the process was started that answers: each tells its own figures."""
    return figure(client, "process_start_time_seconds")


def figure(client: httpx.Client, name: str) -> str:
    figures = client.get("/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", figures, re.MULTILINE)
    return found[1] if found else ""


def answered(client: httpx.Client, method: str, route: str) -> float:
    """How many such requests the gateway of a client has answered."""
    return float(figure(client, f'stack_http_requests_total{{method="{method}",route="{route}",status="200"}}') or 0)


@contextmanager
def by(client: httpx.Client, method: str, route: str) -> Iterator[None]:
    """The block has one such request, which this one of the gateways answers."""
    before = answered(client, method, route)
    yield
    # It counts a request when the end of its answer has been sent.
    wait_for(lambda: answered(client, method, route) == before + 1, 10, lambda: (method, route, before))


def test_they_are_on_two_nodes(stack: Stack, gateways: Pair) -> None:
    details = ServeSubmissionClient(stack.ray_address).get_serve_details()
    replicas = details["applications"][GATEWAY]["deployments"]["Gateway"]["replicas"]
    assert [replica["state"] for replica in replicas] == ["RUNNING", "RUNNING"]
    assert len({replica["node_id"] for replica in replicas}) == 2
    for client in gateways:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
        with by(client, "POST", "/v1/chat/completions"):
            assert "Paris" in client.post("/v1/chat/completions", json=body | {"temperature": 0}).text


def test_a_bank_of_one_is_asked_and_changed_by_the_other(gateways: Pair) -> None:
    first, second = gateways
    with by(first, "POST", "/memory_banks/create"):
        made = first.post("/memory_banks/create", json={"name": "rivers", "config": {"type": "keyword"}}).json()
    bank = {"bank_id": made["bank_id"]}
    documents = [document("danube", "The Danube flows through Vienna.")]
    with by(first, "POST", "/memory_bank/insert"):
        assert first.post("/memory_bank/insert", json=bank | {"documents": documents}).status_code == 200
    with by(second, "POST", "/memory_bank/query"):
        (chunk,) = second.post("/memory_bank/query", json=bank | {"query": "Vienna"}).json()["chunks"]
    assert chunk["document_id"] == "danube"
    with by(second, "POST", "/memory_bank/update"):
        changed = [document("danube", "The Danube flows through Budapest.")]
        assert second.post("/memory_bank/update", json=bank | {"documents": changed}).status_code == 200
    assert first.post("/memory_bank/query", json=bank | {"query": "Vienna"}).json()["chunks"] == []
    with by(second, "POST", "/memory_banks/drop"):
        second.post("/memory_banks/drop", json=bank)
    assert first.post("/memory_bank/query", json=bank | {"query": "Budapest"}).status_code == 404


def test_a_data_set_and_a_job_of_one_are_seen_by_the_other(gateways: Pair) -> None:
    first, second = gateways
    rows = b"".join(b'{"id": "%d", "prompt": "Hello"}\n' % number for number in range(8))
    with by(first, "POST", "/datasets/upload"):
        sent = first.post("/datasets/upload", files={"file": ("rows.jsonl", rows)}).json()
    data = samples.dataset(sent["content_url"], id="text", prompt="text")
    with by(second, "POST", "/datasets/create"):
        made = second.post("/datasets/create", json={"uuid": "of-both", "dataset": data})
    assert made.json()["rows"] == 8
    body = samples.batch("of-both", job_uuid="of-first", model=SCRIPTED)
    with by(first, "POST", "/batch_inference/jobs"):
        assert first.post("/batch_inference/jobs", json=body).status_code == 200
    with by(second, "POST", "/batch_inference/jobs"):
        assert second.post("/batch_inference/jobs", json=body).status_code == 200, "it is the same job"
    status = ended(second, "batch_inference", "of-first")
    assert (status["status"], status["metrics"]["rows"]) == ("completed", 8)
    with by(first, "GET", "/batch_inference/job/logs"):
        log = first.get("/batch_inference/job/logs", params={"job_uuid": "of-first"}).json()["log_lines"]
    assert log
    jobs = [job["job_uuid"] for job in second.get("/batch_inference/jobs").json()]
    assert jobs.count("of-first") == 1


def test_a_session_of_one_goes_on_at_the_other(gateways: Pair, model: None) -> None:
    first, second = gateways
    with by(first, "POST", "/agentic_system/create"):
        agent = Agent(first, SCRIPTED, tools=[CODE])
    turn = agent.turn(calls("code_interpreter", code="print(6 * 7)"))
    agent.client = second
    with by(second, "GET", "/agentic_system/turn/get"):
        assert agent.get_turn(turn["turn_id"])["output_message"] == turn["output_message"]
    with by(second, "POST", "/agentic_system/turn/create"):
        another = agent.turn("And now?")
    session = {"agent_id": agent.id, "session_id": agent.session}
    told = first.post("/agentic_system/session/get", params=session, json={}).json()
    assert [one["turn_id"] for one in told["turns"]] == [turn["turn_id"], another["turn_id"]]


def test_a_turn_of_one_is_cancelled_and_followed_by_the_other(gateways: Pair, model: None) -> None:
    first, second = gateways
    agent = Agent(first, SCRIPTED)
    events = agent.events("fault:hang-after-1")
    _, start = next(events)
    turn = {"agent_id": agent.id, "turn_id": start["turn_id"]}
    with by(second, "POST", "/agentic_system/turn/cancel"):
        assert second.post("/agentic_system/turn/cancel", json=turn).status_code == 200
    *_, (_, last) = events
    agent.client = second
    with by(second, "GET", "/agentic_system/turn/events"):
        *_, (_, last_again) = agent.events_of(start["turn_id"])
    assert last["error"]["code"] == last_again["error"]["code"] == "cancelled"
    assert agent.get_turn(start["turn_id"])["state"] == "cancelled"
