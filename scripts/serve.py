"""Serves the stack on this machine, on a Ray of its own, until Ctrl-C."""

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

from scripts import local_stack
from stack.config import home
from stack.errors import StackError
from stack.heads import HEAD
from stack.serve_controller import NAME as RAY_SERVE
from stack.shared_state import require_shared

LOOK_S = 5.0
LOST_S = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/serve", description=__doc__)
    parser.add_argument(
        "--config", type=Path, default=local_stack.CONFIG, metavar="FILE",
        help="a Serve config file (default: serve_apps/local.yaml)",
    )  # fmt: skip
    parser.add_argument("--port", type=int, help="the gateway's port (default: the config's, 8321)")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="how long the start may take (600)")
    parser.add_argument(
        "--stop-with-stdin", action="store_true",
        help="stop too when the standard input ends, unless it holds the line `keep`",
    )  # fmt: skip
    arguments = parser.parse_args()
    try:
        file = local_stack.read_serve_file(arguments.config.expanduser(), arguments.port)
        with local_stack.only_stack(home()):
            return serve(arguments, file)
    except (local_stack.StartFailed, StackError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1


def serve(arguments: argparse.Namespace, file: local_stack.ServeFile) -> int:
    require_shared(file.config, nodes=1)
    local_stack.require_keys(file)
    for model in file.config.all_models:
        if not any((model.folder / name).is_file() for name in ("config.json", HEAD)):
            raise local_stack.StartFailed(f"the model {model.id} is not in {model.folder}: run scripts/setup")
    local_stack.require_free(file.host, file.port)
    for folder in file.config.data_folders:
        folder.mkdir(parents=True, exist_ok=True)
    # Drivers that are submitted by hand run under this Ray and find the same config and home folder by these.
    os.environ["STACK_CONFIG"] = str(arguments.config.expanduser().resolve())
    os.environ["STACK_HOME"] = str(home())
    stop = threading.Event()
    started = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    if arguments.stop_with_stdin:
        threading.Thread(target=set_at_end_of_input, args=[stop], daemon=True).start()
    local_stack.wait_for_agent_port(stop.is_set, say)
    say("starting Ray")
    ray_address = local_stack.start_ray()
    for number in (signal.SIGINT, signal.SIGTERM):  # Ray has put its own in place
        signal.signal(number, lambda *_: stop.set())
    try:
        if not stop.is_set():
            say("deploying the applications")
            local_stack.deploy(file.document, ray_address, stop.is_set)
        said = ""

        def say_once(waiting: str) -> None:
            nonlocal said
            if waiting != said:
                said = waiting
                say(f"waiting for {waiting}")

        local_stack.wait_until_ready(file.url, arguments.timeout, stop.is_set, say_once)
        if not stop.is_set():
            say(f"ready after {time.monotonic() - started:.0f} s")
            jobs = f"RAY_AUTH_MODE=token ray job list --address {ray_address}"
            print(f"  gateway  {file.url}   (routes: {file.url}/docs)", flush=True)
            print(f"  Ray      {ray_address}   (jobs: {jobs})", flush=True)
            print(f"  home     {home()}", flush=True)
            print("Stop it with Ctrl-C.", flush=True)
        watch_over(file.url, stop)
    finally:
        say("stopping")
        import ray

        ray.shutdown()
    return 0


def watch_over(url: str, stop: threading.Event, look_s: float = LOOK_S, lost_s: float = LOST_S) -> None:
    """Waits for the stop. Raises StartFailed once the stack has not answered for `lost_s` seconds.

    Its /health asks Ray too, and says so where that is silent. Serve restarts what dies of the gateway, in less time
    than that, and a stack that waits for one of its models still answers.
    """
    seen = time.monotonic()
    while not stop.wait(look_s):
        running = local_stack.running_stack(url, just_deployed=True)
        if running is not None and RAY_SERVE not in running.waiting_for:
            seen = time.monotonic()
        elif time.monotonic() - seen >= lost_s:
            raise local_stack.StartFailed(
                f"Ray or the gateway at {url} has died: it has not answered for {lost_s:.0f} s"
            )


def set_at_end_of_input(stop: threading.Event) -> None:
    if sys.stdin.buffer.read() != b"keep\n":
        stop.set()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
