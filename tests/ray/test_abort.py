"""A client that leaves aborts its generation, seen in the engine's own counters."""

import re
from pathlib import Path

import httpx
import pytest

from tests.running_stack import MODEL, Stack, wait_for

pytestmark = pytest.mark.alone

TOKENS = 1_900


@pytest.mark.parametrize(
    ("path", "length"),
    [
        ("/v1/chat/completions", {"max_tokens": TOKENS, "ignore_eos": True}),
        ("/inference/chat_completion", {"sampling_params": {"strategy": "greedy", "max_tokens": TOKENS}}),
    ],
    ids=["openai", "llama stack"],
)
def test_leaving_a_stream_ends_the_generation(
    stack: Stack, client: httpx.Client, path: str, length: dict[str, object]
) -> None:
    counters = Counters(stack)
    before = counters.generated_tokens()
    # Asked to repeat itself, the small model goes on until it is stopped.
    story = {"role": "user", "content": "Write the numbers from 1 to 1000, one after the other: 1, 2, 3,"}
    body = {"model": MODEL, "messages": [story], "stream": True, **length}
    with client.stream("POST", path, json=body) as reply:
        lines = reply.iter_lines()
        for _ in range(8):
            next(lines)

    wait_for(lambda: counters.show_idleness(client), 60)
    # What was read, and less than the engine makes of one stream in a few seconds.
    assert counters.generated_tokens() - before < 100


class Counters:
    """vLLM's counters, as Ray exports them."""

    def __init__(self, stack: Stack) -> None:
        token = (Path.home() / ".ray" / "auth_token").read_text().strip()
        found = httpx.get(f"{stack.ray_address}/api/prometheus/sd", headers={"Authorization": f"Bearer {token}"})
        self._targets = [target for group in found.raise_for_status().json() for target in group["targets"]]

    def generated_tokens(self) -> float:
        return self._sum("ray_vllm_generation_tokens_total")

    def running_requests(self) -> float:
        return self._sum("ray_vllm_num_requests_running")

    def ended_requests(self, reason: str) -> float:
        return self._sum("ray_vllm_request_success_total", f'finished_reason="{reason}"')

    def show_idleness(self, client: httpx.Client) -> bool:
        """Whether nothing is under way once a short request has been answered. An abort comes a moment after its client
        has left, and the engine writes the counters at its steps alone: once they show the end of the short request,
        they show all that came before."""
        ended = self.ended_requests("length")
        short = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=short).status_code == 200
        wait_for(lambda: self.ended_requests("length") > ended, 60)
        return self.running_requests() == 0

    def _sum(self, name: str, label: str = "") -> float:
        pattern = re.compile(rf"^{name}{{[^}}]*{re.escape(label)}[^}}]*}} (\S+)$", re.MULTILINE)
        texts = (httpx.get(f"http://{target}/metrics").text for target in self._targets)
        return sum(float(value) for text in texts for value in pattern.findall(text))
