"""What the quickstart leaves behind when it is stopped before its end: nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import local_stack
from tests.running_stack import free_port, prepared_home, processes_of, wait_for


@pytest.mark.parametrize(
    ("number", "exit_status", "options"),
    [(signal.SIGINT, 130, ["--keep"]), (signal.SIGTERM, 143, []), (signal.SIGKILL, -9, ["--keep"])],
)
def test_nothing_is_left_running(tmp_path: Path, number: signal.Signals, exit_status: int, options: list[str]) -> None:
    home = prepared_home(tmp_path)
    log = tmp_path / "quickstart.log"
    with log.open("wb") as output:
        quickstart = subprocess.Popen(
            [sys.executable, "-m", "scripts.quickstart", "--port", str(free_port()), *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"STACK_HOME": str(home)},
            cwd=local_stack.ROOT,
            # Where the tests run in the background, SIGINT is ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        wait_for(
            lambda: "waiting for the gateway" in log.read_text() or quickstart.poll() is not None, 120, log.read_text
        )
        assert len(processes_of(home)) > 3
        quickstart.send_signal(number)
        assert quickstart.wait(timeout=60) == exit_status, log.read_text()
        wait_for(lambda: not processes_of(home), 60, lambda: processes_of(home))
    finally:
        quickstart.kill()  # one that goes on would have the machine of all tests after this one
