"""How a sandbox is started: what bubblewrap lets the program in it see, and take from the machine.

What is there, all of it read-only: the machine's shared libraries (/usr/lib and its like), Python without what is
installed for it (/python), some libraries for data and plots (/libraries), four devices, and the program. The one place
to write is /mnt, in memory, with a bound. There is no /proc, /sys, /home, /root, /run or /var, nothing in /etc but
where libraries are, and nothing of the stack.

All namespaces are its own: users, processes, network (with no interface but its own loopback), mounts, IPC, host name.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
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
    settings: cells.Settings,
    room: int,
    visible: Sequence[str],
    out: socket.socket,
    told: socket.socket,
    wait: socket.socket,
) -> subprocess.Popen[bytes]:
    """Starts the program with its settings. What it and bubblewrap print goes to `out`.

    `room` is that of /mnt in bytes, `visible` what `files` gives. Bubblewrap writes to `told` which the sandbox's first
    process is; for root, it goes on when the other end of `wait` is closed. The sandbox ends with the thread that calls
    this. Raises CannotStart.
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
                    *("--cap-drop", "ALL", *_users(wait.fileno()), "--seccomp", str(calls.fileno())),
                    *("--info-fd", str(told.fileno())),
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
                pass_fds=(calls.fileno(), settings["control"], told.fileno(), wait.fileno()),
                start_new_session=True,
            )
    except seccomp.UnknownMachine as error:
        raise CannotStart(str(error)) from error
    except OSError as error:
        raise CannotStart(f"bubblewrap cannot be started: {error.strerror}") from error


def map_users(process: int) -> None:
    """Makes the users of a sandbox by its first process: root, who sets it up, and nobody, whom its program becomes.

    Raises CannotStart.
    """
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


def _users(wait: int) -> Iterator[str]:
    if is_root():  # the program becomes USER, and gives up these rights with that
        yield from ("--userns-block-fd", str(wait), "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
    else:
        yield from ("--uid", str(USER), "--gid", str(USER))


def _files() -> Iterator[str]:
    # Those that bubblewrap makes by itself are open to root alone.
    for folder in ("/usr", "/etc", "/dev", "/python", "/python/bin", f"/python/{sys.platlibdir}", cells.LIBRARIES):
        yield from ("--perms", "0755", "--dir", folder)
    yield from _system_libraries()
    yield from ("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache")
    yield from _python_files()
    for path in _installed():
        yield from ("--ro-bind", str(path), f"{cells.LIBRARIES}/{path.name}")
    for device in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"):  # the machine's own, which are root's
        yield from ("--dev-bind", device, device)
    yield from ("--ro-bind", cells.__file__, _PROGRAM)


def _system_libraries() -> Iterator[str]:
    architecture = sysconfig.get_config_var("MULTIARCH")
    for folder in map(Path, ("/usr/lib", "/usr/lib64", "/lib", "/lib64")):
        if folder.is_symlink():
            yield from ("--symlink", str(folder.readlink()), str(folder))
        elif architecture and (folder / architecture).is_dir():  # Debian's: beside it are whole programs
            yield from ("--perms", "0755", "--dir", str(folder))
            yield from ("--ro-bind", str(folder / architecture), str(folder / architecture))
        elif folder.is_dir():
            yield from ("--ro-bind", str(folder), str(folder))
            yield from _emptied(folder.glob("python3*/*-packages"))


def _python() -> str:
    return f"/python/bin/python{sys.version_info[0]}.{sys.version_info[1]}"


def _python_files() -> Iterator[str]:
    """Python under /python, without what is installed for it (site-packages, Debian's dist-packages)."""
    standard = Path(os.__file__).resolve().parent  # …/lib/python3.11
    inside = Path("/python", sys.platlibdir)
    yield from ("--ro-bind", os.path.realpath(sys._base_executable), _python())  # type: ignore[attr-defined]
    if Path(sys.base_prefix) == Path("/usr"):
        yield from ("--ro-bind", str(standard), str(inside / standard.name))
    else:  # with libraries of its own
        yield from ("--ro-bind", str(standard.parent), str(inside))
    yield from _emptied(inside / standard.name / installed.name for installed in standard.glob("*-packages"))


def _emptied(folders: Iterable[Path]) -> Iterator[str]:
    for folder in map(str, folders):
        yield from ("--perms", "0555", "--size", "4096", "--tmpfs", folder, "--remount-ro", folder)


def _installed() -> list[Path]:
    folders = dict.fromkeys(Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib"))
    paths = [folder / (name + suffix) for folder in folders for name in LIBRARIES for suffix in ("", ".py")]
    return [path for path in paths if path.exists()]
