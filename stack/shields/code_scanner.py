"""A scan of the code in messages, by processes of their own (code_scan.py) with bounds on their time and memory."""

import asyncio
import atexit
import importlib.metadata
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    except TimeoutError:
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
    """Raises EngineFailed where the scanner fails, and TimeoutError where a scan is ended by its bounds."""
    texts = [(text, one.is_unfinished) for one in judged for text in readings(one.text)]
    unfinished = [number for number, (_, is_unfinished) in enumerate(texts) if is_unfinished]
    content = json.dumps({"texts": [text for text, _ in texts], "unfinished": unfinished}).encode()
    answer = _SCANNER.ask(content, seconds) or _SCANNER.ask(content, seconds)
    if not answer:
        raise EngineFailed("the code scanner ends before it scans")
    if answer == code_scan.BEGUN:
        raise TimeoutError
    try:
        found: dict[str, list[dict[str, Any]]] = json.loads(answer)
    except ValueError as error:
        raise EngineFailed(f"the code scanner failed: {answer.strip().splitlines()[-1][:200]}") from error
    return found


class _Scanner:
    """The process that forks for each scan, which is started when it is first asked, and anew when it has ended.

    It ends with this process, however that ends, since it then finds its socket closed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # The process, and the socket by which it is asked.
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def ask(self, content: bytes, seconds: float) -> str:
        """What a scan answers (see code_scan.py); nothing if the process ended before. Raises TimeoutError."""
        ours, theirs = socket.socketpair()
        with ours:
            # A file, of which the scan reads what it will: a pipe would have to be filled while it reads.
            with theirs, tempfile.TemporaryFile(buffering=0) as given:
                given.write(content)
                given.seek(0)
                process = self._request(seconds, [given.fileno(), theirs.fileno()])
            ours.settimeout(seconds)
            with ours.makefile("rb") as read:
                answer = read.read().decode(errors="replace")
        if not answer:  # while a process is being killed, its socket may take one request more, and lose it
            process.kill()
            process.wait()
        return answer

    def close(self) -> None:
        """Ends the process, and waits for it."""
        with self._lock:
            self._end()

    def _request(self, seconds: float, files: list[int]) -> subprocess.Popen[bytes]:
        """Has the process fork for a scan. Gives the process."""
        message = [code_scan.SECONDS.pack(seconds)]
        with self._lock:
            if self._running is not None:
                process, requests = self._running
                try:
                    socket.send_fds(requests, message, files)
                    return process
                except ConnectionError:  # it has ended
                    self._end()
            process, requests = self._running = _started()
            socket.send_fds(requests, message, files)
            return process

    def _end(self) -> None:
        if self._running is not None:
            process, requests = self._running
            self._running = None
            requests.close()
            process.kill()
            process.wait()


def _started() -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-I", code_scan.__file__]
        # Its own session: what ends it is its socket, and no key that is pressed in this one's terminal.
        process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, start_new_session=True)
    return process, ours


_SCANNER = _Scanner()
atexit.register(_SCANNER.close)
