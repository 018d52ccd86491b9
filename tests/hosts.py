"""Hosts of a network on this one machine: each with addresses, processes, mounts and a name of its own (namespaces).

What runs on a host sees no process of others, listens at the host's addresses alone, and has a /tmp/ray and a /root of
its own; all other files are the machine's, and of those in /root the Python that runs this, and what a host is to keep.
A host ends like one that loses its power, and with whoever started it.
All of it needs root, and iproute2.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# The first process of a host: it mounts the folders, says that it is there, and reaps whoever loses their parents.
INIT = """
set -e
mkdir -p /tmp/ray
mount --bind "$1/ray" /tmp/ray
for kept in "${@:3}"; do
  case "$kept" in /root/*) mkdir -p "$1$kept"; mount --bind "$kept" "$1$kept" ;; esac
done
mount --rbind "$1/root" /root
hostname "$2"
ip link set lo up
echo ready
sleep infinity &
wait
"""
NAMESPACES = ("--net", "--pid", "--mount", "--uts")
RUN_S = 600


@dataclass(frozen=True)
class Host:
    """One that runs: `folder` has its /tmp/ray as `ray` and its /root as `root`, `first` is its first process, and
    `link` is what connects it to the network, as this machine names it."""

    name: str
    address: str
    folder: Path
    first: psutil.Process
    link: str

    def command(self, *command: str) -> list[str]:
        """What runs a command on it."""
        return ["nsenter", "--target", str(self.first.pid), *NAMESPACES, "--wdns=/", "--", *command]

    def start(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """Starts a command on it."""
        return subprocess.Popen(self.command(*command), **options)

    def run(
        self, *command: str, environment: Mapping[str, str] | None = None, seconds: float = RUN_S
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on it to its end, with these variables beside ours, whatever its status."""
        return subprocess.run(
            self.command(*command),
            env=os.environ | (environment or {}),
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )

    def processes(self, part: str = "") -> list[psutil.Process]:
        """Its processes whose command line has a part; its first one aside."""
        found = []
        for process in self.first.children(recursive=True):
            try:
                if part in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def lose_power(self) -> None:
        """Ends all its processes at once. Nobody is told: what they would have said of it does not get out."""
        _ip("link", "set", self.link, "down")
        self.first.send_signal(signal.SIGKILL)
        self.first.wait(60)


class Network:
    """Hosts, and this machine at `address`, which reach each other. Nothing else is reached from them."""

    def __init__(self, folder: Path, prefix: str, held: ExitStack) -> None:
        self.address = f"{prefix}.1"
        self._bridge = bridge_of(prefix)
        self._folder = folder
        self._prefix = prefix
        self._held = held
        self._count = 0
        _ip("link", "add", self._bridge, "type", "bridge")
        held.callback(_ip, "link", "delete", self._bridge)
        _ip("address", "add", f"{self.address}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")

    def host(self, name: str, number: int, keeps: Sequence[Path] = ()) -> Host:
        """Starts a host whose address ends with a number. One that has lost its power has kept its files.

        `keeps` are folders that it finds where this machine has them, also where that is in /root.
        """
        self._count += 1
        folder = self._folder / name
        for part in ("ray", "root"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        started = subprocess.Popen(
            [
                *("unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"),
                *("bash", "-c", INIT, name, folder, name, sys.base_prefix, *keeps),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        self._held.callback(_end, started)
        assert started.stdout is not None
        if started.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the host {name} does not start")
        (first,) = psutil.Process(started.pid).children()
        outside, inside = f"{self._bridge}-{self._count}", "eth0"
        # As of hardware, which others remember over a loss of power: one with another MAC they reach a minute later.
        mac = ":".join(f"{part:02x}" for part in (2, 0, *map(int, f"{self._prefix}.{number}".split("."))))
        _ip("link", "add", outside, "type", "veth", "peer", "name", inside, "address", mac, "netns", str(first.pid))
        _ip("link", "set", outside, "master", self._bridge, "up")
        host = Host(name, f"{self._prefix}.{number}", folder, first, outside)
        for command in (
            ("address", "add", f"{host.address}/24", "dev", inside),
            ("link", "set", inside, "up"),
        ):
            subprocess.run(host.command("ip", *command), check=True)
        return host


@contextmanager
def network(folder: Path, prefix: str = "10.77.0") -> Iterator[Network]:
    """A network without hosts, whose files are in a folder. One that was left behind is taken away before.

    All addresses begin with the prefix; two networks at a time have two of them. Raises RuntimeError where there can be
    none.
    """
    missing = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        raise RuntimeError(f"hosts on this machine need {', '.join(['root', *missing])}")
    for left in Path("/sys/class/net").glob(f"{bridge_of(prefix)}*"):  # with hosts that have not quite ended, too
        subprocess.run(["ip", "link", "delete", left.name], stderr=subprocess.DEVNULL, check=False)
    with ExitStack() as held:
        yield Network(folder, prefix, held)


def bridge_of(prefix: str) -> str:
    """The name of a network's bridge on this machine: names of interfaces are short."""
    return "h" + prefix.replace(".", "-")


def _end(started: subprocess.Popen[bytes]) -> None:
    started.kill()  # and with it the first process of the host, by which all others end
    started.wait()
    assert started.stdout is not None
    started.stdout.close()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
