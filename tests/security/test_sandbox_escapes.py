"""What code in a sandbox tries, to get out of it or to take more than it may have. None of it succeeds."""

import asyncio
import contextlib
import os
import platform
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import psutil
import pytest

from stack.agentic_system import bubblewrap
from stack.agentic_system.sandbox import HEAD, TAIL, Ended, Limits, Sandbox
from stack.agentic_system.tools.code_interpreter import CodeInterpreter
from stack.agentic_system.tools.tool import Call
from tests.sandboxes import SECONDS, all_end, inhabitants, run, said, sandbox
from tests.unit.agentic_system.test_seccomp import numbers

MB = 2**20
# Calls the kernel by numbers, and gives the error's name.
SYSCALL = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    given = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(one) for one in arguments))
    return errno.errorcode[ctypes.get_errno()] if given == -1 else given
"""


@pytest.fixture
async def running() -> AsyncGenerator[Sandbox]:
    async with sandbox() as one:
        yield one


# The network


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG", "AF_TIPC"])
async def test_there_is_no_socket_but_unix_ones(running: Sandbox, family: str) -> None:
    for kind in ("SOCK_STREAM", "SOCK_DGRAM", "SOCK_RAW", "SOCK_SEQPACKET"):
        failed = await run(running, f"import socket; socket.socket(socket.{family}, socket.{kind})")
        assert failed.text.endswith("OSError: [Errno 97] Address family not supported by protocol\n")


async def test_no_name_is_resolved_and_nothing_is_fetched(running: Sandbox) -> None:
    assert "gaierror" in (await run(running, "import socket; socket.getaddrinfo('localhost', 80)")).text
    assert "gaierror" in (await run(running, "socket.gethostbyname('example.com')")).text
    failed = await run(running, "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000')")
    assert "Address family not supported" in failed.text


async def test_unix_sockets_of_the_machine_are_not_there(
    running: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as named, socket.socket(socket.AF_UNIX) as abstract:
        monkeypatch.chdir(tmp_path)  # a socket's path is short
        named.bind("s")
        abstract.bind(f"\0{tmp_path.name}")
        for listening in (named, abstract):
            listening.listen()
        code = "import socket\nsocket.socket(socket.AF_UNIX).connect({!r})"
        assert "FileNotFoundError" in (await run(running, code.format(str(tmp_path / "s")))).text
        assert "ConnectionRefusedError" in (await run(running, code.format(f"\0{tmp_path.name}"))).text


# Files of the machine


async def test_what_is_there_is_python_its_libraries_and_nothing_else(running: Sandbox) -> None:
    code = "import os\n{d: sorted(os.listdir(d)) for d in ('/', '/etc', '/dev', '/python', '/mnt', '/tmp', '/usr')}"
    there = eval((await run(running, code)).text)
    optional = {"lib32", "lib64", "libx32"}
    assert set(there["/"]) - optional == {"cells.py", "dev", "etc", "lib", "libraries", "mnt", "python", "tmp", "usr"}
    assert set(there["/usr"]) - optional == {"lib"}
    assert there["/etc"] in ([], ["ld.so.cache"])
    assert there["/dev"] == ["null", "random", "urandom", "zero"]
    assert set(there["/python"]) == {"bin", sys.platlibdir}
    assert there["/mnt"] == ["data", "tmp"]
    assert there["/tmp"] == []


async def test_secrets_and_the_stack_itself_are_not_there(running: Sandbox, home: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    checkout = Path(__file__).parents[2]
    paths = [tmp_path / "secret", home, checkout, Path.home(), Path.home() / ".ssh", *map(Path, (
        "/etc/shadow", "/etc/passwd", "/etc/hostname", "/root", "/home", "/proc", "/proc/self/environ", "/proc/1/root",
        "/sys", "/run", "/var", "/boot", "/opt", "/srv", "/usr/bin", "/usr/bin/bwrap", "/bin/sh", "/usr/local",
        "/mnt/data/../../proc", "/dev/mem", "/dev/kmsg", "/dev/fuse", "/dev/tty", "/dev/pts", "/dev/shm", "/.dockerenv",
    ))]  # fmt: skip
    found = await run(
        running, f"import os\n[path for path in {[str(path) for path in paths]!r} if os.path.lexists(path)]"
    )
    assert found.text == "[]\n"
    for module in ("stack", "serve_apps", "jobs", "tests", "ray", "pydantic", "torch"):
        assert "ModuleNotFoundError" in (await run(running, f"import {module}")).text
    walk = (
        "import os\nfound = []\nfor folder, _, names in os.walk('/'):\n"
        "    found += [os.path.join(folder, name) for name in names]\n"
        "[path for path in found if 'llama' in path.lower() or 'site-packages/' in path or 'dist-packages/' in path]"
    )
    assert (await run(running, walk)).text == "[]\n"


async def test_the_environment_is_the_sandboxs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAVE_SEARCH_KEY", "secret")
    environment = eval(await said("import os\ndict(os.environ)"))
    assert environment.pop("PWD", "/") == "/"  # of bubblewrap
    assert environment == bubblewrap.ENVIRONMENT
    # … and that of the process, as it was when it began
    assert (
        await said(
            "import ctypes\nwords = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')\n"
            "number = 0\nwhile words[number]: number += 1\nany(b'secret' in words[at] for at in range(number))"
        )
        == "False\n"
    )


async def test_nothing_can_be_written_but_its_own_folders(running: Sandbox) -> None:
    code = (
        "import os\nwritten = []\nfor folder, _, _ in os.walk('/'):\n"
        "    try: os.close(os.open(folder + '/x', os.O_CREAT | os.O_WRONLY))\n    except OSError: continue\n"
        "    written.append(folder)\nsorted(written)"
    )
    assert (await run(running, code)).text == "['/mnt', '/mnt/data', '/mnt/tmp']\n"
    for path in ("/cells.py", "/python/bin", "/usr/lib", "/libraries", "/dev", "/"):
        for change in (f"os.chmod({path!r}, 0o777)", f"os.utime({path!r})", f"os.rename({path!r}, '/mnt/y')"):
            failed = (await run(running, f"import os\n{change}")).text
            assert "Errno" in failed, change
    assert "Errno" in (await run(running, "open('/cells.py', 'a')")).text
    assert "Errno" in (await run(running, "open(os.__file__, 'r+')")).text


async def test_devices_of_the_machine_are_not_changed(running: Sandbox) -> None:
    before = [os.stat(f"/dev/{name}") for name in ("null", "zero", "random", "urandom")]
    code = (
        "import os\nfor name in os.listdir('/dev'):\n"
        "    for change in (lambda p: os.chmod(p, 0), os.remove, os.utime, lambda p: os.truncate(p, 0)):\n"
        "        try: change('/dev/' + name)\n        except OSError: pass"
    )
    await run(running, code)
    after = [os.stat(f"/dev/{name}") for name in ("null", "zero", "random", "urandom")]
    assert [(one.st_mode, one.st_uid, one.st_gid) for one in after] == [
        (one.st_mode, one.st_uid, one.st_gid) for one in before
    ]


# Other processes, and more of its own


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.fork()",
        "import os; os.forkpty()",
        "import os; os.posix_spawn('/python/bin/python3', ['python3'], {})",
        "import subprocess; subprocess.Popen(['/python/bin/python3'])",
        "import multiprocessing; multiprocessing.get_context('fork').Process(target=print).start()",
        "import multiprocessing; multiprocessing.get_context('spawn').Process(target=print).start()",
        "while True: __import__('os').fork()",
    ],
)
async def test_no_process_is_started(running: Sandbox, code: str) -> None:
    assert (await run(running, code)).text.splitlines()[-1].startswith(("PermissionError", "OSError", "FileNotFound"))
    assert len(inhabitants()) == 3


async def test_os_system_starts_nothing(running: Sandbox) -> None:
    await run(running, "import os; os.system('while true; do true; done &'); os.popen('sleep 100')")
    assert len(inhabitants()) == 3


async def test_threads_have_a_bound(running: Sandbox) -> None:
    code = (
        "import threading\ngo = threading.Event()\nmade = 0\n"
        "try:\n    while made < 5_000: threading.Thread(target=go.wait, daemon=True).start(); made += 1\n"
        "except RuntimeError: pass\nprint(made)\ngo.set()"
    )
    assert 8 <= int((await run(running, code)).text) < Limits().tasks
    threads = (
        "import _thread, time\nlock = _thread.allocate_lock()\nlock.acquire()\n_thread.stack_size(65536)\nmade = 0\n"
        "try:\n    while made < 5_000: _thread.start_new_thread(lock.acquire, ()); made += 1\n"
        "except RuntimeError: pass\nmade"
    )
    async with sandbox() as other:
        assert 8 <= int((await run(other, threads)).text) < Limits().tasks


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


async def test_processes_of_the_machine_get_no_signals(running: Sandbox, victim: subprocess.Popen[bytes]) -> None:
    code = (
        f"import os\nfor pid in ({victim.pid}, -{victim.pid}, {os.getpid()}, {os.getppid()}):\n"
        "    for signal in (0, 9, 15, 19):\n"
        "        try: os.kill(pid, signal)\n        except OSError as error: print(type(error).__name__)"
    )
    assert (await run(running, code)).text == "ProcessLookupError\n" * 16
    for code in ("os.kill(1, 9); os.kill(1, 19); 'alive'", "os.kill(1, 15); 'alive'", "os.kill(-1, 9)"):
        said = (await run(running, code)).text
        assert said == "'alive'\n" or said.splitlines()[-1].startswith(("PermissionError", "ProcessLookupError"))
    with all_end(), pytest.raises(Ended):  # all that it may signal: itself
        await run(running, "os.kill(0, 9)")
    victim.communicate(b"\n", timeout=SECONDS)
    assert victim.returncode == 0


async def test_it_sees_no_process_but_its_own(running: Sandbox) -> None:
    assert (await run(running, "import os; os.getpid(), os.getppid()")).text == "(2, 1)\n"
    alive = (
        "found = []\nfor pid in range(1, 40_000):\n    try: os.kill(pid, 0)\n    except ProcessLookupError: continue\n"
    )
    assert (
        await run(running, alive + "    except PermissionError: pass\n    found.append(pid)\nfound")
    ).text == "[1, 2]\n"


@pytest.mark.parametrize(
    "call",
    [
        "ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_open", "pidfd_getfd", "pidfd_send_signal",
        "mount", "umount2", "pivot_root", "chroot", "fsopen", "fsmount", "move_mount", "open_tree", "mount_setattr",
        "unshare", "setns", "clone3", "bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key",
        "io_uring_setup", "io_uring_enter", "io_uring_register", "io_setup", "memfd_create", "memfd_secret", "shmget",
        "msgget", "semget", "mq_open", "init_module", "finit_module", "delete_module", "kexec_load", "reboot", "swapon",
        "open_by_handle_at", "name_to_handle_at", "mknodat", "personality", "seccomp", "syslog", "acct", "quotactl",
        "settimeofday", "clock_settime", "adjtimex", "sethostname", "setdomainname", "sched_setaffinity",
        "sched_setscheduler", "ioprio_set", "mlock", "mlockall", "vmsplice", "splice", "tee", "fanotify_init",
        "inotify_init1", "timer_create", "capset", "setuid", "setgid", "setreuid", "setfsuid", "fchown", "fchownat",
        "setxattr", "execveat", "landlock_create_ruleset", "modify_ldt", "iopl", "ioperm", "uselib", "fork", "vfork",
    ],
)  # fmt: skip
async def test_calls_of_the_kernel_that_are_refused(running: Sandbox, call: str) -> None:
    known = numbers(platform.machine())
    number = known.get(call, 0x3FFF_FFFF)  # one that this machine does not have is refused, too
    refused = (await run(running, f"{SYSCALL}\ncall({number}, 0, 0, 0, 0, 0, 0)")).text
    assert refused in ("'EPERM'\n", "'ENOSYS'\n")
    x32 = (await run(running, f"call({0x4000_0000 | number}, 0, 0, 0, 0, 0, 0)")).text
    assert x32 == "'ENOSYS'\n"


@pytest.mark.parametrize("flag", [0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000])
async def test_no_namespace_is_made(running: Sandbox, flag: int) -> None:
    number = numbers(platform.machine())["clone"]
    for flags in (flag | 17, flag, flag | 0x3D0F00):
        assert (await run(running, f"{SYSCALL}\ncall({number}, {flags}, 0, 0, 0, 0)")).text == "'EPERM'\n"


async def test_the_gate_of_another_architecture_is_closed(running: Sandbox) -> None:
    """On x86_64 that of 32 bits: mov eax, 20 (getpid); int 0x80; ret. On others the same bytes are no code at all."""
    code = (
        "import ctypes, mmap\narea = mmap.mmap(-1, 4096, prot=7)\narea.write(bytes.fromhex('b814000000cd80c3'))\n"
        "print('called', flush=True)\nstart = ctypes.addressof(ctypes.c_char.from_buffer(area))\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(start)()"
    )
    signal = 31 if platform.machine() == "x86_64" else 4
    with pytest.raises(Ended, match=f"signal {signal}") as ended:
        await run(running, code)
    assert ended.value.text == "called\n"


# More rights


@pytest.mark.parametrize(
    "code",
    [
        "os.setuid(0)", "os.setgid(0)", "os.setresuid(0, 0, 0)", "os.setresgid(0, 0, 0)", "os.setgroups([0])",
        "os.seteuid(0)", "os.setreuid(0, 0)", "os.setresuid(65534, 65534, 65534)", "os.nice(-1)",
        "os.setpriority(os.PRIO_PROCESS, 0, -5)", "os.chown('/mnt/data', 0, 0)",
    ],
)  # fmt: skip
async def test_it_becomes_nobody_else(running: Sandbox, code: str) -> None:
    refused = (await run(running, f"import os\n{code}")).text.splitlines()[-1]
    assert refused.startswith(("PermissionError", "OSError: [Errno 22]"))  # there are no others
    who = "os.getresuid(), os.getresgid(), set(os.getgroups()) <= {1000, 65534}"
    assert (await run(running, who)).text == "((1000, 1000, 1000), (1000, 1000, 1000), True)\n"


async def test_it_has_no_capabilities_and_gets_none(running: Sandbox) -> None:
    _, first, inner = inhabitants()
    for process in (first, inner):
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapAmb"], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    expected = bubblewrap.NOBODY if bubblewrap.is_root() else os.geteuid()
    assert inner.uids() == (expected,) * 3
    ours = {name: os.readlink(f"/proc/self/ns/{name}") for name in ("user", "pid", "net", "mnt", "ipc", "uts")}
    theirs = {name: os.readlink(f"/proc/{inner.pid}/ns/{name}") for name in ours}
    assert all(ours[name] != theirs[name] for name in ours)
    assert os.getsid(inner.pid) != os.getsid(0)
    assert inner.terminal() is None


async def test_a_set_user_id_bit_means_nothing(running: Sandbox) -> None:
    code = "import os, shutil\nshutil.copy('/python/bin/' + os.listdir('/python/bin')[0], 'p')\nos.chmod('p', 0o6755)"
    await run(running, code)
    flags = await run(
        running, "[bool(os.statvfs(d).f_flag & os.ST_NOSUID) for d in ('/', '/mnt', '/usr/lib', '/python')]"
    )
    assert flags.text == "[True, True, True, True]\n"
    with pytest.raises(Ended):  # it runs instead, as who it was, and knows nothing of cells
        await run(running, "os.execv('p', ['p', '-I', '-S', '-c', 'import os; print(os.getresuid())'])")


async def test_limits_are_not_raised(running: Sandbox) -> None:
    code = (
        "import resource as r\nraised = []\nfor what in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_FSIZE, r.RLIMIT_NPROC,"
        " r.RLIMIT_NOFILE, r.RLIMIT_CORE):\n    soft, hard = r.getrlimit(what)\n"
        "    for most in (hard + 1, r.RLIM_INFINITY):\n        try: r.setrlimit(what, (most, most))\n"
        "        except (OSError, ValueError): continue\n        raised.append(what)\nraised"
    )
    assert (await run(running, code)).text == "[]\n"


# Memory, room, time


@pytest.mark.parametrize(
    "code",
    [
        "bytearray(2 * 2**30)",
        "[bytearray(2**20) for _ in range(2_000)]",
        "import mmap; [mmap.mmap(-1, 2**26) for _ in range(32)]",
        "import mmap; [mmap.mmap(-1, 2**26, flags=mmap.MAP_PRIVATE) for _ in range(32)]",
        "import numpy; [numpy.ones(10**7) for _ in range(100)]",
        "x = 'x'\nwhile True: x += x",
        "x = []\nwhile True: x.append(x * 100)",
    ],
)
async def test_memory_has_a_bound(running: Sandbox, code: str) -> None:
    failed = await run(running, code)
    assert failed.is_failure
    assert failed.text.splitlines()[-1].startswith(
        ("MemoryError", "OSError", "numpy._core._exceptions._ArrayMemoryError")
    )
    *_, inner = inhabitants()
    assert inner.memory_info().rss < Limits().memory
    assert (await run(running, "1")).text == "1\n"


async def test_memory_in_pipes_and_sockets_has_a_bound(running: Sandbox) -> None:
    code = (
        "import os, socket\nkept = []\ntry:\n"
        "    while True: kept.append(socket.socketpair())\n"
        "except OSError as error: print(len(kept) < 130, error.strerror)"
    )
    assert (await run(running, code)).text == "True Too many open files\n"


async def test_room_has_a_bound() -> None:
    async with sandbox(Limits(folder=4 * MB, file=MB)) as running:
        one = "f = open('/mnt/data/f', 'wb', buffering=0)\nwhile True: f.write(b'x' * 65536)"
        assert (await run(running, one)).text.endswith("OSError: [Errno 27] File too large\n")
        many = (
            "import os\nn = 0\nwhile True:\n    n += 1\n"
            "    for folder in ('/mnt', '/mnt/data', '/tmp'): open(f'{folder}/{n}', 'wb').write(b'x' * 500_000)"
        )
        assert (await run(running, many)).text.endswith("OSError: [Errno 28] No space left on device\n")
        room = os.fstatvfs(running.folder)
        assert (room.f_blocks * room.f_frsize, room.f_bfree) == (4 * MB, 0)
        assert "Errno 27" in (await run(running, "os.truncate('/mnt/data/f', 2**40)")).text
        assert "Errno" in (await run(running, "os.posix_fallocate(f.fileno(), 0, 2**30)")).text


@pytest.mark.parametrize(
    "make",
    ["open(f'f{n}', 'w').close()", "os.mkdir(f'f{n}')", "os.symlink('x' * 100, f'f{n}')", "os.link('x', f'f{n}')"],
)
async def test_the_number_of_files_has_a_bound(running: Sandbox, make: str) -> None:
    await run(running, "import os; open('x', 'w').close()")
    with all_end(), pytest.raises(Ended, match="there were more than 10000 files"):
        await run(running, f"for n in range(10_000_000): {make}")


async def test_files_are_counted_between_cells_too(running: Sandbox) -> None:
    code = (
        "import threading\ndef make():\n    go.wait()\n    for n in range(10_000_000): open(f'f{n}', 'w').close()\n"
        "go = threading.Event()\nthreading.Thread(target=make, daemon=True).start()"
    )
    await run(running, code)
    with all_end():
        await run(running, "threading.Timer(0.1, go.set).start()")
        inside = inhabitants()[1:]
        await asyncio.to_thread(psutil.wait_procs, inside, SECONDS)
        with pytest.raises(Ended, match="there were more than 10000 files"):
            await run(running, "1")


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import signal\nfor n in (15, 2, 1, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: signal.pause()",
        "import time; time.sleep(1_000)",
        "import time, threading as t\nfor _ in range(5): t.Thread(target=time.sleep, args=[99]).start()\ntime.sleep(9)",
        "(x := 10**8)\n10 ** x",
        "import re; re.match('(a+)+b', 'a' * 40)",
        "import socket; a, b = socket.socketpair(); a.recv(1)",
    ],
)
async def test_time_has_a_bound(running: Sandbox, code: str) -> None:
    with all_end(), pytest.raises(Ended, match="the cell ran for more than"):
        await run(running, code, seconds=0.3)


async def test_the_processors_time_has_a_bound() -> None:
    code = (
        "import signal, threading\n{}\ndef spin():\n    while True: pass\n"
        "threading.Thread(target=spin, daemon=True).start()"
    )
    async with sandbox(Limits(cpu=1)) as running:
        await run(running, code.format(""))
        with pytest.raises(Ended, match="it used more than 1 s of the processor"):
            await run(running, "spin()")
    async with sandbox(Limits(cpu=1)) as running:
        await run(running, code.format("signal.signal(signal.SIGXCPU, signal.SIG_IGN)"))
        with pytest.raises(Ended, match="signal 9"):
            await run(running, "spin()")


# What it prints, and what it says


@pytest.mark.parametrize(
    "code",
    [
        "while True: print('x' * 1_000)",
        "import os\nwhile True: os.write(1, b'x' * 65536)",
        "import os\nwhile True: os.write(2, b'\\xff\\x00' * 1000)",
        "import sys\nclass A:\n    def __repr__(self):\n        while True: sys.stderr.write('x' * 10_000)\nA()",
    ],
)
async def test_a_flood_is_ended(code: str) -> None:
    async with sandbox(Limits(printed=4 * MB)) as running:
        with all_end(), pytest.raises(Ended, match="the cell printed more than 4194304 bytes") as ended:
            await run(running, code)
        assert len(ended.value.text) < HEAD + TAIL + 100


async def test_a_flood_of_small_pieces_leaves_the_event_loop_its_time(running: Sandbox) -> None:
    cell = asyncio.create_task(run(running, "import os\nwhile True: os.write(1, b'x')", seconds=0.5))
    loop = asyncio.get_running_loop()
    longest, turns = 0.0, 0
    while not cell.done():
        before = loop.time()
        await asyncio.sleep(0)
        longest, turns = max(longest, loop.time() - before), turns + 1
    with pytest.raises(Ended):
        await cell
    assert turns > 500


# Finds the socket by which cells come: the last of the files that are open.
FIND = (
    "import os, socket\nopen_files = []\nfor n in range(65_536):\n    try: os.fstat(n)\n    except OSError: continue\n"
    "    open_files.append(n)\ncontrol = socket.socket(fileno=open_files[3])\n"
)


async def test_it_has_no_files_of_others_open() -> None:
    kinds = "import stat\n[(n, stat.filemode(os.fstat(n).st_mode)[0]) for n in open_files]"
    with contextlib.ExitStack() as held:
        for _ in range(2 * Limits().open_files):  # its own have no higher numbers for these
            held.enter_context(os.fdopen(os.open(os.devnull, os.O_RDONLY)))
        async with sandbox() as running:
            assert (await run(running, FIND + kinds)).text == "[(0, 'c'), (1, 's'), (2, 's'), (3, 's')]\n"
            assert (await run(running, "os.path.samestat(os.fstat(0), os.stat('/dev/null'))")).text == "True\n"


async def test_forged_answers_are_its_own(running: Sandbox) -> None:
    """It can say that a cell has ended before it has; all that it prints is still what it prints."""
    await run(running, FIND)
    forged = ("b'D' * 1_000", "b'F'", "b'\\x00\\xff{}' * 1_000", "b''")
    texts = [(await run(running, f"control.send({one}); print('word')")).text for one in forged]
    assert set("".join(texts).split()) <= {"word"}
    text = (await run(running, "print('late')")).text
    while "late" not in text:  # those before it may still have been running
        text = (await run(running, "1")).text


async def test_a_code_that_reads_the_next_cell_gets_that_alone(running: Sandbox) -> None:
    await run(
        running, FIND + "import threading\nthreading.Thread(target=lambda: control.recv(1_000), daemon=True).start()"
    )

    async def lose_one() -> None:
        """Both wait for a cell, and which of the two gets it is the kernel's choice."""
        for _ in range(100):
            await run(running, "1", seconds=1)

    with pytest.raises(Ended):
        await lose_one()


