"""Runs tests/ray on one stack: python -m tests.shared_stack [--all]

Two files at a time, as a job has one process at work for most of its time; then, one by one, those that kill or
measure what others use: they are marked as `alone`. Those that are marked as `long` only run with --all.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.running_stack import SHARED, started

SIDE_BY_SIDE = ("--numprocesses", "2", "--dist", "loadfile")


def main(arguments: list[str]) -> int:
    shortly = "" if "--all" in arguments else " and not long"
    runs = (("-m", f"not alone{shortly}", *SIDE_BY_SIDE), ("-m", f"alone{shortly}"))
    print("starting a stack for the tests (one to three minutes)", flush=True)
    with tempfile.TemporaryDirectory(prefix="stack-tests-") as folder, started(Path(folder)) as stack:
        environment = os.environ | {SHARED: stack.described()}
        pytest = (sys.executable, "-m", "pytest", "tests/ray", "--durations", "25")
        statuses = [subprocess.run((*pytest, *run), env=environment, check=False).returncode for run in runs]
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
