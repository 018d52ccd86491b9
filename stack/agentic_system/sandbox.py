"""A Python process in a bubblewrap sandbox, that runs cells of code and keeps what they define from one to the next.

    bubblewrap.py     what it can see, and how it is started
    seccomp.py        what it can ask of the kernel
    cells.py          the program inside
    sandbox_files.py  what it has written, and what is put there for it

It is one process, as it can start none but threads; so the bounds of a process (setrlimit) are those of the sandbox. To
these come the room of its files, which are in memory, and what this side watches: the time of cells, how much they
print, and how many files there are. Where root starts it, it is nobody's on the machine; else it is its starter's. It
ends with the thread that has started it.
"""

import asyncio
import codecs
import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from stack.agentic_system import bubblewrap, cells
from stack.agentic_system.bubblewrap import CannotStart

# How long a start may take, and the end of one that has been killed.
START_S = 20.0
END_S = 5.0
# How often the number of its files is looked at. A process makes a hundred thousand in a second.
WATCH_S = 0.1
# Of what a cell prints, the beginning and the end are kept, in bytes.
HEAD, TAIL = 12_000, 6_000
LEFT_OUT = "\n[… {} bytes are left out …]\n"
# What is printed is read so often, so that many small pieces take no more of the event loop's time than few large ones.
_READ_S = 0.002
_READ_BYTES = 65_536
# How often what is left is read when a cell has ended: more than a socket holds.
_READS = 64


@dataclass(frozen=True)
class Limits:
    """Bounds of a sandbox: `memory`, `folder` (all its files together), `file` and `printed` (of one cell) in bytes;
    `cpu` seconds of all cells together; `tasks` are threads; `open_files` at once, and how many `files` there are.
    """

    memory: int = 2**30
    folder: int = 128 * 2**20
    file: int = 64 * 2**20
    printed: int = 16 * 2**20
    cpu: int = 300
    tasks: int = 32
    open_files: int = 256
    files: int = 10_000


@dataclass(frozen=True)
class Ran:
    """What a cell has printed: at most HEAD + TAIL bytes of it. The end of a failure is a traceback."""

    text: str
    is_failure: bool


class Ended(Exception):
    """The sandbox has ended, by what the message says. `text` is what the cell had printed before."""

    def __init__(self, why: str, text: str) -> None:
        super().__init__(why)
        self.text = text


async def check() -> None:
    """Raises CannotStart where no sandbox can run."""
    sandbox = await Sandbox.start(Limits())
    try:
        ran = await sandbox.run("print(6 * 7)", START_S, lambda _: None)
    except Ended as error:
        raise CannotStart(f"a sandbox starts, and then {error}") from error
    finally:
        await sandbox.close()
    if ran.text != "42\n":
        raise CannotStart(f"Python does not run in a sandbox: {ran.text}")


