"""Runs tests/ray on one stack: python -m tests.shared_stack [--all] [--nodes N] [FILE…]

Two files at a time, as a job has one process at work for most of its time; then, one by one, those that kill or
measure what others use: they are marked as `alone`. Those that are marked as `long` only run with --all.

With --nodes the stack is on a Ray of so many nodes, and tests/nodes runs besides, which needs several.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests import running_stack, stack_on_nodes

SIDE_BY_SIDE = ("--numprocesses", "2", "--dist", "loadfile")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.shared_stack", description=__doc__)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("files", nargs="*", metavar="FILE")
    given = parser.parse_args()
    shortly = "" if given.all else " and not long"
    runs = (("-m", f"not alone{shortly}", *SIDE_BY_SIDE), ("-m", f"alone{shortly}"))
    files = given.files or (["tests/ray", "tests/nodes"] if given.nodes > 1 else ["tests/ray"])
    left_out = stack_on_nodes.ONE_NODE if given.nodes > 1 else ()
    print("starting a stack for the tests (one to three minutes)", flush=True)
    with tempfile.TemporaryDirectory(prefix="stack-tests-") as name:
        folder = Path(name)
        several = stack_on_nodes.started(folder, given.nodes)
        with several if given.nodes > 1 else running_stack.started(folder) as stack:
            environment = os.environ | {running_stack.SHARED: stack.described()}
            command = [sys.executable, "-m", "pytest", *files, "--durations", "25"]
            command += [f"--deselect={test}" for test in left_out]
            statuses = [subprocess.run((*command, *run), env=environment, check=False).returncode for run in runs]
    # Of the files that were asked for, all may be of one sort.
    return max(status for status in statuses if status != pytest.ExitCode.NO_TESTS_COLLECTED)


if __name__ == "__main__":
    sys.exit(main())
