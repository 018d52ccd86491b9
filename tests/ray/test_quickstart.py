"""What the quickstart leaves behind when it is stopped before its end: nothing."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import local_stack
from stack import config
from tests.ray.conftest import wait_for


@pytest.mark.parametrize(
    ("number", "exit_status", "options"),
    [(signal.SIGINT, 130, ["--keep"]), (signal.SIGTERM, 143, []), (signal.SIGKILL, -9, ["--keep"])],
)
def test_nothing_is_left_running(tmp_path: Path, number: signal.Signals, exit_status: int, options: list[str]) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for folder in ("models", "packaged-data"):
        (home / folder).symlink_to(config.home() / folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "quickstart.log"
    with log.open("wb") as output:
        quickstart = subprocess.Popen(
            [sys.executable, "-m", "scripts.quickstart", "--port", str(port), *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"STACK_HOME": str(home)},
            cwd=local_stack.ROOT,
        )
    wait_for(lambda: "waiting for" in log.read_text() or quickstart.poll() is not None, 120, log.read_text)
    assert len(processes_of(home)) > 3
    quickstart.send_signal(number)
    assert quickstart.wait(timeout=60) == exit_status, log.read_text()
    wait_for(lambda: not processes_of(home), 60, lambda: processes_of(home))


def processes_of(home: Path) -> list[str]:
    """The command lines of all processes whose STACK_HOME is this folder."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if f"STACK_HOME={home}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # it has ended, or is another user's
                continue
    return [command for command in found if command]
