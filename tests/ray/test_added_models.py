"""Models that are added to a stack that runs: started, asked, started again after a crash, and removed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from stack.store.models import RECENT_S
from tests.running_stack import MODEL, Stack, wait_for

pytestmark = pytest.mark.alone

# The folder of the model that is served anyway, under another id.
EXTRA = {
    "id": "extra",
    "path": f"models/{MODEL}",
    "dtype": "float32",
    "context": 512,
    "adapters": 0,
    "cpus": 0.1,
    "kv_cache_gb": 1,
    "engine": {"enforce_eager": True},
}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
START_S = 300
# A replica looks every 2 s whether its requests have ended, and Serve has up to 20 s to end its process.
STOP_S = 90


def listed(client: httpx.Client, id: str = "extra") -> dict[str, Any] | None:
    models = client.get("/models/list").json()["data"]
    return next((model for model in models if model["id"] == id), None)


def state(client: httpx.Client, id: str = "extra") -> str | None:
    model = listed(client, id)
    return model["state"] if model else None


def add(client: httpx.Client, **entry: Any) -> None:
    reply = client.post("/models/add", json=EXTRA | entry)
    assert reply.status_code == 200, reply.text


def remove(client: httpx.Client, id: str = "extra") -> None:
    assert client.post("/models/remove", json={"model_id": id}).json()["state"] == "stopping"


def ask(client: httpx.Client, **more: Any) -> httpx.Response:
    body = {"model": "extra", "messages": QUESTION, "temperature": 0, "max_tokens": 20}
    return client.post("/v1/chat/completions", json=body | more)


@pytest.fixture
def extra(client: httpx.Client) -> Iterator[httpx.Client]:
    """A client of a stack that serves the added model too."""
    add(client)
    wait_for(lambda: state(client) == "running", START_S, lambda: listed(client))
    yield client
    if state(client) is not None:
        client.post("/models/remove", json={"model_id": "extra"})
        wait_for(lambda: state(client) is None, STOP_S, lambda: listed(client))


def test_a_model_is_added_and_removed_without_a_restart(extra: httpx.Client, stack: Stack) -> None:
    assert "Paris" in ask(extra).json()["choices"][0]["message"]["content"]
    assert extra.get("/health").status_code == 200
    assert "extra" in [model["id"] for model in extra.get("/v1/models").json()["data"]]

    # Another supervisor finds it running, and starts nothing.
    stack.kill_9("JobSupervisor")
    wait_for(lambda: extra.get("/health").status_code == 200, 60, lambda: extra.get("/health").text)
    assert ask(extra).status_code == 200

    body = {"model": "extra", "messages": QUESTION, "max_tokens": 300, "ignore_eos": True, "stream": True}
    with extra.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = reply.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"]
        with stack.client() as other:
            remove(other)
            # Another gateway has what it has read for so long.
            wait_for(lambda: ask(other).status_code == 404, RECENT_S if stack.storage else 0)
            wait_for(lambda: (listed(other) or {})["state"] == "stopping", 10, lambda: listed(other))
        events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]", "what is under way ends"
    assert '"finish_reason":"length"' in "".join(events[-3:])
    wait_for(lambda: state(extra) is None, STOP_S, lambda: listed(extra))
    assert extra.get("/health").status_code == 200

    # The same id once more: the gateway's way to the old application is not in the way.
    add(extra)
    wait_for(lambda: state(extra) == "running", START_S, lambda: listed(extra))
    assert "Paris" in ask(extra).json()["choices"][0]["message"]["content"]


def test_a_model_that_cannot_start_says_why_and_goes(client: httpx.Client, stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    add(client, id="broken", path=str(tmp_path))
    wait_for(lambda: (listed(client, "broken") or {})["reason"], START_S, lambda: listed(client, "broken"))
    broken = listed(client, "broken")
    assert broken is not None
    assert broken["state"] in ("starting", "failed")
    assert "tokenizer" in broken["reason"]
    assert client.get("/health").status_code == 200
    remove(client, "broken")
    wait_for(lambda: listed(client, "broken") is None, STOP_S, lambda: listed(client, "broken"))
