"""Whole models of jobs, where artifacts are in object storage: engines load a copy of theirs."""

import errno
import shutil
from pathlib import Path

import pytest

from stack import trained_models
from stack.errors import StorageFull

NAME = "acme/models/small-tune"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    folder = tmp_path / "made"
    for name in ("config.json", "model.safetensors", "best/model.safetensors", "tensorboard/events"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def files_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_a_model_is_copied_without_what_no_engine_reads(home: Path, made: Path) -> None:
    kept = trained_models.keep(NAME, made)
    assert kept == home / "trained" / NAME
    assert files_in(home / "trained") == {f"{NAME}/config.json", f"{NAME}/model.safetensors"}


def test_another_attempt_takes_the_place_of_the_one_before(home: Path, made: Path) -> None:
    (trained_models.keep(NAME, made) / "left").touch()
    trained_models.keep(NAME, made)
    assert files_in(home / "trained" / NAME) == {"config.json", "model.safetensors"}


def test_a_copy_that_finds_no_room_leaves_nothing(home: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path, __: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(StorageFull, match="the disk of STACK_HOME is full"):
        trained_models.keep(NAME, made)
    assert files_in(home / "trained") == set()


def test_a_copy_goes_with_its_model_and_no_other_folder_does(home: Path, made: Path) -> None:
    kept = trained_models.keep(NAME, made)
    for other in (str(made), "models/small", str(home / "models")):
        trained_models.forget({"path": other})
    assert kept.is_dir()
    trained_models.forget({"path": str(kept)})
    assert not kept.exists()
    assert made.is_dir()