@pytest.mark.parametrize(
    "code",
    [
        "control.shutdown(socket.SHUT_RDWR)",
        "control.close(); import time; time.sleep(100)",
        "os.closerange(0, 65_536)",
        "os.closerange(3, 65_536)",
        "os.dup2(0, open_files[3])",
    ],
)
async def test_an_end_of_the_protocol_is_the_end(running: Sandbox, code: str) -> None:
    await run(running, FIND)
    with all_end(), pytest.raises(Ended):
        await run_twice(running, code)


async def run_twice(running: Sandbox, code: str) -> None:
    await run(running, code, seconds=1)
    await run(running, "1", seconds=1)


async def test_without_an_output_there_is_none(running: Sandbox) -> None:
    await run(running, "import os; os.close(1); os.close(2)")
    with all_end(), pytest.raises(Ended):
        await run(running, "print(5)")


async def test_files_that_it_sends_are_not_taken(running: Sandbox) -> None:
    await run(running, FIND)
    before = psutil.Process().num_fds()
    send = (
        "import array\nfor channel in (socket.socket(fileno=os.dup(1)), control):\n"
        "    for _ in range(3): socket.send_fds(channel, [b'D'], [os.open('/dev/zero', 0), os.open('/', 0)])"
    )
    await run(running, send)
    await run(running, "1")
    assert psutil.Process().num_fds() == before


