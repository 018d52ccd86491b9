"""How a sandbox is started: what bubblewrap lets the program in it see, and take from the machine.

What is there, all of it read-only: the machine's libraries (/usr/lib and its like), Python without what is installed
for it (/python), some libraries for data and plots (/libraries), four devices, and the program. The one place to write
is /mnt, in memory, with a bound. There is no /proc, /sys, /etc, /home, /root or /run, and nothing of the stack.

All namespaces are its own: users, processes, network (with no interface but its own loopback), mounts, IPC, host name.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path

from stack.agentic_system import cells, seccomp

# Who the program is inside, and on the machine where root starts it: nobody.
USER = 1000
NOBODY = 65534
# Libraries and what they need, those of them that are installed beside the stack.
LIBRARIES = (
    "numpy", "numpy.libs", "pandas", "pandas.libs", "dateutil", "six", "pytz", "tzdata", "matplotlib", "mpl_toolkits",
    "matplotlib.libs", "contourpy", "cycler", "fontTools", "kiwisolver", "packaging", "PIL", "pillow.libs",
    "pyparsing", "scipy", "scipy.libs", "sympy", "mpmath", "sklearn", "scikit_learn.libs", "joblib", "threadpoolctl",
    "narwhals", "networkx", "seaborn", "statsmodels", "statsmodels.libs", "patsy", "openpyxl", "et_xmlfile",
)  # fmt: skip
ENVIRONMENT = {
    "HOME": cells.FOLDER,
    "TMPDIR": cells.TEMPORARY,
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "LD_LIBRARY_PATH": f"/python/{sys.platlibdir}",
    "MPLBACKEND": "Agg",
    "MPLCONFIGDIR": f"{cells.TEMPORARY}/matplotlib",
    # Threads reserve much of the addresses that the sandbox may have: those of linear algebra, and all for malloc.
    "MALLOC_ARENA_MAX": "2",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "JOBLIB_MULTIPROCESSING": "0",  # there are no processes to share its work
}
_PROGRAM = "/cells.py"


class CannotStart(Exception):
    """No sandbox can be started here. The message says why."""


def is_root() -> bool:
    """Whether sandboxes are started by root, who makes their users from outside (see `map_users`)."""
    return os.geteuid() == 0


def start(
    settings: cells.Settings, room: int, visible: Sequence[str], out: socket.socket, users: Sequence[socket.socket]
) -> subprocess.Popen[bytes]:
    """Starts the program with its settings. What it and bubblewrap print goes to `out`.

    `room` is that of /mnt in bytes, `visible` what `files` gives. `users` are for root alone: to the first one
    bubblewrap tells of its process, and at the end of the second one it goes on. The sandbox ends with the thread that
    calls this. Raises CannotStart.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise CannotStart("bubblewrap is not installed: there is no bwrap in PATH (Debian: apt install bubblewrap)")
    try:
        with open(os.memfd_create("seccomp"), "r+b", buffering=0) as calls:
            calls.write(seccomp.program())
            calls.seek(0)
            return subprocess.Popen(
                [
                    program,
                    *("--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--hostname", "sandbox"),
                    *("--cap-drop", "ALL", *_users([one.fileno() for one in users]), "--seccomp", str(calls.fileno())),
                    *visible,
                    *("--perms", "0777", "--size", str(room), "--tmpfs", "/mnt", "--symlink", cells.TEMPORARY, "/tmp"),  # noqa: S108
                    *("--remount-ro", "/", "--chdir", "/", "--clearenv"),
                    *(word for name, value in ENVIRONMENT.items() for word in ("--setenv", name, value)),
                    *(_python(), "-I", "-S", "-B", "-X", "utf8", _PROGRAM, json.dumps(settings)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=out.fileno(),
                stderr=out.fileno(),
                env={},
                cwd="/",
                pass_fds=(calls.fileno(), settings["control"], *(one.fileno() for one in users)),
                start_new_session=True,
            )
    except seccomp.UnknownMachine as error:
        raise CannotStart(str(error)) from error
    except OSError as error:
        raise CannotStart(f"bubblewrap cannot be started: {error.strerror}") from error


def map_users(told: bytes) -> None:
    """Makes the users of a sandbox of which bubblewrap has told: root, who sets it up, and nobody, whom it becomes.

    Raises CannotStart.
    """
    process = json.loads(told)["child-pid"]
    try:
        for which in ("uid_map", "gid_map"):
            with open(f"/proc/{process}/{which}", "w") as file:
                file.write(f"0 0 1\n{USER} {NOBODY} 1\n")
    except OSError as error:
        raise CannotStart(f"the users of a sandbox cannot be made: {error.strerror}") from error


@cache
def files() -> tuple[str, ...]:
    """The part of the command that says what is there."""
    return tuple(_files())


def _users(users: Sequence[int]) -> Iterator[str]:
    if not users:
        yield from ("--uid", str(USER), "--gid", str(USER))
        return
    told, wait = users
    yield from ("--info-fd", str(told), "--userns-block-fd", str(wait))
    # The program becomes USER, and gives up these rights with that.
    yield from ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")


def _files() -> Iterator[str]:
    # Those that bubblewrap makes by itself are open to root alone.
    for folder in ("/usr", "/etc", "/dev", "/python", "/python/bin", f"/python/{sys.platlibdir}", cells.LIBRARIES):
        yield from ("--perms", "0755", "--dir", folder)
    for folder in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        if os.path.islink(folder):
            yield from ("--symlink", os.readlink(folder), folder)
        elif os.path.isdir(folder):
            yield from ("--ro-bind", folder, folder)
    yield from ("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache")
    yield from _python_files()
    for path in _installed():
        yield from ("--ro-bind", str(path), f"{cells.LIBRARIES}/{path.name}")
    for device in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"):  # the machine's own, which are root's
        yield from ("--dev-bind", device, device)
    yield from ("--ro-bind", cells.__file__, _PROGRAM)


def _python() -> str:
    return f"/python/bin/python{sys.version_info[0]}.{sys.version_info[1]}"


def _python_files() -> Iterator[str]:
    """Python under /python, and nothing in the folders of what is installed for it, here and in /usr/lib."""
    standard = Path(os.__file__).resolve().parent  # …/lib/python3.11
    inside = Path("/python", sys.platlibdir)
    yield from ("--ro-bind", os.path.realpath(sys._base_executable), _python())  # type: ignore[attr-defined]
    if Path(sys.base_prefix) == Path("/usr"):
        yield from ("--ro-bind", str(standard), str(inside / standard.name))
    else:  # with libraries of its own
        yield from ("--ro-bind", str(standard.parent), str(inside))
    for kind in ("site-packages", "dist-packages"):
        if (standard / kind).is_dir():
            yield from _emptied(inside / standard.name / kind)
        for folder in ("/usr/lib", "/usr/lib64"):
            if not os.path.islink(folder):
                yield from chain.from_iterable(map(_emptied, Path(folder).glob(f"python3*/{kind}")))


def _emptied(folder: Path) -> Iterator[str]:
    yield from ("--perms", "0555", "--size", "4096", "--tmpfs", str(folder), "--remount-ro", str(folder))


def _installed() -> list[Path]:
    folders = dict.fromkeys(Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib"))
    paths = [folder / (name + suffix) for folder in folders for name in LIBRARIES for suffix in ("", ".py")]
    return [path for path in paths if path.exists()]
