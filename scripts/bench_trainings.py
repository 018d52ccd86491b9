"""What the benches of trainings have in common: jobs on a Ray of their own, as `ray job submit` starts them."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts import local_stack
from scripts.bench_servers import BenchFailed, local_model, prepared_home
from stack.config import home

RUN_S = 3_600.0


def prepared_data(name: str) -> Path:
    """The folder of prepared data. Raises BenchFailed unless they and the model are there."""
    source = home() / "packaged-data" / name
    if not source.is_dir() or not (local_model().folder / "config.json").is_file():
        raise BenchFailed(f"the model or the data are not in {home()}: run scripts/setup")
    return source


def enter_home(folder: Path) -> Path:
    """A new home folder with the models that are prepared already, of this process too and of the Ray it starts."""
    made = prepared_home(folder)
    os.environ |= {
        "STACK_HOME": str(made),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_worker_niceness": "0",  # Ray's workers would give way to whatever else runs, and scripts would not
    }
    os.environ.pop("STACK_CONFIG", None)
    return made


@contextmanager
def running_ray() -> Iterator[str]:
    """A Ray of this process's own, as scripts/serve starts it, without any application. Its job API's address."""
    local_stack.wait_for_agent_port(lambda: False, say)
    say("starting Ray")
    address = local_stack.start_ray()
    import ray

    try:
        yield address
    finally:
        ray.shutdown()


def submission(address: str, module: str, request: Path) -> list[str]:
    """The command that runs a job by its driver, from a file with its request, and waits for its end."""
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", address, "--"]
    return [*command, "python", "-m", module, "--config", str(request)]


def run(name: str, command: list[str], log: Path) -> None:
    """Runs the command of a training to its end. Raises BenchFailed if it fails."""
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=local_stack.ROOT, check=False, timeout=RUN_S
            )
        except subprocess.TimeoutExpired as error:
            raise BenchFailed(f"{name} has not ended after {RUN_S:.0f} s: {_end(log)}") from error
    if done.returncode:
        raise BenchFailed(f"{name} failed: {_end(log)}")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-2_000:].strip()
