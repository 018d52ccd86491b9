"""Serves a Serve config file that is not the stack's on a Ray of its own, until the standard input ends.

scripts/bench starts it for what the stack is compared with. It prints a line once PATH answers with 200.
"""

import argparse
import sys
import threading
import time
from pathlib import Path

import httpx
import yaml

from scripts import local_stack

LOOK_S = 0.5


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts.bench_peer", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("url")
    arguments = parser.parse_args()
    ended = threading.Event()
    threading.Thread(target=set_at_end_of_input, args=[ended], daemon=True).start()
    local_stack.wait_for_agent_port(ended.is_set, print)
    ray_address = local_stack.start_ray()
    try:
        local_stack.deploy(yaml.safe_load(arguments.file.read_text()), ray_address, ended.is_set)
        wait_for_answer(arguments.url, ended)
        print("ready", flush=True)
        ended.wait()
    except local_stack.StartFailed as error:
        print(f"bench_peer: {error}", file=sys.stderr)
        return 1
    finally:
        import ray

        ray.shutdown()
    return 0


def wait_for_answer(url: str, ended: threading.Event) -> None:
    """Waits until an address answers with 200. Raises StartFailed if an application cannot start."""
    from ray import serve

    while not ended.is_set():
        for name, application in serve.status().applications.items():
            if application.status == "DEPLOY_FAILED":
                raise local_stack.StartFailed(f"the application {name!r} cannot start: {application.message.strip()}")
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(LOOK_S)


def set_at_end_of_input(ended: threading.Event) -> None:
    sys.stdin.buffer.read()
    ended.set()


if __name__ == "__main__":
    sys.exit(main())
