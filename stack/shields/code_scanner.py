"""A scan of the code in messages, by a program of its own (code_scan.py) with bounds on its time and memory."""

import asyncio
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stack.context import Context
from stack.errors import EngineFailed
from stack.shield_config import CodeScannerShield
from stack.shields import code_scan
from stack.shields.text import unmasked
from stack.shields.verdict import PASSED, UNJUDGED, Said, Verdict

VERSION = "+".join(f"{name}-{importlib.metadata.version(name)}" for name in ("bandit", "detect-secrets"))
SEVERITIES = ("low", "medium", "high")
# How many findings a message tells.
MOST_TOLD = 5
# What Llama models write before a call that is code alone.
PYTHON_TAG = "<|python_tag|>"
# How deep texts of JSON within texts of JSON are read: a call's arguments may be one, and the code in them another.
JSON_DEPTH = 3
# What stands between two quotes of JSON, whichever of them begins a text: one quote more before them hides nothing.
_JSON_TEXT = re.compile(r'(?:[^"\\]+|\\u[0-9a-fA-F]{4}|\\["\\/bfnrt])+')
_VALUE = re.compile(r'"\s{0,9}:\s{0,9}"$')
# Scans at once in this process: each of them has one core.
_SCANS = ThreadPoolExecutor(4, thread_name_prefix="code-scan")


async def judge(_: Context, shield: CodeScannerShield, said: Sequence[Said]) -> Verdict:
    """Scans the messages that are judged. Code that cannot be scanned, or not in time, is a violation."""
    judged = [one for one in said if one.is_judged]
    if not any(one.text.strip() for one in judged):
        return PASSED
    try:
        async with asyncio.timeout(shield.timeout_s + 1):  # it may have waited for a thread, too
            found = await asyncio.get_running_loop().run_in_executor(_SCANS, _scan, judged, shield.timeout_s)
    except (subprocess.TimeoutExpired, TimeoutError):
        return Verdict(True, UNJUDGED, f"The code could not be scanned within {shield.timeout_s:g} s.")
    return read(shield, found)


def read(shield: CodeScannerShield, found: dict[str, list[dict[str, Any]]]) -> Verdict:
    """The verdict of what a scan has found, with rules, lines and reasons."""
    least = SEVERITIES.index(shield.severity)
    bad = [one for one in found["findings"] if SEVERITIES.index(one["severity"]) >= least]
    bad = list({(one["rule"], one["line"]): one for one in bad}.values())  # of several readings
    if bad:
        bad.sort(key=lambda one: -SEVERITIES.index(one["severity"]))
        told = "; ".join(f"{one['rule']}, line {one['line']}: {one['why']}" for one in bad[:MOST_TOLD])
        more = f"; and {len(bad) - MOST_TOLD} more" if len(bad) > MOST_TOLD else ""
        return Verdict(True, bad[0]["rule"], f"The code is not safe: {told}{more}.")
    if found["unread"]:
        first = found["unread"][0]
        return Verdict(True, UNJUDGED, f"The Python in line {first['line']} cannot be scanned: {first['why']}.")
    return PASSED


def readings(text: str) -> list[str]:
    """A text as it stands, without its masks, and the texts of JSON in it, such as code that a tool is called with."""
    found: dict[str, None] = {}
    level = [text.replace(PYTHON_TAG, ""), *text.split(PYTHON_TAG)[1:]]
    for _ in range(JSON_DEPTH + 1):
        level = list(dict.fromkeys(seen for one in level for seen in (one, unmasked(one))))
        found |= dict.fromkeys(level)
        level = [inner for one in level for inner in _json_texts(one)]
    return list(found)


def _json_texts(text: str) -> Iterator[str]:
    """The texts of JSON that are values of objects or have lines, of JSON that may be within words or break off."""
    for run in _JSON_TEXT.finditer(text):
        is_value = _VALUE.search(text, max(0, run.start() - 20), run.start())
        if is_value or "\\" in run[0]:
            inner: str = json.loads(f'"{run[0]}"', strict=False)
            if is_value or inner.count("\n") > run[0].count("\n"):
                yield inner


def _scan(judged: list[Said], seconds: float) -> dict[str, list[dict[str, Any]]]:
    """Raises EngineFailed where the scanner fails, and TimeoutExpired, by which it is killed."""
    texts = [(text, one.is_unfinished) for one in judged for text in readings(one.text)]
    unfinished = [number for number, (_, is_unfinished) in enumerate(texts) if is_unfinished]
    content = json.dumps({"texts": [text for text, _ in texts], "unfinished": unfinished}).encode()
    command = [sys.executable, "-I", "-B", str(Path(code_scan.__file__)), str(seconds)]
    done = subprocess.run(command, input=content, capture_output=True, timeout=seconds, check=False)
    if done.returncode < 0:  # its bound of time on the processor
        raise subprocess.TimeoutExpired(command, seconds)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason is known"]
        raise EngineFailed(f"the code scanner failed: {last[0][:200]}")
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return found
