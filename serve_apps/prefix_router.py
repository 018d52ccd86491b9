"""Which replica a request goes to: one that has answered another request with the same beginning, if it is not busy.

An engine keeps what it has computed of a prompt, and computes only what is new of the next one that begins alike: the
same system prompt, or the same conversation, a turn later. This is a request router of Ray Serve's, and runs in each
gateway, which remembers the requests that it has sent itself. ray.serve.llm's own PrefixCacheAffinityRouter does the
same with one memory for all, but it would load vLLM into the gateway, and asks an actor three times for each request.
"""

import random
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from ray.serve.request_router import (
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

# Prompts are compared in blocks of so many characters, at most so many blocks of each.
BLOCK = 256
MAX_BLOCKS = 128
# How many beginnings are remembered: those that were used last.
REMEMBERED = 100_000


class PrefixRouter(LocalityMixin, MultiplexMixin, RequestRouter):
    """Prefers the replica that has seen most of a prompt's beginning. Otherwise the less busy one of two at random.

    A replica that works on more than `slack` requests more than the least busy one is not preferred. Ray Serve
    hands this module on as a copy, so nothing here is to be changed from outside.
    """

    def initialize_state(self, slack: int = 16, remembered: int = REMEMBERED) -> None:  # type: ignore[override]  # as Ray means it
        self._slack = slack
        self._remembered = remembered
        self._homes: OrderedDict[int, ReplicaID] = OrderedDict()
        self._loads: dict[ReplicaID, int] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the best first, each of which is asked before the next one whether it has room."""
        ids = self._candidates(pending_request)
        replicas = [replica for replica in candidate_replicas if replica.replica_id in ids]
        if not replicas:
            return []
        others = random.sample(replicas, min(2, len(replicas)))
        home = self._home(pending_request, ids) if pending_request is not None else None
        return [[replica for replica in replicas if replica.replica_id == home], others] if home else [others]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:  # noqa: ARG002
        """Remembers where a prompt went, for the next ones that begin like it."""
        for beginning in beginnings(pending_request):
            self._homes[beginning] = replica_id
            self._homes.move_to_end(beginning)
        while len(self._homes) > self._remembered:
            self._homes.popitem(last=False)

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        """A replica has told how many requests it works on, of all gateways."""
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        self._loads[replica_id] = num_ongoing_requests

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        self._loads[replica_id] = max(0, self._loads.get(replica_id, 0) - 1)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Forgets the loads of replicas that are gone. Where they were at home is overwritten in time."""
        super().update_replicas(replicas)
        self._loads = {one: load for one, load in self._loads.items() if one in self.curr_replicas}

    def _candidates(self, pending_request: PendingRequest | None) -> set[ReplicaID]:
        """Those that have loaded the request's adapter, if it is for one; else those that Serve would ask first."""
        if pending_request is not None and pending_request.metadata.multiplexed_model_id:
            return set(self.apply_multiplex_routing(pending_request=pending_request))
        return set(self.apply_locality_routing(pending_request=pending_request))

    def _home(self, pending_request: PendingRequest, ids: set[ReplicaID]) -> ReplicaID | None:
        homes = (self._homes.get(beginning) for beginning in reversed(list(beginnings(pending_request))))
        home = next((one for one in homes if one in ids), None)
        if home is None:
            return None
        least = min(self._loads.get(one, 0) for one in ids)
        return home if self._loads.get(home, 0) - least <= self._slack else None


def beginnings(request: PendingRequest) -> Iterator[int]:
    """Numbers that stand for the beginnings of a request's prompt, the shortest first, and for its adapter.

    Each is one block longer than the one before it. A rest that fills no block is left out, unless it is all there is.
    """
    text = prompt_of(request.args)
    if not text:
        return
    known = hash(request.metadata.multiplexed_model_id)
    end = max(1, min(len(text) // BLOCK, MAX_BLOCKS)) * BLOCK
    for start in range(0, end, BLOCK):
        known = hash((known, text[start : start + BLOCK]))
        yield known


def prompt_of(args: list[Any]) -> str:
    """The beginning of the prompt in the body of an OpenAI request, as text that is alike where the prompts are."""
    body = next((arg for arg in args if isinstance(arg, dict)), {})
    parts: list[str] = []
    size = 0
    prompt = body.get("messages") or body.get("prompt") or ""
    for part in prompt if isinstance(prompt, list) else [prompt]:
        parts.append(part if isinstance(part, str) else repr(part))
        size += len(parts[-1])
        if size > BLOCK * MAX_BLOCKS:
            break
    return "\n".join(parts)
