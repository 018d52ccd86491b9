"""The tool that runs Python: cells in a sandbox, which keeps what they define until the turn ends."""

import asyncio
import base64
import logging
import mimetypes
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import ParamSpec, TypeVar
from urllib.parse import quote

from stack.agentic_system import sandbox, sandbox_files, sandbox_slots
from stack.agentic_system.bubblewrap import CannotStart
from stack.agentic_system.sandbox import Ended, Limits, Sandbox
from stack.agentic_system.sandbox_files import Mark
from stack.agentic_system.sandbox_slots import NoneFree
from stack.agentic_system.tools.tool import Call, File, Output, ToolFailed, cut
from stack.api.messages import Attachment
from stack.errors import BadInput
from stack.prompt_formats import Tool as Definition
from stack.prompt_formats import builtin_tool

# Of one cell; the time limit of calls is above it, so that what is lost with a sandbox can be told.
CELL_S = 30.0
# How many sandboxes run at once on a machine, where nothing else is said.
AT_ONCE = 16
# Of the files that a call gives back.
MAX_FILES = 10
MAX_FILE_BYTES = 4 * 2**20
MAX_REASON = 300
MAX_FILES_BYTES = 8 * 2**20
# What the model is told of them, in characters.
MAX_TOLD = 1_000
GONE = "What earlier calls defined, and their files, are gone."
_PATH = re.compile(r"(?<![\w.])/[^\s:;,'\")]+")
LOST = f"The interpreter was started anew. {GONE}"

P = ParamSpec("P")
T = TypeVar("T")

_LOG = logging.getLogger(__name__)


@cache
def require() -> None:
    """Raises BadInput where the tool cannot run on this machine: it never runs but in a sandbox.

    Once it could, this is not looked at again. It blocks, in a thread that runs no event loop.
    """
    try:
        asyncio.run(sandbox.check())
    except CannotStart as error:
        raise BadInput(f"the tool code_interpreter cannot be used here: {error}", param="tools") from error


class CodeInterpreter:
    """Runs Python code for one turn.

    `files` are put where cells run. `seconds` is the time that each cell has; a sandbox is waited for half of that,
    where `at_once` run on the machine. `is_resumed` says that the turn has had an interpreter before, whose state is
    gone.
    """

    name = "code_interpreter"
    is_idempotent = True  # it reaches nothing outside of its sandbox

    def __init__(
        self,
        files: Sequence[File] = (),
        *,
        seconds: float = CELL_S,
        limits: Limits = Limits(),  # noqa: B008
        at_once: int = AT_ONCE,
        is_resumed: bool = False,
    ) -> None:
        self._files = tuple(files)
        self._seconds = seconds
        self._limits = limits
        self._at_once = at_once
        self._is_lost = is_resumed
        self._sandbox: Sandbox | None = None
        self._slot = ExitStack()  # held as long as the sandbox is there
        # One cell at a time: they share their state.
        self.turn = asyncio.Lock()

    def definition(self) -> Definition:
        return builtin_tool(self.name)

    async def run(self, call: Call) -> Output:
        """Runs a cell. What went wrong in it is told to the model like what it prints."""
        notes = [LOST] if self._is_lost and self._sandbox is None else []
        running = self._sandbox or await self._start()
        before = await _in_thread(sandbox_files.marks, running.folder)
        try:
            text = (await running.run(call.arguments["code"], self._seconds, call.tell)).text
        except Ended as error:
            text = error.text
            notes.append(f"The interpreter was ended, as {error}. {GONE}")
        except BaseException:
            await self._end()
            raise
        told, attachments = await _in_thread(_produced, running.folder, before)
        if not running.is_running:
            await self._end()
        return Output("\n".join((text.rstrip("\n") or "It printed nothing.", *notes, *told)), attachments)

    async def close(self) -> None:
        """Ends the sandbox. A cell that runs is ended, too."""
        if self._sandbox is not None:
            await self._sandbox.end()
        async with self.turn:
            await self._end()

    async def _start(self) -> Sandbox:
        with ExitStack() as held:
            try:
                held.enter_context(await sandbox_slots.take(self._at_once, self._seconds / 2))
                running = await Sandbox.start(self._limits)
            except NoneFree as error:
                raise ToolFailed(f"the code was not run, and can be later: {error}") from error
            except CannotStart as error:
                _LOG.warning("the code interpreter cannot start: %s", error)
                raise ToolFailed(f"the code interpreter cannot start now: {_PATH.sub('…', str(error))}") from error
            self._sandbox, self._slot = running, held.pop_all()
        try:
            for file in self._files:
                await _in_thread(sandbox_files.put, running.folder, file.name, file.content)
        except OSError as error:
            await self._end()
            raise ToolFailed(f"there is no room for the file {file.name!r}: {error.strerror}") from error
        except BaseException:
            await self._end()
            raise
        return running

    async def _end(self) -> None:
        if self._sandbox is not None:
            running, self._sandbox, self._is_lost = self._sandbox, None, True
            with self._slot:
                await running.close()


def _produced(folder: int, before: dict[str, Mark]) -> tuple[list[str], tuple[Attachment, ...]]:
    """What the model is told of the files that a cell has written, and those that are given on."""
    found = sandbox_files.produced(folder, before, MAX_FILES, MAX_FILE_BYTES, MAX_FILES_BYTES)
    lines = [f"File: {name} ({_mime_type(name)}, {len(content)} bytes)" for name, content in found.files.items()]
    lines += [f"The file {name!r} is not given on: {why}." for name, why in found.left_out.items()]
    told = [cut("\n".join(lines), MAX_TOLD)] if lines else []
    return told, tuple(_attachment(name, content) for name, content in found.files.items())


def _attachment(name: str, content: bytes) -> Attachment:
    mime_type = _mime_type(name)
    encoded = base64.b64encode(content).decode()
    return Attachment(content=f"data:{mime_type};name={quote(name, safe='')};base64,{encoded}", mime_type=mime_type)


def _mime_type(name: str) -> str:
    """By the name's ending alone: what a file holds is not looked at."""
    kind, encoding = mimetypes.guess_type(name)
    return kind if kind and not encoding else "application/octet-stream"


async def _in_thread(function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Calls a function that uses open files, and is done with them when this returns, cancelled or not."""
    called = asyncio.create_task(asyncio.to_thread(function, *arguments, **named))
    try:
        return await asyncio.shield(called)
    except asyncio.CancelledError:
        await asyncio.wait([called])
        raise
