"""Preparing the model and the data: what is left behind, and why it failed in one line."""

import errno
import os
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from scripts import prepare

HOME = Path("/home of the stack")


def make(part: Path) -> None:
    (part / "file").write_text("made")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".model.lock"}


def test_what_broken_runs_left_is_swept(tmp_path: Path) -> None:
    for name in (".model-abc", ".model-abc-download", "model-2", ".other-abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    prepare.prepare(tmp_path / "model", "the model", make)
    assert names(tmp_path) == {"model", "model-2", ".other-abc"}


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        make(part)
        raise prepare.DownloadFailed("no")

    with pytest.raises(prepare.DownloadFailed):
        prepare.prepare(tmp_path / "model", "the model", fail)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("damage", ["file", prepare.MANIFEST])
def test_only_what_is_damaged_is_made_anew(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    prepare.prepare(folder, "the model", make)
    prepare.prepare(folder, "the model", lambda _: pytest.fail("it was whole"))
    (folder / damage).write_text("{")
    prepare.prepare(folder, "the model", make)
    assert (folder / "file").read_text() == "made"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        SafetensorError("I/O error: (os error 28)"),
        prepare.download_error("a==1", "ERROR: Could not install: [Errno 28] No space left on device"),
    ],
)
def test_a_full_disk_is_one_line(error: Exception) -> None:
    assert prepare.reason_of(error, HOME) == (
        f"the disk is full: {HOME} needs 1 GB. Free some and run scripts/setup again."
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_home_that_cannot_be_written_is_one_line(number: int) -> None:
    reason = prepare.reason_of(OSError(number, os.strerror(number), "/models"), HOME)
    assert reason == "cannot write to /models: set STACK_HOME to a folder that you may write to"


@pytest.mark.parametrize("error", [OSError("can't load the tokenizer"), ValueError("odd"), SafetensorError("odd")])
def test_other_faults_are_not_explained_away(error: Exception) -> None:
    assert prepare.reason_of(error, HOME) is None


def test_another_hash_is_not_a_network_problem() -> None:
    said = (
        "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated…\n"
        "    a==1 from http://127.0.0.1/a.whl:\n        Expected sha256 0\n             Got        1\n\n"
    )
    message = str(prepare.download_error("a==1", said))
    assert message.startswith("the package a==1 does not have the expected hash")
    assert message.endswith("(Got        1)")
    assert "network" not in message


@pytest.mark.parametrize("said", ["WARNING: retrying\nERROR: No matching distribution found\n", ""])
def test_a_failed_download_is_one_line(said: str) -> None:
    message = str(prepare.download_error("a==1", said))
    assert message.startswith("a==1 could not be downloaded: check the network")
    assert "WARNING" not in message
    assert "\n" not in message
    assert message.endswith("(ERROR: No matching distribution found)") == bool(said)


def test_the_command_says_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(part: Path) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(prepare, "make_model", fail)
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path)])
    assert prepare.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("setup: the disk is full")
