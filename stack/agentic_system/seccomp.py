"""The system calls that a sandbox may make: a filter of the kernel's seccomp, as a program of its classic BPF.

What is not listed fails with "operation not permitted"; calls that are newer than the oldest of the new ones with
"not implemented", so that libraries go by the older ones. A call in the way of another architecture ends the process.
So there are no new processes (only threads), no namespaces, mounts, ptrace, keyrings, BPF, io_uring, userfaultfd or
performance counters, no memory that belongs to no address (memfd, System V), and no sockets but Unix ones.

References: seccomp(2); linux/filter.h, linux/seccomp.h, linux/audit.h for the numbers.
"""

import errno
import platform
import socket
import struct
from collections.abc import Iterable
from itertools import chain

# The numbers of calls: of x86_64, and of aarch64, where some of the old ones are not.
Numbers = tuple[int, int | None]
# fmt: off
ALLOWED: dict[str, Numbers] = {
    # files
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "lseek": (8, 62), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65),
    "writev": (20, 66), "access": (21, None), "getdents": (78, None), "getdents64": (217, 61), "getcwd": (79, 17),
    "chdir": (80, 49), "fchdir": (81, 50), "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None),
    "creat": (85, None), "link": (86, None), "unlink": (87, None), "symlink": (88, None), "readlink": (89, None),
    "chmod": (90, None), "fchmod": (91, 52), "umask": (95, 166), "flock": (73, 32), "fsync": (74, 82),
    "fdatasync": (75, 83), "truncate": (76, 45), "ftruncate": (77, 46), "statfs": (137, 43), "fstatfs": (138, 44),
    "utime": (132, None), "utimes": (235, None), "openat": (257, 56), "mkdirat": (258, 34), "newfstatat": (262, 79),
    "unlinkat": (263, 35), "renameat": (264, 38), "renameat2": (316, 276), "linkat": (265, 37),
    "symlinkat": (266, 36), "readlinkat": (267, 78), "fchmodat": (268, 53), "faccessat": (269, 48),
    "faccessat2": (439, 439), "utimensat": (280, 88), "statx": (332, 291), "fallocate": (285, 47),
    "fadvise64": (221, 223), "copy_file_range": (326, 285), "sendfile": (40, 71), "preadv": (295, 69),
    "pwritev": (296, 70), "preadv2": (327, 286), "pwritev2": (328, 287), "getxattr": (191, 8), "lgetxattr": (192, 9),
    "fgetxattr": (193, 10), "listxattr": (194, 11), "llistxattr": (195, 12), "flistxattr": (196, 13),
    "fcntl": (72, 25), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "close_range": (436, 436),
    # waiting
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create": (213, None),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441), "eventfd": (284, None), "eventfd2": (290, 19), "timerfd_create": (283, 85),
    "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87), "nanosleep": (35, 101), "clock_nanosleep": (230, 115),
    "pause": (34, None),
    # memory
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "msync": (26, 227), "madvise": (28, 233),
    # this process, and its threads
    "execve": (59, 221), "exit": (60, 93), "exit_group": (231, 94), "wait4": (61, 260), "waitid": (247, 95),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getpgid": (121, 155), "getpgrp": (111, None),
    "getsid": (124, 156), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158), "setgroups": (116, 159),
    "setresuid": (117, 147), "setresgid": (119, 149), "setpriority": (141, 140), "getpriority": (140, 141),
    "getrlimit": (97, 163), "setrlimit": (160, 164), "prlimit64": (302, 261), "getrusage": (98, 165),
    "times": (100, 153), "uname": (63, 160), "sysinfo": (99, 179), "getcpu": (309, 168), "arch_prctl": (158, None),
    "set_tid_address": (218, 96), "set_robust_list": (273, 99), "get_robust_list": (274, 100), "rseq": (334, 293),
    "futex": (202, 98), "membarrier": (324, 283), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "sched_getparam": (143, 121), "sched_getscheduler": (145, 120), "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126), "restart_syscall": (219, 128),
    # signals
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103),
    # time, chance
    "gettimeofday": (96, 169), "time": (201, None), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "getrandom": (318, 278),
    # sockets
    "accept": (43, 202), "accept4": (288, 242), "bind": (49, 200), "connect": (42, 203), "listen": (50, 201),
    "getsockname": (51, 204), "getpeername": (52, 205), "getsockopt": (55, 209), "setsockopt": (54, 208),
    "shutdown": (48, 210), "sendto": (44, 206), "recvfrom": (45, 207), "sendmsg": (46, 211), "recvmsg": (47, 212),
    "sendmmsg": (307, 269), "recvmmsg": (299, 243),
}
# Calls that are allowed by one argument: which one, and how it is judged. The kernel takes all of them as 32 bits.
CLONE: Numbers = (56, 220)
SOCKETS: tuple[Numbers, ...] = ((41, 198), (53, 199))  # socket, socketpair
IOCTL: Numbers = (16, 29)
PRCTL: Numbers = (157, 167)
# fmt: on
CLONE_THREAD = 0x10000
# CLONE_NEW…: mount, cgroup, UTS, IPC, user, PID and network namespaces.
CLONE_NAMESPACES = 0x20000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
# Whether it is a terminal, how wide it is; how much there is to read; blocking and closing.
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
PRCTLS = (15, 16)  # a thread's name
# From here on all architectures have the same numbers.
FIRST_NEW = 424

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
# Where struct seccomp_data has them. Both machines are little-endian: the low half of an argument comes first.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_LOAD, _RETURN = 0x20, 0x06
_IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT = 0x15, 0x35, 0x45
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_INSTRUCTION = struct.Struct("=HBBI")