async def test_names_in_outputs_reach_nothing_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    code = (
        "import os, socket\n"
        f"os.symlink({str(tmp_path / 'secret')!r}, 'absolute')\n"
        f"os.symlink('../' * 20 + {str(tmp_path / 'secret')!r}, 'relative')\n"
        f"os.symlink({str(tmp_path)!r}, 'folder')\nos.symlink('/proc/self/environ', 'environ')\n"
        "open('plain', 'w').write('plain')\nos.link('plain', 'hard')\nsocket.socket(socket.AF_UNIX).bind('socket')\n"
        "for make in (lambda: os.mkfifo('fifo'), lambda: os.mknod('device', 0o20666, os.makedev(1, 5))):\n"
        "    try: make()\n    except OSError as error: print(error.strerror)\n"
        "for given in ('/cells.py', os.__file__):\n"
        "    try: os.link(given, 'other')\n    except OSError as error: print(error.strerror)\n"
        "open('good', 'w').write('good'); None"
    )
    tool = CodeInterpreter()
    try:
        output = await tool.run(Call("1", {"code": code}, {}, lambda _: None))
    finally:
        await tool.close()
    assert output.content.startswith("Operation not permitted\n" * 2 + "Invalid cross-device link\n" * 2)
    assert [one.content for one in output.attachments] == ["data:application/octet-stream;name=good;base64,Z29vZA=="]


