"""Experiments, runs and their artifacts: names, pages, metadata, quotas, and whose they are."""

import base64
import datetime as dt
import errno
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from stack import experiments
from stack.api.experiments import (
    CreateExperimentRequest,
    CreateRunRequest,
    DeleteArtifactRequest,
    ListArtifactsRequest,
    UpdateExperimentRequest,
    UpdateRunRequest,
    UploadArtifactRequest,
)
from stack.artifacts import MANIFEST, Artifacts
from stack.context import Context
from stack.errors import BadInput, Conflict, NotFound, StorageFull, TooLarge
from stack.store import Adapter, Artifact, Store, now
from tests import samples
from tests.s3 import S3

NOBODYS = "0" * 32


def create(context: Context, name: str = "first", **metadata: Any) -> str:
    return experiments.create(context, CreateExperimentRequest(name=name, metadata=metadata)).id


def create_run(context: Context, experiment_id: str, **metadata: Any) -> str:
    return experiments.create_run(context, CreateRunRequest(experiment_id=experiment_id, metadata=metadata)).id


def upload(context: Context, experiment_id: str, content: bytes | str = b"content", **changes: Any) -> str:
    """Uploads bytes, or a text as it is in place of their base64."""
    text = content if isinstance(content, str) else base64.b64encode(content).decode()
    fields = dict(experiment_id=experiment_id, name="loss.png", artifact_type="plot", content=text)
    return experiments.upload(context, UploadArtifactRequest(**(fields | changes))).id


def list_artifacts(context: Context, experiment_id: str, **page: Any) -> list[str]:
    request = ListArtifactsRequest(experiment_id=experiment_id, **page)
    return [artifact.id for artifact in experiments.page_of_artifacts(context, request)]


def delete(context: Context, artifact_id: str) -> None:
    experiments.delete(context, DeleteArtifactRequest(artifact_id=artifact_id))


def stored(context: Context) -> list[str]:
    """The files that lie among the artifacts."""
    folder = Path(context.config.artifacts_url.removeprefix("file://"))
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def bounded(context: Context, **bounds: int) -> Context:
    return replace(context, config=context.config.model_copy(update=bounds))


# Experiments


def test_an_experiment_is_found_as_it_was_opened(context: Context) -> None:
    made = experiments.create(context, CreateExperimentRequest(name="first", metadata={"lr": 0.1}))
    assert (made.name, made.status, made.metadata) == ("first", "not_started", {"lr": 0.1})
    assert made.created_at == made.updated_at
    assert experiments.get(context, made.id) == made


def test_the_same_again_is_the_same_and_other_metadata_are_a_conflict(context: Context) -> None:
    first = create(context, "first", lr=0.1)
    assert create(context, "first", lr=0.1) == first
    with pytest.raises(Conflict, match="there is an experiment 'first' with other metadata") as caught:
        create(context, "first", lr=0.2)
    assert caught.value.param == "name"
    assert create(context, "second", lr=0.1) != first
    assert create(context.of_tenant("acme"), "first", lr=0.2) != first


def test_many_who_open_one_at_once_get_the_same(context: Context) -> None:
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(lambda _: create(context, "first"), range(8)))) == 1


def test_experiments_are_listed_newest_first_in_pages(context: Context) -> None:
    made = [create(context, f"experiment {number}") for number in range(5)]
    create(context.of_tenant("acme"))
    everything = [one.id for one in experiments.page(context, None, 100)]
    assert sorted(everything) == sorted(made)
    times = [experiments.get(context, one).created_at for one in everything]
    assert times == sorted(times, reverse=True)
    pages, after = [], None
    while page := experiments.page(context, after, 2):
        pages.append([one.id for one in page])
        after = page[-1].id
    assert pages == [everything[:2], everything[2:4], everything[4:]]


def test_metadata_are_changed_key_by_key(context: Context) -> None:
    made = create(context, lr=0.1, note="old")
    changes = UpdateExperimentRequest(experiment_id=made, status="running", metadata={"note": None, "seed": 1})
    changed = experiments.update(context, changes)
    assert (changed.status, changed.metadata) == ("running", {"lr": 0.1, "seed": 1})
    assert changed.updated_at >= changed.created_at
    assert experiments.get(context, made) == changed
    assert experiments.update(context, UpdateExperimentRequest(experiment_id=made)).metadata == {"lr": 0.1, "seed": 1}


