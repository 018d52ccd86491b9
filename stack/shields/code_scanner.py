"""A scan of the code in messages, by a program of its own (code_scan.py) with bounds on its time and memory."""

import asyncio
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stack.context import Context
from stack.errors import EngineFailed
from stack.shield_config import CodeScannerShield
from stack.shields import code_scan
from stack.shields.verdict import PASSED, UNJUDGED, Said, Verdict

VERSION = f"bandit-{importlib.metadata.version('bandit')}"
SEVERITIES = ("low", "medium", "high")
# How many findings a message tells.
MOST_TOLD = 5
# Scans at once in this process: each of them has one core.
_SCANS = ThreadPoolExecutor(4, thread_name_prefix="code-scan")


async def judge(_: Context, shield: CodeScannerShield, said: Sequence[Said]) -> Verdict:
    """Scans the messages that are judged. Code that cannot be scanned, or not in time, is a violation."""
    judged = [one for one in said if one.is_judged]
    if not any(one.text.strip() for one in judged):
        return PASSED
    try:
        found = await asyncio.get_running_loop().run_in_executor(_SCANS, _scan, judged, shield.timeout_s)
    except subprocess.TimeoutExpired:
        return Verdict(True, UNJUDGED, f"The code could not be scanned within {shield.timeout_s:g} s.")
    return read(shield, found)


def read(shield: CodeScannerShield, found: dict[str, list[dict[str, Any]]]) -> Verdict:
    """The verdict of what a scan has found, with rules, lines and reasons."""
    least = SEVERITIES.index(shield.severity)
    bad = [one for one in found["findings"] if SEVERITIES.index(one["severity"]) >= least]
    if bad:
        bad.sort(key=lambda one: -SEVERITIES.index(one["severity"]))
        told = "; ".join(f"{one['rule']}, line {one['line']}: {one['why']}" for one in bad[:MOST_TOLD])
        more = f"; and {len(bad) - MOST_TOLD} more" if len(bad) > MOST_TOLD else ""
        return Verdict(True, bad[0]["rule"], f"The code is not safe: {told}{more}.")
    if found["unread"]:
        first = found["unread"][0]
        return Verdict(True, UNJUDGED, f"The Python in line {first['line']} cannot be scanned: {first['why']}.")
    return PASSED


def _scan(judged: list[Said], seconds: float) -> dict[str, list[dict[str, Any]]]:
    """Raises EngineFailed where the scanner fails, and TimeoutExpired, by which it is killed."""
    unfinished = [number for number, one in enumerate(judged) if one.is_unfinished]
    content = json.dumps({"texts": [one.text for one in judged], "unfinished": unfinished}).encode()
    command = [sys.executable, "-I", "-B", str(Path(code_scan.__file__)), str(seconds)]
    done = subprocess.run(command, input=content, capture_output=True, timeout=seconds, check=False)
    if done.returncode < 0:  # its bound of time on the processor
        raise subprocess.TimeoutExpired(command, seconds)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason is known"]
        raise EngineFailed(f"the code scanner failed: {last[0][:200]}")
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return found