async def test_a_name_that_changes_all_the_time_reaches_nothing_outside(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("secret")
    code = (
        "import os, threading\nos.mkdir('real')\nopen('real/f', 'w').write('plain')\n"
        "def swap():\n    number = 0\n    while True:\n"
        f"        os.symlink({str(tmp_path)!r}, 'x')\n        os.rename('x', 'folder')\n"
        f"        os.remove('folder'); os.mkdir('folder'); open('folder/f', 'w').write(str(number)); number += 1\n"
        f"        os.symlink({str(tmp_path / 'f')!r}, 'x'); os.rename('x', 'folder/f')\n"
        "        os.remove('folder/f'); os.rmdir('folder')\n"
        "threading.Thread(target=swap, daemon=True).start(); None"
    )
    tool = CodeInterpreter()
    try:
        outputs = [await tool.run(Call("1", {"code": code}, {}, lambda _: None))]
        outputs += [await tool.run(Call("1", {"code": "1"}, {}, lambda _: None)) for _ in range(200)]
    finally:
        await tool.close()
    secret = "c2VjcmV0"  # base64
    assert not any(secret in str(one.content) for output in outputs for one in output.attachments)
    assert all("secret" not in output.content for output in outputs)


async def test_nothing_is_left_when_a_sandbox_ends(running: Sandbox) -> None:
    code = (
        "import threading, time, signal\nsignal.signal(15, signal.SIG_IGN)\n"
        "[threading.Thread(target=time.sleep, args=[1_000]).start() for _ in range(5)]; None"
    )
    await run(running, code)
    with all_end():
        await running.close()