def test_metadata_that_many_change_at_once_are_all_there(context: Context) -> None:
    made = create(context)

    def change(number: int) -> None:
        experiments.update(context, UpdateExperimentRequest(experiment_id=made, metadata={f"key {number}": number}))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(change, range(24)))
    assert experiments.get(context, made).metadata == {f"key {number}": number for number in range(24)}


def test_metadata_do_not_grow_without_bound(context: Context) -> None:
    made = create(context)
    experiments.update(context, UpdateExperimentRequest(experiment_id=made, metadata={"a": "x" * 12_000}))
    with pytest.raises(BadInput, match="the metadata, with those that are there") as caught:
        experiments.update(context, UpdateExperimentRequest(experiment_id=made, metadata={"b": "x" * 12_000}))
    assert caught.value.param == "metadata"
    assert list(experiments.get(context, made).metadata) == ["a"]


# Runs


def test_a_run_is_found_as_it_was_opened_and_changed(context: Context) -> None:
    experiment = create(context)
    run_id = create_run(context, experiment, seed=1)
    run = experiments.get_run(context, run_id)
    assert (run.experiment_id, run.status, run.ended_at, run.metadata) == (experiment, "running", None, {"seed": 1})
    changes = UpdateRunRequest(
        run_id=run_id, status="stopped early", ended_at="2999-01-01T00:00:00Z", metadata={"a": 2}
    )
    changed = experiments.update_run(context, changes)
    assert (changed.status, changed.ended_at) == ("stopped early", "2999-01-01T00:00:00.000Z")
    assert changed.metadata == {"seed": 1, "a": 2}
    assert experiments.get_run(context, run_id) == changed


def test_a_run_does_not_end_before_it_starts(context: Context) -> None:
    run_id = create_run(context, create(context))
    with pytest.raises(BadInput, match="it started at") as caught:
        experiments.update_run(context, UpdateRunRequest(run_id=run_id, ended_at="2001-01-01T00:00:00Z"))
    assert caught.value.param == "ended_at"


def test_runs_are_listed_by_experiment_in_pages(context: Context) -> None:
    first, second = create(context, "first"), create(context, "second")
    made = [create_run(context, first) for _ in range(3)]
    other = create_run(context, second)
    everything = [run.id for run in experiments.page_of_runs(context, first, None, 100)]
    assert sorted(everything) == sorted(made)
    assert [run.id for run in experiments.page_of_runs(context, first, everything[0], 1)] == everything[1:2]
    assert [run.id for run in experiments.page_of_runs(context, second, None, 100)] == [other]


def test_a_job_opens_its_run_in_the_experiment_of_its_kind(context: Context) -> None:
    job = samples.add_job(context.store, "job-1")
    (experiment,) = experiments.page(context, None, 10)
    assert experiment.name == "evaluate"
    (run,) = experiments.page_of_runs(context, experiment.id, None, 10)
    assert (run.id, run.metadata["job_uuid"]) == (job.run_id, "job-1")
    assert create(context, "evaluate") == experiment.id


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"status": "completed"}, "status"),
        ({"ended_at": "2999-01-01T00:00:00Z"}, "ended_at"),
        ({"metadata": {"job_uuid": "other"}}, "metadata.job_uuid"),
        ({"metadata": {"kind": None}}, "metadata.kind"),
    ],
)
def test_a_job_says_itself_how_its_run_stands(context: Context, changes: dict[str, Any], param: str) -> None:
    run_id = samples.add_job(context.store, "job-1").run_id
    before = experiments.get_run(context, run_id)
    with pytest.raises(Conflict, match="is of the job 'job-1', which sets") as caught:
        experiments.update_run(context, UpdateRunRequest(run_id=run_id, **changes))
    assert caught.value.param == param
    assert experiments.get_run(context, run_id) == before


def test_further_metadata_of_a_jobs_run_can_be_changed(context: Context) -> None:
    run_id = samples.add_job(context.store, "job-1").run_id
    changed = experiments.update_run(context, UpdateRunRequest(run_id=run_id, metadata={"note": "good"}))
    assert changed.metadata == {"job_uuid": "job-1", "kind": "evaluate", "note": "good"}
    samples.start(context.store, "job-1")
    assert experiments.get_run(context, run_id).status == "running"


def test_a_run_that_only_names_a_job_is_its_owners(context: Context) -> None:
    samples.add_job(context.store, "job-1")
    run_id = create_run(context, create(context), job_uuid="job-1")
    assert experiments.update_run(context, UpdateRunRequest(run_id=run_id, status="done")).status == "done"


