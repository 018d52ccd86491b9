"""Empties this node of what Ray Serve runs on it, before it is taken away: python -m scripts.drain_node --seconds N

Ray puts nothing more on the node. What serves here is started on other nodes, and ends here once it has given the
answers that it has begun; the proxy leaves its balancer and waits for those that go through it. Returns when nothing of
Serve's is left, or after N seconds, and then says what was left. Attempts at jobs are not waited for: they go on from
their last checkpoint on another node.
"""

import argparse
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

LOOK_S = 1.0
# How the names of Serve's actors begin that answer requests.
SERVING = ("SERVE_REPLICA::", "SERVE_PROXY_ACTOR-")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.drain_node", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=int, required=True, metavar="N", help="how long to wait at most")
    arguments = parser.parse_args()
    import ray

    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    node = ray.get_runtime_context().get_node_id()
    drain(node, arguments.seconds)
    left = wait_until_empty(lambda: serving_on(node), arguments.seconds)
    if left:
        print(f"after {arguments.seconds} s still on this node: {', '.join(left)}", file=sys.stderr)
    return 1 if left else 0


def drain(node: str, seconds: int) -> None:
    """Tells Ray that a node will be gone after so many seconds. Raises CalledProcessError where Ray refuses."""
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the node is taken away"]
    subprocess.run([*command, "--deadline-remaining-seconds", str(seconds)], check=True)


def serving_on(node: str) -> list[str]:
    """The names of Serve's actors on a node that answer requests.

    By the head's GCS: Ray's public list of actors is the dashboard's, which is on the head's loopback.
    """
    from ray._private.state import actors

    alive = [actor for actor in actors(actor_state_name="ALIVE").values() if actor["Address"]["NodeID"] == node]
    return sorted(name for actor in alive if (name := actor["Name"] or "").startswith(SERVING))


def wait_until_empty(
    serving: Callable[[], list[str]], seconds: float, sleep: Callable[[float], None] = time.sleep
) -> list[str]:
    """What of a node serves after so many seconds; nothing once nothing does."""
    for _ in range(max(1, int(seconds / LOOK_S))):
        if not (left := serving()):
            return []
        sleep(LOOK_S)
    return left


if __name__ == "__main__":
    sys.exit(main())
