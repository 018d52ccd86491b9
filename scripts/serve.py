"""Serves the stack on this machine, on a Ray of its own, until Ctrl-C."""

import argparse
import signal
import sys
import threading
import time
from pathlib import Path

from scripts import local_stack
from stack.config import Config, home
from stack.errors import StackError


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/serve", description=__doc__)
    parser.add_argument(
        "--config", type=Path, default=local_stack.CONFIG, metavar="FILE",
        help="a Serve config file (default: serve_apps/local.yaml)",
    )  # fmt: skip
    parser.add_argument("--port", type=int, help="the gateway's port (default: the config's, 8321)")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="how long the start may take (600)")
    parser.add_argument("--stop-with-stdin", action="store_true", help="stop too when the standard input is closed")
    arguments = parser.parse_args()
    try:
        return serve(arguments)
    except (local_stack.StartFailed, StackError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1


def serve(arguments: argparse.Namespace) -> int:
    config = Config.from_file(arguments.config)
    for model in config.models:
        if not (model.folder / "config.json").is_file():
            raise local_stack.StartFailed(f"the model {model.id} is not in {model.folder}: run scripts/setup")
    host, port = local_stack.gateway_address(arguments.config, arguments.port)
    local_stack.require_free(host, port)
    for folder in config.data_folders:
        folder.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    started = time.monotonic()
    say("starting Ray")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    ray_address = local_stack.start_ray()
    for number in (signal.SIGINT, signal.SIGTERM):  # Ray has put its own in place
        signal.signal(number, lambda *_: stop.set())
    if arguments.stop_with_stdin:
        threading.Thread(target=set_at_end_of_input, args=[stop], daemon=True).start()
    try:
        say("deploying the applications")
        local_stack.deploy(arguments.config, arguments.port, ray_address)
        url = f"http://{host}:{port}"
        said = ""

        def say_once(waiting: str) -> None:
            nonlocal said
            if waiting != said:
                said = waiting
                say(f"waiting for {waiting}")

        local_stack.wait_until_ready(url, arguments.timeout, stop.is_set, say_once)
        if not stop.is_set():
            say(f"ready after {time.monotonic() - started:.0f} s")
            print(f"  gateway  {url}   (routes: {url}/docs)", flush=True)
            print(f"  Ray      {ray_address}   (jobs: ray job list --address {ray_address})", flush=True)
            print(f"  home     {home()}", flush=True)
            print("Stop it with Ctrl-C.", flush=True)
        stop.wait()
    finally:
        say("stopping")
        import ray

        ray.shutdown()
    return 0


def set_at_end_of_input(stop: threading.Event) -> None:
    sys.stdin.buffer.read()
    stop.set()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