# Artifacts


def test_an_uploaded_file_is_found_with_its_size_and_hash(context: Context) -> None:
    experiment = create(context)
    run_id = create_run(context, experiment)
    artifact = experiments.get_artifact(
        context, upload(context, experiment, b"content", run_id=run_id, metadata={"a": 1})
    )
    assert (artifact.name, artifact.type, artifact.size, artifact.metadata) == ("loss.png", "plot", 7, {"a": 1})
    assert (artifact.experiment_id, artifact.run_id) == (experiment, run_id)
    (file,) = artifact.files
    assert (file.name, file.bytes, file.sha256) == ("content", 7, hashlib.sha256(b"content").hexdigest())
    assert file.url == f"/artifacts/content?artifact_id={artifact.id}&file=content"
    row, found = experiments.find_file(context, artifact.id, None)
    assert b"".join(experiments.content(context, row, found, 0, found.bytes)) == b"content"
    assert stored(context) == [f"experiments/{artifact.id}/content", f"experiments/{artifact.id}/{MANIFEST}"]


def test_an_uploaded_file_in_object_storage_is_found_too(context: Context, s3: S3, tmp_path: Path) -> None:
    context = replace(context, artifacts=Artifacts(s3.bucket(), cache=tmp_path / "cache"))
    made = upload(context, create(context), b"content")
    artifact = experiments.get_artifact(context, made)
    assert artifact.path.startswith("s3://")
    row, found = experiments.find_file(context, made, "content")
    assert b"".join(experiments.content(context, row, found, 3, 7)) == b"tent"
    delete(context, made)
    assert not context.artifacts.exists(row.path)


def test_an_empty_file_and_files_of_one_name_can_be_kept(context: Context) -> None:
    experiment = create(context)
    ids = [upload(context, experiment, b""), upload(context, experiment, b"")]
    assert sorted(list_artifacts(context, experiment)) == sorted(ids)
    assert experiments.get_artifact(context, ids[0]).files[0].bytes == 0


def test_artifacts_are_listed_by_experiment_newest_first_in_pages(context: Context) -> None:
    first, second = create(context, "first"), create(context, "second")
    made = [upload(context, first) for _ in range(3)]
    upload(context, second)
    everything = list_artifacts(context, first)
    assert sorted(everything) == sorted(made)
    assert list_artifacts(context, first, limit=2) == everything[:2]
    assert list_artifacts(context, first, limit=2, after=everything[1]) == everything[2:]


@pytest.mark.parametrize("content", ["a", "====", "a-_=", "YQ==\n", "YQ", "YQ==YQ==", "ä", "Y Q="])
def test_content_that_is_not_base64_is_refused(context: Context, content: str) -> None:
    with pytest.raises(BadInput, match="the content is not base64"):
        upload(context, create(context), content)
    assert stored(context) == []


def test_content_over_the_bound_is_refused_before_it_is_decoded(context: Context) -> None:
    context, experiment = bounded(context, max_artifact_bytes=1_024), create(context)
    upload(context, experiment, bytes(1_024))
    for content in (bytes(1_025), bytes(1_026), bytes(2_000)):
        with pytest.raises(TooLarge, match="1024"):
            upload(context, experiment, content)
    with pytest.raises(TooLarge):
        upload(context, experiment, "!" * 2_000)


@pytest.mark.parametrize("name", ["../a", "..", "a/b", "/a", "a\\b", "a\0", "a\nb", "", " ", ".", "a/../b", "C:\\a"])
def test_a_name_with_the_meaning_of_a_path_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        UploadArtifactRequest(experiment_id=NOBODYS, name=name, artifact_type="plot", content="")


@pytest.mark.parametrize("name", ["loss.png", "Grüße aus Köln (2).txt", ".hidden", "con", "a" * 255])
def test_other_names_are_kept_as_they_are(context: Context, name: str) -> None:
    assert experiments.get_artifact(context, upload(context, create(context), name=name)).name == name


def test_a_tenant_keeps_no_more_than_its_quota(context: Context) -> None:
    context, experiment = bounded(context, max_tenant_bytes=1_024), create(context)
    first = upload(context, experiment, bytes(1_000))
    before = stored(context)
    with pytest.raises(StorageFull, match="keeps 1000 bytes already, and 25 more are needed; allowed: 1024"):
        upload(context, experiment, bytes(25))
    assert stored(context) == before
    other = context.of_tenant("acme")
    upload(other, create(other), bytes(1_000))
    delete(context, first)
    upload(context, experiment, bytes(1_024))


