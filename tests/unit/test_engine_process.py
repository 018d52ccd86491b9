"""Processes of an engine that has lost whoever started it."""

import multiprocessing
import subprocess
import sys
from importlib.metadata import entry_points
from multiprocessing.synchronize import Event

import psutil
import pytest

from serve_apps.engine_process import end_with_parent

# It starts a child in this way, which would live for a minute, tells its number, and waits.
PARENT = """
import multiprocessing, sys, time
from tests.unit.test_engine_process import child
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    started = context.Event()
    context.Process(target=child, args=(started,)).start()
    assert started.wait(60)
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(60)
"""


def child(started: Event) -> None:
    end_with_parent()
    started.set()
    multiprocessing.Event().wait(60)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_child_ends_with_a_parent_that_is_killed(method: str) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, method], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        orphan = psutil.Process(int(parent.stdout.readline()))
        assert orphan.is_running()
        parent.kill()
        orphan.wait(20)


def test_a_process_that_has_no_such_parent_goes_on() -> None:
    code = "from serve_apps.engine_process import end_with_parent; end_with_parent(); print('here')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "here\n"


def test_vllm_finds_it_among_its_plugins() -> None:
    (plugin,) = entry_points(group="vllm.general_plugins", name="end_with_parent")
    assert plugin.load() is end_with_parent
