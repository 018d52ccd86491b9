"""The set-up where something is missing: one clear line that says what to do, and a non-zero exit status."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import local_stack


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in which nothing is set up."""
    return copy_checkout(tmp_path / "checkout")


def copy_checkout(folder: Path) -> Path:
    (folder / "scripts").mkdir(parents=True)
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "scripts/setup",
        "scripts/prepare.py",
        "scripts/constraints.txt",
        "scripts/constraints-gpu.txt",
    ):
        shutil.copy(local_stack.ROOT / name, folder / name)
    return folder


def setup(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    given = os.environ | {"STACK_HOME": str(checkout / "home"), "PYTHON": sys.executable} | environment
    command = [str(checkout / "scripts" / "setup")]
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False, timeout=300)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on the standard error."""
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("setup: ")
    return line


def test_without_python(checkout: Path) -> None:
    assert "install Python 3.11 or newer" in refusal(setup(checkout, PYTHON="python-that-is-not-there"))


def test_with_an_old_python(checkout: Path) -> None:
    old = checkout / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    assert "Python 3.9.1 found, but Python 3.11" in refusal(setup(checkout, PYTHON=str(old)))


def test_with_a_home_that_cannot_be_written(checkout: Path) -> None:
    assert "set STACK_HOME to a folder that you may write to" in refusal(setup(checkout, STACK_HOME="/proc/home"))


def test_without_a_network(checkout: Path) -> None:
    offline = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    line = refusal(setup(checkout, PIP_RETRIES="0", PIP_CONFIG_FILE=os.devnull, **offline))
    assert "check the network" in line


def test_a_step_is_judged_by_its_own_output(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "setup.log").write_text("No space left on device\n")
    test_without_a_network(checkout)


@pytest.mark.parametrize(("made", "needed"), [(None, 5000), ("bin/uv", 5000), ("setup.stamp", 1000)])
def test_the_space_it_needs_depends_on_what_is_set_up(
    checkout: Path, tmp_path: Path, made: str | None, needed: int
) -> None:
    if made:
        file = checkout / ".venv" / made
        file.parent.mkdir(parents=True)
        file.touch(mode=0o755)
    df = tmp_path / "bin" / "df"
    df.parent.mkdir()
    df.write_text("#!/bin/sh\necho header\necho tmpfs 9 9 20 9% /\n")
    df.chmod(0o755)
    line = refusal(setup(checkout, PATH=f"{df.parent}:{os.environ['PATH']}"))
    assert f"has 20 MB left and needs {needed}" in line


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, less than an environment takes."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    mount = tmp_path / "full"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], check=True)
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_with_a_full_disk(full_disk: Path) -> None:
    assert "the disk is full" in refusal(setup(copy_checkout(full_disk / "checkout")))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, "{user}/.llama-stack-ray"),
        ("~/my stack", "{user}/my stack"),
        ("~", "{user}"),
        ("my stack", "{here}/my stack"),
        ("../b", "{here}/../b"),
        ("/a b/~c", "/a b/~c"),
    ],
)
def test_the_home_folder_is_meant_from_where_the_user_stands(tmp_path: Path, given: str | None, meant: str) -> None:
    checkout = copy_checkout(tmp_path / "a checkout")
    here, user = tmp_path / "a folder", tmp_path / "a user"
    here.mkdir()
    environment = os.environ | {"HOME": str(user), "STACK_HOME": given or ""}
    command = [str(checkout / "scripts" / "setup"), "--help"]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=True)
    expected = os.path.normpath(meant.format(user=user, here=here))
    assert f"(STACK_HOME={expected}," in done.stdout


@pytest.mark.parametrize("name", ["serve", "quickstart", "test"])
def test_the_commands_hand_the_home_folder_on(tmp_path: Path, name: str) -> None:
    scripts = tmp_path / "a checkout" / "scripts"
    scripts.mkdir(parents=True)
    shutil.copy(local_stack.ROOT / "scripts" / name, scripts / name)
    (scripts / "setup").write_text('#!/bin/sh\necho "$STACK_HOME"\nexit 3\n')
    (scripts / "setup").chmod(0o755)
    environment = os.environ | {"STACK_HOME": "my stack"}
    done = subprocess.run(
        [str(scripts / name)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (3, f"{tmp_path}/my stack\n")


def test_help(checkout: Path) -> None:
    command = [str(checkout / "scripts" / "setup"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: scripts/setup")
