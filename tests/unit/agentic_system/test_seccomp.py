import re
import struct
from pathlib import Path

import pytest

from stack.agentic_system import seccomp

HEADERS = Path("/usr/include")
X86_64, AARCH64 = 0xC000003E, 0xC00000B7
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOTTY, ENOSYS, EAFNOSUPPORT = 1, 25, 38, 97


def judged(machine: str, number: int, *arguments: int, architecture: int | None = None) -> int:
    """What the program says of a call, by the meaning of its instructions (linux/filter.h)."""
    architecture = architecture or {"x86_64": X86_64, "aarch64": AARCH64}[machine]
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    code = [struct.unpack("=HBBI", piece) for piece in _pieces(seccomp.program(machine), 8)]
    at, loaded = 0, 0
    while True:
        operation, if_so, if_not, value = code[at]
        at += 1
        match operation:
            case 0x20:
                (loaded,) = struct.unpack_from("<I", data, value)
            case 0x06:
                return value
            case 0x15:
                at += if_so if loaded == value else if_not
            case 0x35:
                at += if_so if loaded >= value else if_not
            case 0x45:
                at += if_so if loaded & value else if_not
            case _:
                raise AssertionError(operation)


def numbers(machine: str) -> dict[str, int]:
    """The calls of a machine, by the headers of the kernel that compilers bring."""
    if machine == "x86_64":
        text = (HEADERS / "x86_64-linux-gnu/asm/unistd_64.h").read_text()
    else:
        text = (HEADERS / "asm-generic/unistd.h").read_text().replace("3264_fstatat", "_newfstatat")
    return {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)$", text, re.MULTILINE)}


def _pieces(whole: bytes, size: int) -> list[bytes]:
    return [whole[at : at + size] for at in range(0, len(whole), size)]


@pytest.mark.parametrize(("column", "machine"), [(0, "x86_64"), (1, "aarch64")])
def test_the_numbers_are_the_kernels(column: int, machine: str) -> None:
    known = numbers(machine)
    by_argument = {"clone": seccomp.CLONE, "ioctl": seccomp.IOCTL, "prctl": seccomp.PRCTL}
    by_argument |= dict(zip(("socket", "socketpair"), seccomp.SOCKETS, strict=True))
    for name, both in (seccomp.ALLOWED | by_argument).items():
        assert known.get(name) == both[column], name


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_all_calls_but_those_listed_are_refused(machine: str) -> None:
    known = numbers(machine)
    by_argument = {"clone", "ioctl", "prctl", "socket", "socketpair"}
    for name, number in known.items():
        if name in seccomp.ALLOWED:
            assert judged(machine, number) == ALLOW, name
        elif name not in by_argument:
            assert judged(machine, number) == ERRNO | (ENOSYS if number >= 424 else EPERM), name


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize(
    ("call", "arguments", "verdict"),
    [
        ("clone", (0x3D0F00,), ALLOW),  # as threads are made
        ("clone", (0x01200011,), ERRNO | EPERM),  # as fork makes processes
        ("clone", (0x4111,), ERRNO | EPERM),  # … and vfork
        ("clone", (0x3D0F00 | 0x10000000,), ERRNO | EPERM),
        ("clone", (0x3D0F00 | 0x00020000,), ERRNO | EPERM),
        ("clone", (0x3D0F00 | 0x40000000,), ERRNO | EPERM),
        ("clone", (0x3D0F00 | 1 << 40,), ALLOW),  # the kernel looks at 32 bits
        ("clone", (0x11 | 0x10000 << 32,), ERRNO | EPERM),
        ("socket", (1, 1), ALLOW),
        ("socket", (2, 1), ERRNO | EAFNOSUPPORT),
        ("socket", (10, 2), ERRNO | EAFNOSUPPORT),
        ("socket", (16, 3), ERRNO | EAFNOSUPPORT),
        ("socketpair", (1, 1), ALLOW),
        ("socketpair", (30, 1), ERRNO | EAFNOSUPPORT),
        ("ioctl", (0, 0x5401), ALLOW),
        ("ioctl", (0, 0x5412), ERRNO | ENOTTY),  # TIOCSTI
        ("ioctl", (0x5401, 0x541C), ERRNO | ENOTTY),  # TIOCLINUX
        ("prctl", (15,), ALLOW),
        ("prctl", (1,), ERRNO | EPERM),  # PR_SET_PDEATHSIG
        ("prctl", (22,), ERRNO | EPERM),  # PR_SET_SECCOMP
    ],
)
def test_calls_that_go_by_an_argument(machine: str, call: str, arguments: tuple[int, ...], verdict: int) -> None:
    assert judged(machine, numbers(machine)[call], *arguments) == verdict


def test_the_ways_of_other_architectures_are_closed() -> None:
    assert judged("x86_64", 20, architecture=0x40000003) == KILL  # int 0x80: writev here, getpid there
    assert judged("x86_64", 0, architecture=AARCH64) == KILL
    assert judged("aarch64", 63, architecture=0x40000028) == KILL
    for name, number in numbers("x86_64").items():  # x32
        assert judged("x86_64", 0x40000000 | number, 1) == ERRNO | ENOSYS, name


def test_a_machine_that_is_not_known_has_no_filter() -> None:
    with pytest.raises(seccomp.UnknownMachine, match="no filter of system calls for riscv64; only for x86_64, aarch64"):
        seccomp.program("riscv64")