class Sandbox:
    """A sandbox that runs.

    It belongs to the event loop in which it was started, and runs one cell at a time.
    """

    def __init__(self, limits: Limits, process: subprocess.Popen[bytes], control: socket.socket, out: socket.socket):
        self._first: int | None = None
        self._folder: int | None = None
        self._limits = limits
        self._process = process
        self._control = control
        self._out = out
        control.setblocking(False)
        out.setblocking(False)
        self._why: str | None = None
        self._watching: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, limits: Limits) -> "Sandbox":
        """Starts one. Raises CannotStart."""
        visible = await asyncio.to_thread(bubblewrap.files)
        with contextlib.ExitStack() as held:
            pairs = [socket.socketpair() for _ in range(4)]
            control, out, told, wait = (held.enter_context(ours) for ours, _ in pairs)
            with contextlib.ExitStack() as given:
                ends = [given.enter_context(theirs) for _, theirs in pairs]
                settings = cells.Settings(
                    control=ends[0].fileno(),
                    user=bubblewrap.USER if bubblewrap.is_root() else None,
                    memory=limits.memory,
                    file=limits.file,
                    cpu=limits.cpu,
                    tasks=limits.tasks,
                    files=limits.open_files,
                )
                # Not in a thread: it would end with that.
                process = bubblewrap.start(settings, limits.folder, visible, *ends[1:])
            sandbox = cls(limits, process, control.dup(), out.dup())
            try:
                async with asyncio.timeout(START_S):
                    await sandbox._become_ready(told, wait)
            except TimeoutError:
                await sandbox.close()
                raise CannotStart(f"a sandbox was not ready within {START_S:g} s") from None
            except BaseException:
                await sandbox.close()
                raise
        return sandbox

    @property
    def folder(self) -> int:
        """The open folder in which cells work; it stays when the processes have ended, until this is closed."""
        assert self._folder is not None
        return self._folder

    @property
    def is_running(self) -> bool:
        """Whether it can run another cell."""
        return self._ending is None

    async def run(self, code: str, seconds: float, tell: Callable[[str], None]) -> Ran:
        """Runs a cell. `tell` is given the beginning of what it prints as it comes.

        Raises Ended where the cell reaches a bound, or ends the process: then nothing runs any more. A cell that is
        cancelled ends the sandbox, too.
        """
        printed = _Printed(tell)
        try:
            async with asyncio.timeout(seconds):
                said = await self._ask(code, printed)
        except TimeoutError:
            self._stop(f"the cell ran for more than {seconds:g} s")
            said = b""
        except ConnectionError:  # it ended before it was asked
            said = b""
        except BaseException:
            await self.end()
            raise
        for _ in range(_READS):
            if not (more := _received(self._out, _READ_BYTES)):
                break
            printed.add(more)
        if not said:
            why = self._why
            if why is None:
                why = await asyncio.to_thread(self._how_it_ended)
            await self.end()
            raise Ended(why, printed.text)
        return Ran(printed.text, said != cells.DONE)

    async def end(self) -> None:
        """Ends all its processes. Doing so again does nothing."""
        if self._watching is not None:
            self._watching.cancel()
        self._kill()
        if self._ending is None:
            self._ending = asyncio.create_task(asyncio.to_thread(self._wait))
        await asyncio.shield(self._ending)

    async def close(self) -> None:
        """Ends it, and lets its files go."""
        await self.end()
        self._control.close()
        self._out.close()
        for file in (self._first, self._folder):
            if file is not None:
                os.close(file)
        self._first = self._folder = None

    async def _ask(self, code: str, printed: "_Printed") -> bytes:
        """What is answered to a cell: nothing where the process has ended."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes] = loop.create_future()
        text = code.encode(errors="replace")
        for _ in range(_READS):  # answers that nobody has asked for
            if not _received(self._control, _READ_BYTES):
                break
        loop.add_reader(self._control, self._answered, answer)
        loop.add_reader(self._out, self._print, printed)
        try:
            await loop.sock_sendall(self._control, cells.LENGTH.pack(len(text)) + text)
            return await answer
        finally:
            loop.remove_reader(self._control)
            loop.remove_reader(self._out)
            if self._reading is not None:
                self._reading.cancel()

    async def _become_ready(self, told: socket.socket, wait: socket.socket) -> None:
        """Hears of its first process, makes its users for root, and waits for the program, which gives its folder."""
        if heard := await _heard(told):  # else bubblewrap has ended
            first = json.loads(heard)["child-pid"]
            self._first = os.pidfd_open(first)
            if bubblewrap.is_root():
                bubblewrap.map_users(first)
        wait.close()
        await _readable(self._control)
        said, files, _, _ = socket.recv_fds(self._control, len(cells.READY), 1, socket.MSG_CMSG_CLOEXEC)
        if not files:
            why = await asyncio.to_thread(self._how_it_ended)
            lines = (_received(self._out, _READ_BYTES) or b"").decode(errors="replace").strip().splitlines()
            raise CannotStart(lines[-1][:500] if lines else why)
        assert said == cells.READY
        self._folder = files[0]
        self._watch()

    def _watch(self) -> None:
        """Looks, now and then, at the number of files, for which its file system has no bound of ours."""
        room = os.fstatvfs(self.folder)
        if room.f_files - room.f_ffree > self._limits.files:
            self._stop(f"there were more than {self._limits.files} files")
        else:
            self._watching = asyncio.get_running_loop().call_later(WATCH_S, self._watch)

    def _answered(self, answer: asyncio.Future[bytes]) -> None:
        said = _received(self._control, len(cells.DONE))
        if said is not None and not answer.done():
            answer.set_result(said)

    def _print(self, printed: "_Printed") -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._out)
        more = _received(self._out, _READ_BYTES)
        if more != b"":  # else everybody has closed it
            self._reading = loop.call_later(_READ_S, loop.add_reader, self._out, self._print, printed)
        printed.add(more or b"")
        if printed.count > self._limits.printed:
            self._stop(f"the cell printed more than {self._limits.printed} bytes")

    def _stop(self, why: str) -> None:
        """Ends it, which whoever waits for an answer finds out by its end."""
        self._why = why
        self._kill()

    def _kill(self) -> None:
        """Kills its first process, by which the kernel kills all others, and after which bubblewrap ends."""
        if self._first is None:
            self._process.kill()
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._first, signal.SIGKILL)

    def _how_it_ended(self) -> str:
        """By the status of bubblewrap, which is that of the program: 128 and the number of a signal, like a shell's."""
        try:
            status = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return "it answers no more"
        if status == 128 + signal.SIGXCPU:
            return f"it used more than {self._limits.cpu} s of the processor"
        if status > 128:
            return f"it was ended by the signal {status - 128}"
        return f"it ended itself with the status {status}"

    def _wait(self) -> None:
        """Waits until bubblewrap has ended, and then until nobody is left who could print: all in the sandbox."""
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:  # it has not heard of its child's end
            self._process.kill()
            self._process.wait()
        with self._out.dup() as out, contextlib.suppress(ConnectionError):
            out.settimeout(END_S)
            while out.recv(_READ_BYTES):
                pass


class _Printed:
    """What a cell prints, as it comes: `count` bytes, of which the beginning and the end are kept."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.count = 0
        self._tell = tell
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._head = bytearray()
        self._tail = bytearray()

    def add(self, more: bytes) -> None:
        self.count += len(more)
        at = HEAD - len(self._head)
        self._head += more[:at]
        if told := self._decoder.decode(more[:at]):
            self._tell(told)
        self._tail += more[at:]
        del self._tail[:-TAIL]

    @property
    def text(self) -> str:
        left_out = self.count - len(self._head) - len(self._tail)
        between = LEFT_OUT.format(left_out).encode() if left_out else b""
        return (self._head + between + self._tail).decode(errors="replace")


async def _heard(told: socket.socket) -> bytes:
    told.setblocking(False)
    heard = b""
    while more := await asyncio.get_running_loop().sock_recv(told, 4096):
        heard += more
    return heard


async def _readable(source: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    is_there = asyncio.Event()
    loop.add_reader(source, is_there.set)
    try:
        await is_there.wait()
    finally:
        loop.remove_reader(source)


def _received(source: socket.socket, most: int) -> bytes | None:
    """What has come: None where nothing has, and no bytes where nothing can come any more."""
    try:
        return source.recv(most)
    except BlockingIOError:
        return None
    except ConnectionError:
        return b""