class UnknownMachine(Exception):
    """A machine for which there is no filter."""


def program(machine: str | None = None) -> bytes:
    """The filter for this machine, as bubblewrap takes it: struct sock_filter, one after another.

    Raises UnknownMachine.
    """
    machine = machine or platform.machine()
    if machine not in _MACHINES:
        raise UnknownMachine(f"there is no filter of system calls for {machine}; only for {', '.join(_MACHINES)}")
    column, architecture = _MACHINES[machine]
    code = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_IF_EQUAL, architecture, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
    ]
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            code += [_instruction(_IF_EQUAL, number, 0, 1), _instruction(_RETURN, _ALLOW)]
    code += _call(CLONE[column], 0, [
        _instruction(_IF_ANY_BIT, CLONE_NAMESPACES, 1, 0),
        _instruction(_IF_ANY_BIT, CLONE_THREAD, 1, 0),
        _instruction(_RETURN, _ERRNO | errno.EPERM),
        _instruction(_RETURN, _ALLOW),
    ])  # fmt: skip
    for numbers in SOCKETS:
        code += _call(numbers[column], 0, _one_of([socket.AF_UNIX], errno.EAFNOSUPPORT))
    code += _call(IOCTL[column], 1, _one_of(IOCTLS, errno.ENOTTY))
    code += _call(PRCTL[column], 0, _one_of(PRCTLS, errno.EPERM))
    # … which those of the other way to call on x86_64 (x32) are beyond, too.
    code += [
        _instruction(_IF_AT_LEAST, FIRST_NEW, 0, 1),
        _instruction(_RETURN, _ERRNO | errno.ENOSYS),
        _instruction(_RETURN, _ERRNO | errno.EPERM),
    ]
    return b"".join(code)


def _instruction(operation: int, value: int, if_so: int = 0, if_not: int = 0) -> bytes:
    """`if_so` and `if_not` are how many of the next instructions a condition leaps."""
    return _INSTRUCTION.pack(operation, if_so, if_not, value)


def _call(number: int | None, argument: int, judged: list[bytes]) -> list[bytes]:
    """What judges a call by an argument. `judged` finds it loaded, and all its ways end the program."""
    assert number is not None
    load = _instruction(_LOAD, _ARGUMENTS + 8 * argument)
    return [_instruction(_IF_EQUAL, number, 0, len(judged) + 1), load, *judged]


def _one_of(values: Iterable[int], otherwise: int) -> list[bytes]:
    """Allows these values alone; others fail with the error's number `otherwise`."""
    allowed = [(_instruction(_IF_EQUAL, value, 0, 1), _instruction(_RETURN, _ALLOW)) for value in values]
    return [*chain.from_iterable(allowed), _instruction(_RETURN, _ERRNO | otherwise)]