def test_what_jobs_have_made_counts(context: Context) -> None:
    context = bounded(context, max_tenant_bytes=1_024)
    job = samples.add_job(context.store, "job-1")
    experiment = context.store.telemetry.run_experiment("default", job.run_id)
    made = Artifact("1" * 32, "default", experiment, job.run_id, "job-1", "model", "a", 1_000, {}, created_at=now())
    context.store.artifacts.add(made)
    with pytest.raises(StorageFull):
        upload(context, experiment, bytes(25))


def test_a_disk_that_is_full_is_said_to_be_and_leaves_nothing(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = create(context)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(context.artifacts._files, "put_file", full)
    with pytest.raises(StorageFull, match="the disk of the artifacts is full"):
        upload(context, experiment)
    assert stored(context) == []
    assert list_artifacts(context, experiment) == []


def test_files_without_a_row_are_not_listed_and_do_not_count(context: Context) -> None:
    """What a process leaves that dies between the two."""
    experiment = create(context)

    def die(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT"):
            raise KeyboardInterrupt

    event.listen(context.store.engine, "before_cursor_execute", die)
    with pytest.raises(KeyboardInterrupt):
        upload(context, experiment)
    event.remove(context.store.engine, "before_cursor_execute", die)
    assert stored(context)
    assert list_artifacts(context, experiment) == []
    assert context.store.artifacts.bytes_of("default") == 0


@pytest.mark.parametrize("storage", ["file", "s3"])
def test_what_was_left_long_ago_is_swept(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, storage: str
) -> None:
    if storage == "s3":
        url = request.getfixturevalue("s3").bucket()
        context = replace(context, artifacts=Artifacts(url, cache=tmp_path / "cache"))
    acme = context.of_tenant("acme")
    kept = [upload(context, create(context)), upload(acme, create(acme))]
    lost = [f"experiments/{'1' * 32}", f"tenants/acme/experiments/{'1' * 32}"]
    for path in lost:
        experiments._publish(context, path, b"content")
    context.artifacts._files.rm_file(f"{context.artifacts._path(lost[0])}/{MANIFEST}")
    assert experiments.sweep(context) == [], "it may be an upload that is under way"
    monkeypatch.setattr(experiments, "SWEEP_AFTER", dt.timedelta(0))
    assert experiments.sweep(context) == lost
    assert experiments.sweep(context) == []
    assert context.artifacts.names("experiments") == [f"experiments/{kept[0]}"]
    assert experiments.get_artifact(acme, kept[1]).files


def test_a_removed_artifact_is_gone_with_its_files(context: Context) -> None:
    experiment = create(context)
    made, other = upload(context, experiment), upload(context, experiment)
    delete(context, made)
    assert list_artifacts(context, experiment) == [other]
    assert all(other in name for name in stored(context))
    with pytest.raises(NotFound):
        experiments.get_artifact(context, made)
    with pytest.raises(NotFound):
        delete(context, made)


def test_a_removal_that_broke_off_can_be_repeated(context: Context) -> None:
    experiment = create(context)
    made = upload(context, experiment)
    context.artifacts.remove(f"experiments/{made}")  # after which the process died
    with pytest.raises(NotFound, match=f"the files of the artifact '{made}' are gone"):
        experiments.get_artifact(context, made)
    delete(context, made)
    assert list_artifacts(context, experiment) == []


@pytest.mark.parametrize(("folder", "model"), [("adapters", "small:tune-1"), ("models", "small-tune-1")])
def test_an_artifact_from_which_a_model_is_served_stays(
    context: Context, tmp_path: Path, folder: str, model: str
) -> None:
    name = f"{folder}/tune-1"
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "weights").write_bytes(b"weights")
    context.artifacts.publish(name, tmp_path / "made")
    job = samples.add_job(context.store, "tune-1", "supervised_fine_tune")
    samples.start(context.store, "tune-1")
    experiment = context.store.telemetry.run_experiment("default", job.run_id)
    made = Artifact("1" * 32, "default", experiment, job.run_id, "tune-1", "model", name, 7, {}, created_at=now())
    adapter = Adapter("default", model, "small", "tune-1", name, created_at=now()) if folder == "adapters" else None
    whole = None if adapter else samples.trained(model, path=str(context.artifacts.local(name)))
    assert context.store.jobs.complete(job.id, 1, {}, adapter, made, whole)
    with pytest.raises(Conflict, match=f"is the model '{model}', which is served from it"):
        delete(context, made.id)
    assert [file.name for file in experiments.get_artifact(context, made.id).files] == ["weights"]


def test_a_file_is_named_where_there_are_several(context: Context, tmp_path: Path) -> None:
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt"):
        (tmp_path / "folder" / name).write_text(name)
    context.artifacts.publish("a", tmp_path / "folder")
    experiment = create(context)
    context.store.artifacts.add(
        Artifact("1" * 32, "default", experiment, None, "two", "other", "a", 15, {}, created_at=now())
    )
    assert experiments.find_file(context, "1" * 32, "deep/b.txt")[1].bytes == 10
    with pytest.raises(BadInput, match="has 2 files: name the one") as caught:
        experiments.find_file(context, "1" * 32, None)
    assert caught.value.param == "file"
    for name in ("b.txt", "../a/a.txt", "/etc/passwd", "deep", "", MANIFEST, "a.txt\0"):
        with pytest.raises(NotFound, match="has no file"):
            experiments.find_file(context, "1" * 32, name)


# Tenants, and what is not there


def test_another_tenants_are_not_there(context: Context) -> None:
    experiment = create(context)
    run_id, artifact_id = create_run(context, experiment), upload(context, experiment)
    for other in (context.of_tenant("acme"), context):
        ids = (experiment, run_id, artifact_id) if other is not context else (NOBODYS,) * 3
        for ask in (
            lambda c, e, r, a: experiments.get(c, e),
            lambda c, e, r, a: experiments.page(c, e, 1),
            lambda c, e, r, a: experiments.update(c, UpdateExperimentRequest(experiment_id=e, status="failed")),
            lambda c, e, r, a: create_run(c, e),
            lambda c, e, r, a: experiments.page_of_runs(c, e, None, 1),
            lambda c, e, r, a: experiments.get_run(c, r),
            lambda c, e, r, a: experiments.update_run(c, UpdateRunRequest(run_id=r, status="a")),
            lambda c, e, r, a: upload(c, e),
            lambda c, e, r, a: list_artifacts(c, e),
            lambda c, e, r, a: experiments.get_artifact(c, a),
            lambda c, e, r, a: experiments.find_file(c, a, None),
            lambda c, e, r, a: delete(c, a),
        ):
            with pytest.raises(NotFound):
                ask(other, *ids)
    assert experiments.page(context.of_tenant("acme"), None, 10) == []
    own = create(context.of_tenant("acme"))
    for page in (
        lambda c: experiments.page_of_runs(c, own, run_id, 1),
        lambda c: list_artifacts(c, own, after=artifact_id),
        lambda c: upload(c, own, run_id=run_id),
    ):
        with pytest.raises(NotFound):
            page(context.of_tenant("acme"))
    assert list_artifacts(context, experiment) == [artifact_id]
    assert experiments.get(context, experiment).status == "not_started"


def test_an_artifact_belongs_to_a_run_of_its_experiment(context: Context) -> None:
    run_id = create_run(context, create(context, "first"))
    with pytest.raises(BadInput, match="is not of the experiment") as caught:
        upload(context, create(context, "second"), run_id=run_id)
    assert caught.value.param == "run_id"


def test_tenants_files_lie_apart(context: Context) -> None:
    acme = context.of_tenant("acme")
    made = upload(acme, create(acme))
    assert stored(context) == [f"tenants/acme/experiments/{made}/{name}" for name in ("content", MANIFEST)]


# Speed


def test_lists_are_read_by_an_index(context: Context, tmp_path: Path) -> None:
    """However many rows there are, of others and behind the page."""
    store = Store(f"sqlite:///{tmp_path}/sqlite.db")
    context = replace(context, store=store)
    experiment = create(context)
    runs = [create_run(context, experiment) for _ in range(2)]
    artifacts = [upload(context, experiment) for _ in range(2)]
    queries: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT") and "LIMIT" in statement:
            queries.append((statement, parameters))

    event.listen(context.store.engine, "before_cursor_execute", note)
    experiments.page(context, experiment, 10)
    experiments.page_of_runs(context, experiment, runs[0], 10)
    list_artifacts(context, experiment, after=artifacts[0])
    event.remove(context.store.engine, "before_cursor_execute", note)
    assert len(queries) == 3
    with context.store.engine.connect() as connection:
        for statement, parameters in queries:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            assert "USING INDEX" in plan[0].detail, plan
            assert "<?" in plan[0].detail, plan
    store.close()
