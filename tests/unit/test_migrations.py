"""Old and new databases, brought up to date: all of what they hold, or nothing changes; by one process of many."""

import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, MetaData, insert, inspect, select, text
from sqlalchemy import Table as AnyTable

from stack.errors import BadInput
from stack.store import AddedModel, Store
from stack.store.connection import connect
from stack.store.migrate import HEAD, MIGRATIONS, migrate, revision
from stack.store.schema import artifacts, jobs, schema
from tests import samples

OPENERS = 6
# What the first release had: it made its tables by itself, as here, and wrote down no revision.
FIRST_TABLES = """
CREATE TABLE datasets (
    uuid VARCHAR(100) NOT NULL, columns JSON NOT NULL, content_url TEXT NOT NULL, metadata JSON, rows BIGINT NOT NULL,
    bytes BIGINT NOT NULL, sha256 VARCHAR(64) NOT NULL, created_at VARCHAR(40) NOT NULL, PRIMARY KEY (uuid)
);
CREATE TABLE jobs (
    uuid VARCHAR(100) NOT NULL, kind VARCHAR(40) NOT NULL, request JSON NOT NULL, status VARCHAR(20) NOT NULL,
    submission_id VARCHAR(200), scheduled_at VARCHAR(40) NOT NULL, started_at VARCHAR(40), completed_at VARCHAR(40),
    progress JSON, result JSON, error TEXT, PRIMARY KEY (uuid)
);
CREATE INDEX jobs_by_kind ON jobs (kind, scheduled_at);
CREATE INDEX jobs_by_status ON jobs (status, scheduled_at);
CREATE TABLE metrics (
    id {serial} NOT NULL, job_uuid VARCHAR(100) NOT NULL, name VARCHAR(100) NOT NULL, step BIGINT NOT NULL,
    value FLOAT NOT NULL, timestamp VARCHAR(40) NOT NULL, PRIMARY KEY (id)
);
CREATE INDEX metrics_by_job ON metrics (job_uuid, name, step);
CREATE TABLE adapters (
    model_id VARCHAR(400) NOT NULL, base VARCHAR(300) NOT NULL, job_uuid VARCHAR(100) NOT NULL,
    created_at VARCHAR(40) NOT NULL, PRIMARY KEY (model_id)
)
"""
ADAPTER_FILES = [{"name": "adapter.safetensors", "bytes": 70, "sha256": "a" * 64}]
RESULT_FILES = [{"name": "examples.jsonl", "bytes": 30, "sha256": "b" * 64}]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a database without tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/folder/stack.db"
    else:
        with request.getfixturevalue("postgres_server").empty_database() as url:
            yield url


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = connect(url)
    yield engine
    engine.dispose()


