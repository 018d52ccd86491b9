"""Whole models of jobs, where artifacts are in object storage: engines load a copy of theirs."""

import datetime as dt
import errno
import os
import shutil
from pathlib import Path

import pytest

from stack import jobs, trained_models
from stack.context import Context
from stack.errors import StorageFull
from stack.post_training import artifact_name
from tests import samples

TENANT = "acme"
NAME = artifact_name(TENANT, "tune", whole=True)


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
    assert kept.is_relative_to(home / "trained")
    assert files_in(kept) == {"config.json", "model.safetensors"}


def test_the_copies_of_two_attempts_do_not_touch_each_other(home: Path, made: Path) -> None:
    first = trained_models.keep(NAME, made)
    second = trained_models.keep(NAME, made)
    assert first != second
    assert files_in(first) == files_in(second) == {"config.json", "model.safetensors"}


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


def old(copy: Path) -> Path:
    """A copy to which nothing was written for longer than sweeps wait."""
    long_ago = dt.datetime.now().timestamp() - 2 * trained_models.SWEEP_AFTER.total_seconds()
    for path in (*copy.iterdir(), copy):
        os.utime(path, (long_ago, long_ago))
    return copy


@pytest.mark.parametrize("tenant", ["default", TENANT])
def test_copies_that_no_model_has_are_swept(context: Context, made: Path, home: Path, tenant: str) -> None:
    samples.add_job(context.store, "tune", tenant=tenant)
    name = artifact_name(tenant, "tune", whole=True)
    lost, served, removed = (old(trained_models.keep(name, made)) for _ in range(3))
    of_another_database = old(trained_models.keep(artifact_name(tenant, "unknown", whole=True), made))
    samples.add_trained(context.store, "served", tenant, job_uuid="served", path=str(served))
    samples.add_trained(context.store, "removed", tenant, job_uuid="removed", path=str(removed))
    context.store.models.remove("removed", tenant)  # it ends its requests
    new = trained_models.keep(name, made)
    assert jobs.sweep(context) == [str(lost.relative_to(home))]
    left = [copy.is_dir() for copy in (lost, of_another_database, served, removed, new)]
    assert left == [False, True, True, True, True]
    assert jobs.sweep(context) == []


def test_a_file_among_the_copies_keeps_none_from_being_swept(context: Context, made: Path) -> None:
    samples.add_job(context.store, "tune", tenant=TENANT)
    copy = old(trained_models.keep(NAME, made))
    stray = copy.parent / ".nfs0001"
    stray.write_text("")
    os.utime(stray, (0, 0))
    jobs.sweep(context)
    assert (copy.exists(), stray.exists()) == (False, True)


def test_the_copy_of_a_model_stays_where_the_home_has_another_name_since(
    context: Context, made: Path, home: Path, tmp_path: Path
) -> None:
    samples.add_job(context.store, "tune", tenant=TENANT)
    served = old(trained_models.keep(NAME, made))
    (tmp_path / "before").symlink_to(home)
    path = str(tmp_path / "before" / served.relative_to(home))
    samples.add_trained(context.store, "served", TENANT, job_uuid="tune", path=path)
    assert jobs.sweep(context) == []
    assert served.is_dir()


def test_a_copy_that_is_under_way_is_not_swept(context: Context, made: Path) -> None:
    """Its folder was made long ago, and the one file in it is large."""
    samples.add_job(context.store, "tune", tenant=TENANT)
    copy = old(trained_models.keep(NAME, made))
    (copy / "model.safetensors").write_text("more")
    assert jobs.sweep(context) == []
    assert copy.is_dir()
