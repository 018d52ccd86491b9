"""Whether Ray is locked on nodes that join later, and on those without a gateway, as those of GPUs.

A gateway that starts looks at its own node and the head alone, as it may wait for no others. So the job supervisor asks
each node, by a task of Ray's there.
"""

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_apps.address import addresses_here, is_open
from serve_apps.locks import require_locked
from stack.errors import Unauthorized

logger = logging.getLogger("ray.serve")

# How long a node is waited for, which starts a process for it: one that does not answer is asked again at once.
ANSWER_S = 60.0
# … and one that has answered after this time. It is more than after what an autoscaler takes a node for idle.
AGAIN_S = 3600.0


class NodeLocks:
    """The nodes that were looked at. `ask` gives the addresses of the interfaces of those nodes that answer, by id."""

    def __init__(
        self,
        firewalled: bool,
        ask: Callable[[Sequence[str]], Mapping[str, Collection[str]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._firewalled = firewalled
        self._ask = ask
        self._clock = clock
        self._looked_at: dict[str, float] = {}
        self._open: dict[str, str] = {}

    def look(self, nodes: Mapping[str, str]) -> str | None:
        """Looks at those of Ray's living nodes, addresses by id, whose turn it is.

        Returns what everybody may read of those that are not locked, if there are any: the log names them. Blocks for
        up to ANSWER_S.
        """
        if not is_open(nodes.values()):
            nodes = {}
        self._looked_at = {node: at for node, at in self._looked_at.items() if node in nodes}
        self._open = {node: why for node, why in self._open.items() if node in nodes}
        due = [node for node in nodes if self._clock() - self._looked_at.get(node, -AGAIN_S) >= AGAIN_S]
        for node, addresses in self._addresses(due).items():
            self._looked_at[node] = self._clock()
            self._look_at(node, nodes[node], addresses)
        if not self._open:
            return None
        return (
            f"Ray is not locked on {len(self._open)} of its nodes, which the log of the job supervisor names; see "
            "docs/clusters.md, `Ray is locked`"
        )

    def _addresses(self, nodes: Sequence[str]) -> Mapping[str, Collection[str]]:
        if self._firewalled:
            return dict.fromkeys(nodes, ())  # whatever else they have is closed
        return self._ask(nodes) if nodes else {}

    def _look_at(self, node: str, address: str, addresses: Collection[str]) -> None:
        try:
            require_locked(os.environ, [address], [], addresses, firewalled=self._firewalled)
            self._open.pop(node, None)
        except Unauthorized as error:
            self._open[node] = error.message
            logger.warning("Ray is not locked on the node %s at %s: %s", node, address, error.message)


def addresses_of(nodes: Sequence[str]) -> dict[str, list[str]]:
    """The addresses of the interfaces of these nodes, by id. What a node does not tell in ANSWER_S is logged."""
    asking = ray.remote(num_cpus=0, max_retries=0)(addresses_here)
    there = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes}
    asked = {asking.options(scheduling_strategy=on_it).remote(): node for node, on_it in there.items()}
    answered, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    for one in late:
        logger.warning("the node %s has not said in %g s at which addresses it listens", asked[one], ANSWER_S)
        ray.cancel(one, force=True)
    told: dict[str, list[str]] = {}
    for one in answered:
        try:
            told[asked[one]] = ray.get(one)
        except RayError as error:  # it may be gone by now
            logger.warning("the node %s cannot say at which addresses it listens: %s", asked[one], error)
    return told
