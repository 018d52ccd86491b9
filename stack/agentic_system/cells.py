"""The program inside a sandbox: runs cells of Python, one after another, and keeps what they define.

    python3 -I -S -B -X utf8 cells.py SETTINGS    (JSON, see Settings)

By a Unix socket it is given cells: the length of each (LENGTH) and its code. It answers with one byte: first READY,
with the folder of its files; then for each cell DONE, or FAILED where it raised something. What cells print, the value
of their last expression and short tracebacks go to stdout and stderr. It ends when the socket's other end is closed.

It imports nothing of the stack, since nothing of it is there. What a cell does to this program, it does to itself: who
asks relies on no answer but as what the cell says.
"""

import ast
import builtins
import json
import linecache
import os
import resource
import socket
import struct
import sys
import traceback
import types
import warnings
from typing import TypedDict

LENGTH = struct.Struct(">I")
READY, DONE, FAILED = b"R", b"D", b"F"
FOLDER, TEMPORARY, LIBRARIES = "/mnt/data", "/mnt/tmp", "/libraries"
# Of a value that is shown, and of a traceback the last frames beside those of cells.
MAX_SHOWN = 100_000
MAX_FILES = 1_000_000  # the highest number of one that bubblewrap may have left open
CONTROL = 3  # the socket's number from then on, however many files who starts a sandbox has open
LAST_FRAMES = 2


class Settings(TypedDict):
    """`control` is the socket's number at the start. `user` is whom to become, where the program begins as another.

    Bounds: `memory` of all its addresses and `file` of each file in bytes; `cpu` in seconds, of all cells together;
    how many `tasks`, which are threads; how many open `files`.
    """

    control: int
    user: int | None
    memory: int
    file: int
    cpu: int
    tasks: int
    files: int


def main() -> None:
    """Runs the cells that come."""
    settings: Settings = json.loads(sys.argv[1])
    control = socket.socket(fileno=os.dup2(settings["control"], CONTROL))
    os.closerange(CONTROL + 1, MAX_FILES)
    _become(settings["user"])
    _bound(settings)
    os.mkdir(FOLDER)
    os.mkdir(TEMPORARY)
    os.chdir(FOLDER)
    sys.path = ["", *sys.path, LIBRARIES]
    sys.argv = [""]
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    folder = os.open(FOLDER, os.O_RDONLY | os.O_DIRECTORY)
    socket.send_fds(control, [READY], [folder])
    os.close(folder)
    cells = Cells()
    while len(length := control.recv(LENGTH.size, socket.MSG_WAITALL)) == LENGTH.size:
        code = control.recv(LENGTH.unpack(length)[0], socket.MSG_WAITALL).decode()
        control.sendall(DONE if cells.run(code) else FAILED)


class Cells:
    """What cells share: a module of their own, which is their __main__."""

    def __init__(self) -> None:
        self._module = types.ModuleType("__main__")
        self._count = 0
        self._out, self._err = sys.stdout, sys.stderr
        sys.modules["__main__"] = self._module
        builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
        warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")  # of plt.show()

    def run(self, code: str) -> bool:
        """Runs a cell, prints its last value, saves its plots. Gives whether it went well."""
        self._count += 1
        name = f"<cell {self._count}>"
        lines = f"{code}\n".splitlines(keepends=True)  # all of them with an end, by which tracebacks count
        linecache.cache[name] = (len(code), None, lines, name)
        try:
            self._run(code, name)
            save_plots()
            self._out.flush()
        except SystemExit:
            return True
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the cell's
            self._out.flush()
            self._err.write(short_traceback(error))
            self._err.flush()
            return False
        return True

    def _run(self, code: str, name: str) -> None:
        space = self._module.__dict__
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), space)  # noqa: S102
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), space)  # noqa: S307
            if value is not None:
                space["_"] = value
                shown = repr(value)
                print(shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + " …")


def save_plots() -> None:
    """Saves matplotlib's open figures as figure_1.png and so on, and closes them."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return
    number = 0
    for figure in [pyplot.figure(open_one) for open_one in pyplot.get_fignums()]:
        while os.path.lexists(name := f"figure_{(number := number + 1)}.png"):
            pass
        figure.savefig(name, bbox_inches="tight")
    pyplot.close("all")


def short_traceback(error: BaseException) -> str:
    """A traceback without the frames of this program, and with few of those of libraries."""
    told = seen = traceback.TracebackException.from_exception(error)
    while seen:
        first_of_last = len(seen.stack) - LAST_FRAMES
        seen.stack[:] = [
            frame
            for number, frame in enumerate(seen.stack)
            if frame.filename.startswith("<cell ") or (number >= first_of_last and frame.filename != __file__)
        ]
        seen = seen.__cause__ or seen.__context__  # type: ignore[assignment]
    return "".join(told.format())


def _become(user: int | None) -> None:
    """Gives up what the first user of the sandbox may do, where this is it."""
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def _bound(settings: Settings) -> None:
    for what, most in (
        (resource.RLIMIT_AS, settings["memory"]),
        (resource.RLIMIT_FSIZE, settings["file"]),
        (resource.RLIMIT_NPROC, settings["tasks"]),
        (resource.RLIMIT_NOFILE, settings["files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    # The first ends the process by a signal of its own; the second, where that is ignored, by SIGKILL.
    resource.setrlimit(resource.RLIMIT_CPU, (settings["cpu"], settings["cpu"] + 1))
    os.nice(5)


if __name__ == "__main__":
    main()