@pytest.fixture
def first(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    """Makes a database of the first release, with a job of each kind in each state, and returns its rows by table."""
    rows = first_rows()
    with engine.begin() as connection:
        serial = "SERIAL" if engine.dialect.name == "postgresql" else "INTEGER"
        for statement in FIRST_TABLES.format(serial=serial).split(";"):
            connection.execute(text(statement))
        tables = reflected(connection)
        for name, of_table in rows.items():
            connection.execute(insert(tables[name]), of_table)
    return rows


def first_rows() -> dict[str, list[dict[str, Any]]]:
    checkpoint = {"path": "file:///home/adapters/tuned", "iters": 6, "files": ADAPTER_FILES}
    tuned = {"checkpoints": [checkpoint], "resources_allocated": {"workers": 1, "per_worker": {"CPU": 1}}}
    evaluated = {"path": "file:///home/evaluations/evaluated", "files": RESULT_FILES}
    jobs = [
        first_job("tuned", "supervised_fine_tune", "completed", {"model": "small"}, result=tuned),
        first_job("untuned", "supervised_fine_tune", "failed", {"model": "small"}, error="the data has no dialogs"),
        first_job("tuning", "supervised_fine_tune", "running", {"model": "small"}),
        first_job("submitted", "supervised_fine_tune", "scheduled", {"model": "small"}, submitted=True),
        first_job("waiting", "supervised_fine_tune", "scheduled", {"model": "small"}),
        first_job("evaluated", "evaluate", "completed", {"checkpoint": "small"}, result=evaluated),
        first_job(
            "unevaluated", "evaluate", "failed", {"checkpoint": "small"}, error="the engine died", submitted=False
        ),
        first_job("evaluating", "evaluate", "running", {"checkpoint": "small"}),
        first_job("waits", "evaluate", "scheduled", {"checkpoint": "small"}),
    ]
    for minute, job in enumerate(jobs):  # each was accepted later than the one before
        for time in ("scheduled_at", "started_at", "completed_at"):
            job[time] = job[time] and job[time].replace("T00:00", f"T00:{minute:02}")
    metrics = [
        dict(job_uuid=uuid, name=name, step=step, value=step / 4, timestamp=f"2026-01-01T00:01:0{step}.000Z")
        for step in range(3)
        for uuid in ("tuned", "evaluated", "tuning")
        for name in ("loss", "lr")
    ]
    dataset = dict(
        uuid="data", columns={"dialog": "dialog"}, content_url="file:///data/a.jsonl", metadata={"made": "by hand"},
        rows=4, bytes=2**33, sha256="c" * 64, created_at="2026-01-01T00:00:00.000Z",
    )  # fmt: skip
    adapter = dict(model_id="small:tuned", base="small", job_uuid="tuned", created_at="2026-01-01T00:09:00.000Z")
    return dict(jobs=jobs, metrics=metrics, datasets=[dataset], adapters=[adapter])


def first_job(
    uuid: str, kind: str, status: str, request: dict[str, Any], *,
    submitted: bool | None = None, result: dict[str, Any] | None = None, error: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A row of the first release's jobs."""
    started = status in ("running", "completed") or (error is not None and submitted is not False)
    return dict(
        uuid=uuid,
        kind=kind,
        request=request,
        status=status,
        submission_id=f"{uuid}-1" if submitted or started else None,
        scheduled_at="2026-01-01T00:00:00.000Z",
        started_at="2026-01-01T00:00:10.000Z" if started else None,
        completed_at="2026-01-01T00:00:50.000Z" if status in ("completed", "failed") else None,
        progress={"done": 3, "total": 6, "unit": "steps"} if started else None,
        result=result,
        error=error,
    )


def reflected(connection: Connection) -> dict[str, AnyTable]:
    tables = MetaData()
    tables.reflect(connection)
    return dict(tables.tables)


def contents(engine: Engine) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables."""
    with engine.connect() as connection:
        return {
            name: [tuple(map(str, row)) for row in connection.execute(select(table).order_by(*table.primary_key))]
            for name, table in reflected(connection).items()
        }


def run_python(code: str, url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, timeout=120)


def test_the_newest_step_is_known_without_alembic() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_the_steps_lead_to_the_schema(engine: Engine) -> None:
    migrate(engine)
    assert_up_to_date(engine)


def test_the_steps_lead_to_the_schema_from_the_first_release(
    engine: Engine, first: dict[str, list[dict[str, Any]]]
) -> None:
    migrate(engine)
    assert_up_to_date(engine)


def assert_up_to_date(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "target_metadata": schema})
        assert compare_metadata(context, schema) == []
        assert revision(connection) == HEAD
        indexes = inspect(connection).get_indexes("attempts")
        (one_open,) = [index for index in indexes if index["name"] == "open_attempts"]
        assert one_open["unique"]
        where = one_open["dialect_options"][f"{engine.dialect.name}_where"]
        assert str(where).strip("()").lower() == "ended_at is null"


def test_jobs_of_the_first_release_are_kept_in_their_order(url: str, first: dict[str, list[dict[str, Any]]]) -> None:
    store = Store(url)
    for kind in ("supervised_fine_tune", "evaluate"):
        newest_first = [row["uuid"] for row in reversed(first["jobs"]) if row["kind"] == kind]
        assert [job.uuid for job in store.jobs.page("default", [kind])] == newest_first
    for row in first["jobs"]:
        job = store.jobs.get("default", row["uuid"])
        assert job is not None
        same = ("kind", "request", "status", "scheduled_at", "started_at", "completed_at", "progress", "error")
        assert {name: getattr(job, name) for name in same} == {name: row[name] for name in same}
        assert (job.priority, job.bundles, job.cancelled_at) == (0, [], None)
    tuned = store.jobs.get("default", "tuned")
    assert tuned is not None
    assert tuned.resources_allocated == {"workers": 1, "per_worker": {"CPU": 1}}
    assert tuned.result == {"checkpoints": first["jobs"][0]["result"]["checkpoints"]}
    store.close()


def test_metrics_of_the_first_release_are_those_of_the_jobs_runs(
    url: str, first: dict[str, list[dict[str, Any]]]
) -> None:
    store = Store(url)
    for row in first["jobs"]:
        job = store.jobs.get("default", row["uuid"])
        assert job is not None
        run = store.telemetry.run("default", job.run_id)
        assert run is not None
        assert (run.status, run.ended_at) == (job.status, job.completed_at)
        kept = [(one.name, one.step, one.value, one.timestamp) for one in store.telemetry.metrics("default", run.id)]
        old = [one for one in first["metrics"] if one["job_uuid"] == job.uuid]
        assert kept == [(one["name"], one["step"], one["value"], one["timestamp"]) for one in old]
    store.close()


def test_submissions_of_the_first_release_are_attempts(url: str, first: dict[str, list[dict[str, Any]]]) -> None:
    store = Store(url)
    open_attempts = {job.uuid: attempt for job, attempt in store.jobs.under_way()}
    assert set(open_attempts) == {"tuning", "submitted", "evaluating"}
    assert open_attempts["tuning"].submission_id == "tuning-1"
    assert [open_attempts[uuid].heartbeat for uuid in ("tuning", "submitted")] == [1, 0]
    assert [job.uuid for job in store.jobs.waiting()] == ["waiting", "waits"]
    for uuid, reason in (("tuned", "completed"), ("untuned", "the data has no dialogs")):
        job = store.jobs.get("default", uuid)
        assert job is not None
        (attempt,) = store.jobs.attempts(job.id)
        assert (attempt.ended_at, attempt.exit_reason) == (job.completed_at, reason)
    store.close()


def test_an_unfinished_job_of_the_first_release_is_lost_and_goes_on(
    url: str, first: dict[str, list[dict[str, Any]]]
) -> None:
    store = Store(url)
    (job,) = [job for job, _ in store.jobs.under_way() if job.uuid == "tuning"]
    assert store.jobs.lose_attempt(job.id, 1, "its Ray job is gone")
    assert store.jobs.open_attempt(job.id, 2, "default.tuning.2")
    assert store.jobs.begin(job.id, 2, {})
    assert store.jobs.complete(job.id, 2, {"x": 1})
    assert samples.add_job(store, "new").id > job.id
    store.telemetry.add_metrics("default", job.run_id, [("loss", 3, 0.5)])
    assert store.telemetry.newest_metrics("default", job.run_id)["loss"] == 0.5
    store.close()


def test_data_sets_adapters_and_files_of_the_first_release_are_found(
    url: str, first: dict[str, list[dict[str, Any]]]
) -> None:
    store = Store(url)
    dataset = store.datasets.get("default", "data")
    assert dataset == first["datasets"][0] | {"tenant": "default", "examples": None}
    (adapter,) = store.adapters.list("default")
    assert (adapter.model_id, adapter.base, adapter.artifact) == ("small:tuned", "small", "adapters/tuned")
    with store.engine.connect() as connection:
        joined = artifacts.join(jobs, jobs.c.run_id == artifacts.c.run_id)
        columns = (artifacts.c.name, artifacts.c.type, artifacts.c.path, artifacts.c.bytes, jobs.c.uuid)
        found = [tuple(row) for row in connection.execute(select(*columns).select_from(joined).order_by(jobs.c.id))]
    assert found == [
        ("tuned", "checkpoint", "adapters/tuned", 70, "tuned"),
        ("evaluated", "metric", "evaluations/evaluated", 30, "evaluated"),
    ]
    store.close()


def test_models_that_were_added_before_any_was_private_are_everybodys(url: str, engine: Engine) -> None:
    row: dict[str, Any] = dict(
        id="extra", tenant="acme", entry={"id": "extra", "path": "models/small"},
        created_at="2026-01-01T00:00:00.000Z", removed_at=None, problem="why",
    )  # fmt: skip
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0003")
        connection.execute(insert(reflected(connection)["models"]), row)
    store = Store(url)
    assert store.models.list() == [AddedModel(**row, private=False)]
    assert store.models.list()[0].is_seen_by("other")
    store.close()


def test_one_ray_job_that_ran_two_drivers_is_an_attempt_at_each(
    url: str, engine: Engine, first: dict[str, list[dict[str, Any]]]
) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE jobs SET submission_id = 'raysubmit_1' WHERE completed_at IS NOT NULL"))
    store = Store(url)
    for uuid in ("tuned", "evaluated"):
        job = store.jobs.get("default", uuid)
        assert job is not None
        (attempt,) = store.jobs.attempts(job.id)
        assert attempt.submission_id.startswith("raysubmit_1")
    store.close()


def test_a_database_of_a_newer_version_is_refused_and_left_alone(url: str, engine: Engine) -> None:
    Store(url).close()
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    before = contents(engine)
    with pytest.raises(BadInput, match=rf"newer version .* '9999'.* '{HEAD}'"):
        Store(url)
    assert contents(engine) == before


def test_a_database_with_tables_of_something_else_is_refused(url: str, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE jobs (id INTEGER PRIMARY KEY)"))
    with pytest.raises(BadInput, match=r"tables that no release of the stack has made \(jobs\)"):
        Store(url)
    assert contents(engine) == {"jobs": []}


def test_opening_a_store_that_is_up_to_date_does_not_load_alembic(url: str) -> None:
    Store(url).close()
    process = run_python(
        "import sys; from stack.store import Store; Store(sys.argv[1]); print('alembic' in sys.modules)", url
    )
    assert process.stdout == "False\n", process.stderr


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_a_store_may_be_opened_many_times_at_once(request: pytest.FixtureRequest, url: str, old: bool) -> None:
    """By threads and by processes."""
    if old:
        request.getfixturevalue("first")
    code = "import sys; from stack.store import Store; sys.stdin.read(); Store(sys.argv[1]).close()"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, url], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    with ThreadPoolExecutor(OPENERS) as threads:
        opening = [threads.submit(Store, url) for _ in range(OPENERS)]
        complaints = [process.communicate()[1].decode() for process in processes]
        stores = [one.result() for one in opening]
    assert complaints == ["", ""]
    for number, store in enumerate(stores):
        samples.add_job(store, f"job-{number}")
    assert len(stores[0].jobs.waiting()) == OPENERS + (2 if old else 0)
    for store in stores:
        store.close()


def test_opening_a_new_store_waits_while_another_process_sets_it_up(tmp_path: Path) -> None:
    file = tmp_path / "stack.db"
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as threads:
        opening = threads.submit(Store, f"sqlite:///{file}")
        done, _ = wait([opening], timeout=0.2)
        other.execute("COMMIT")
        other.close()
        assert not done, opening.exception()
        store = opening.result(timeout=30)
    samples.add_job(store, "job-1")
    store.close()


KILLED = """
import os, signal, sys
from sqlalchemy import event
from stack.store.connection import connect
from stack.store.migrate import migrate

engine = connect(sys.argv[1])

@event.listens_for(engine, "before_cursor_execute")
def kill(connection, cursor, statement, *others):
    if "DROP TABLE first_jobs" in statement:
        os.kill(os.getpid(), signal.SIGKILL)

migrate(engine)
"""


def test_a_migration_killed_halfway_leaves_the_old_database_whole(
    url: str, engine: Engine, first: dict[str, list[dict[str, Any]]]
) -> None:
    before = contents(engine)
    assert json.dumps(before).count("tuned") > 3
    killed = run_python(KILLED, url)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert contents(engine) == before
    store = Store(url)
    assert len(store.jobs.page("default", ["evaluate", "supervised_fine_tune"])) == len(first["jobs"])
    store.close()
