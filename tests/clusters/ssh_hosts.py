"""Hosts as docs/clusters.md asks for them: with SSH, a user `stack`, and the folder /mnt/stack that they share."""

import os
import shutil
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

from stack import config
from tests.hosts import Host
from tests.running_stack import wait_for

USER = "stack"
ID = 4321
HOME = Path(f"/home/{USER}")
CODE = HOME / "llama-stack-ray"
# Of a host, or of the one who sets its environment up: the user's home and the shared folder, at their places.
MOUNTS = f"""
set -e
mount -t tmpfs -o mode=755 none /home
mount -t tmpfs -o mode=755 none /mnt
mkdir {HOME} /mnt/stack
mount --bind "$1" {HOME}
mount --bind "$2" /mnt/stack
"""
ENVIRONMENT = f"""
mount --bind "$3" {CODE}/.venv
"""
SYSTEM = f"""
mount -t tmpfs -o mode=755 none /run
mkdir /run/sshd
mount --bind "$4/passwd" /etc/passwd
mkdir -p {CODE}/.venv
chown -R {ID}:{ID} /tmp/ray {HOME}
"""
SSHD = """
HostKey {folder}/host_key
PidFile none
UsePAM no
PasswordAuthentication no
"""


def key_pair(file: Path) -> Path:
    """Makes a key of SSH. Returns the file of its public half."""
    file.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)
    return file.with_name(f"{file.name}.pub")


def shared_folder(folder: Path) -> Path:
    """What hosts mount at /mnt/stack: with the models and the data that are prepared here already."""
    prepared = config.home()
    for name in ("models/SmolLM2-135M-Instruct", "models/all-MiniLM-L6-v2", "packaged-data"):
        shutil.copytree(prepared / name, folder / name)
    _give(folder)
    return folder


def environment(code: Path, shared: Path) -> Path:
    """The environment that scripts/setup makes on a host of this code, to be mounted on all of them.

    It takes minutes and 5 GB, so it is kept in this machine's STACK_HOME, and where it is there and fits, scripts/setup
    takes it as it is: here, and then on each host.
    """
    kept = config.home() / "hosts" / "venv"
    kept.mkdir(parents=True, exist_ok=True)
    script = MOUNTS + ENVIRONMENT + f"exec {CODE}/scripts/setup"
    (code / ".venv").mkdir()
    subprocess.run(
        ["unshare", "--mount", "bash", "-c", script, "setup", code.parent, shared, kept],
        env=os.environ | {"STACK_HOME": "/mnt/stack", "PYTHON": "/usr/bin/python3"},
        check=True,
        timeout=1800,
    )
    return kept


def prepare(host: Host, shared: Path, venv: Path, public_key: Path, held: ExitStack) -> None:
    """Makes of a host one as the docs ask for, and starts its sshd, which ends with it.

    One that has lost its power has kept the user's home, and nothing of what was in /tmp/ray.
    """
    home = host.folder / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700, exist_ok=True)
    for left in (host.folder / "ray").iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    shutil.copy(public_key, home / ".ssh" / "authorized_keys")
    user = f"{USER}:*:{ID}:{ID}::{HOME}:/bin/bash\n"
    (host.folder / "passwd").write_text(Path("/etc/passwd").read_text() + user)
    if not (host.folder / "host_key").exists():
        key_pair(host.folder / "host_key")
    settings = host.folder / "sshd_config"
    settings.write_text(SSHD.format(folder=host.folder))
    script = MOUNTS + SYSTEM + ENVIRONMENT  # the host keeps the folder of the environment
    done = host.run("bash", "-c", script, "prepare", str(home), str(shared), str(venv), str(host.folder))
    assert done.returncode == 0, done.stderr
    log = held.enter_context((host.folder / "sshd.log").open("wb"))
    clean = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    daemon = host.start("/usr/sbin/sshd", "-D", "-e", "-f", str(settings), stdout=log, stderr=log, env=clean)
    held.callback(daemon.wait)
    held.callback(daemon.kill)
    wait_for(lambda: _answers(host.address, 22), 30, (host.folder / "sshd.log").read_text)


def _give(folder: Path) -> None:
    """Makes a folder and all that is in it the user's."""
    subprocess.run(["chown", "-R", f"{ID}:{ID}", str(folder)], check=True)


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True
