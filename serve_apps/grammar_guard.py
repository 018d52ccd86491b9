"""Keeps grammars from an engine that would take it too long, or too much memory: they are compiled elsewhere first."""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_apps import grammar_compiler
from stack.errors import BadInput, Unavailable

MAX_REMEMBERED = 10_000
# How long a grammar that was too slow stays so: another time the machine may be less busy.
REMEMBER_SLOW_S = 60.0
PLACES = 4
WAIT_S = 10.0
# What starting takes at most, and one grammar, whose own clock rings before.
START_S = 60.0
ANSWER_S = grammar_compiler.SECONDS + 5.0


@dataclass(frozen=True)
class _Verdict:
    problem: str | None
    until: float = float("inf")


class GrammarGuard:
    """Tries what constrains an answer in a process of its own, which is started for the first one, or by `start`.

    At most PLACES are tried at once, others wait for at most WAIT_S. What is known is not tried again.
    """

    def __init__(self, model_folder: Path) -> None:
        self._folder = model_folder
        self._compiler: _Compiler | None = None
        self._starting = asyncio.Lock()
        self._places = asyncio.Semaphore(PLACES)
        self._known: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._trying: dict[bytes, asyncio.Task[_Verdict]] = {}

    async def start(self) -> None:
        """Starts the process, which takes seconds, so that the first request need not wait. Raises Unavailable."""
        await self._running()

    async def check_body(self, body: dict[str, Any]) -> None:
        """`check` of what constrains the answer of a request in OpenAI's shape, if something does."""
        form = body.get("response_format")
        if form is not None and form["type"] == "json_schema":
            await self.check({"json": form["json_schema"]["schema"]}, "response_format")
        if body.get("structured_outputs") is not None:
            await self.check(body["structured_outputs"], "structured_outputs")

    async def check(self, constraint: dict[str, Any], param: str = "structured_outputs") -> None:
        """Raises BadInput for one of json, regex, choice or grammar that is none or costs too much, naming `param`.

        Raises Unavailable where too many are tried at the moment.
        """
        ((kind, value),) = ((kind, value) for kind, value in constraint.items() if value is not None)
        if kind == "json_object":
            return
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=True)
        verdict = await self._verdict(kind, text)
        if verdict.problem is not None:
            raise BadInput(f"the {_WORDS.get(kind, kind)} {verdict.problem}", param=param)

    def close(self) -> None:
        """Ends the process."""
        for task in self._trying.values():
            task.cancel()
        if self._compiler is not None:
            self._compiler.close()

    async def _verdict(self, kind: str, text: str) -> _Verdict:
        key = hashlib.sha256(f"{kind}:{text}".encode()).digest()
        known = self._known.get(key)
        if known is not None and time.monotonic() < known.until:
            self._known.move_to_end(key)
            return known
        if key not in self._trying:
            task = asyncio.create_task(self._try(kind, text))
            self._trying[key] = task
            task.add_done_callback(lambda done: self._remember(key, done))
        # Whoever leaves does not take it from the others that wait for the same.
        return await asyncio.shield(self._trying[key])

    async def _try(self, kind: str, text: str) -> _Verdict:
        async with self._place():
            compiler = await self._running()
            try:
                problem = await compiler.problem_of(kind, text)
            except Unavailable:
                if not compiler.has_ended:
                    raise
                problem = await (await self._running()).problem_of(kind, text)
        slow = problem == grammar_compiler.TOO_SLOW
        return _Verdict(problem, time.monotonic() + REMEMBER_SLOW_S if slow else float("inf"))

    def _remember(self, key: bytes, task: asyncio.Task[_Verdict]) -> None:
        del self._trying[key]
        if not task.cancelled() and task.exception() is None:
            self._known[key] = task.result()
            if len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(WAIT_S):
                await self._places.acquire()
        except TimeoutError:
            raise Unavailable("too many grammars are compiled at the moment") from None
        try:
            yield
        finally:
            self._places.release()

    async def _running(self) -> "_Compiler":
        async with self._starting:
            if self._compiler is None or self._compiler.has_ended:
                self._compiler = _Compiler(self._folder)
                await self._compiler.ready()
        return self._compiler


_WORDS = {"json": "JSON schema", "regex": "regular expression", "choice": "list of choices"}
_PASSED_ON = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "STACK_HOME")


class _Compiler:
    """The process of serve_apps/grammar_compiler.py. A thread reads what it says."""

    def __init__(self, folder: Path) -> None:
        # Nothing secret: it reads what users wrote.
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serve_apps.grammar_compiler", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._loop = asyncio.get_running_loop()
        self._writing = threading.Lock()
        self._last_id = 0
        self.has_ended = False
        self._waiting: dict[int, asyncio.Future[str | None]] = {0: self._loop.create_future()}
        threading.Thread(target=self._read, name="grammar-guard", daemon=True).start()

    async def ready(self) -> None:
        await self._answer(0, START_S)

    async def problem_of(self, kind: str, text: str) -> str | None:
        self._last_id += 1
        number = self._last_id
        self._waiting[number] = self._loop.create_future()
        line = json.dumps({"id": number, "kind": kind, "value": text}).encode() + b"\n"
        try:
            await asyncio.to_thread(self._write, line)
        except OSError as error:
            self._waiting.pop(number).cancel()
            self.close()
            raise Unavailable("the process that compiles grammars has ended") from error
        return await self._answer(number, ANSWER_S)

    def close(self) -> None:
        self.has_ended = True
        self._process.kill()

    async def _answer(self, id: int, seconds: float) -> str | None:
        try:
            async with asyncio.timeout(seconds):
                return await self._waiting[id]
        except TimeoutError:
            self.close()
            raise Unavailable("the process that compiles grammars does not answer") from None
        finally:
            self._waiting.pop(id, None)

    def _write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with self._writing:
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _read(self) -> None:
        """Runs in a thread, to the end of the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            self._tell(self._settle, told["id"], told["problem"])
        self._process.wait()
        self._process.stdout.close()
        with self._writing, suppress(BrokenPipeError):  # of what was not sent any more
            self._process.stdin.close()
        self._tell(self._end)

    def _tell(self, function: Any, *args: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def _settle(self, id: int, problem: str | None) -> None:
        waiting = self._waiting.get(id)
        if waiting is not None and not waiting.done():
            waiting.set_result(problem)

    def _end(self) -> None:
        self.has_ended = True
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(Unavailable("the process that compiles grammars has ended"))
