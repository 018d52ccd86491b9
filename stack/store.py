"""The database: its schema and all queries. SQLite by default, any other that SQLAlchemy speaks by its address.

The database is the truth of what was accepted and how far it is. Each method is one transaction; a method that moves
a job from one state to another does so only from the states it names, so that two processes cannot both do it.
"""

import datetime as dt
import math
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError
from sqlalchemy.schema import CreateIndex, CreateTable

from stack.api.jobs import JobStatus

BUSY_S = 20
schema = MetaData()

datasets = Table(
    "datasets",
    schema,
    Column("uuid", String(100), primary_key=True),
    Column("columns", JSON, nullable=False),
    Column("content_url", Text, nullable=False),
    Column("metadata", JSON),
    Column("rows", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", String(40), nullable=False),
)

jobs = Table(
    "jobs",
    schema,
    Column("uuid", String(100), primary_key=True),
    Column("kind", String(40), nullable=False),
    Column("request", JSON, nullable=False),
    Column("status", String(20), nullable=False),
    Column("submission_id", String(200)),
    Column("scheduled_at", String(40), nullable=False),
    Column("started_at", String(40)),
    Column("completed_at", String(40)),
    Column("progress", JSON),
    Column("result", JSON),
    Column("error", Text),
    Index("jobs_by_status", "status", "scheduled_at"),
    Index("jobs_by_kind", "kind", "scheduled_at"),
)

metrics = Table(
    "metrics",
    schema,
    Column("id", Integer, primary_key=True),
    Column("job_uuid", String(100), nullable=False),
    Column("name", String(100), nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("value", Float, nullable=False),
    Column("timestamp", String(40), nullable=False),
    Index("metrics_by_job", "job_uuid", "name", "step"),
)

adapters = Table(
    "adapters",
    schema,
    Column("model_id", String(400), primary_key=True),
    Column("base", String(300), nullable=False),
    Column("job_uuid", String(100), nullable=False),
    Column("created_at", String(40), nullable=False),
)


@dataclass(frozen=True)
class Job:
    """A row of `jobs`. `progress` holds done, total, unit; `result` what its kind of job keeps when it is completed."""

    uuid: str
    kind: str
    request: dict[str, Any]
    status: str
    submission_id: str | None
    scheduled_at: str
    started_at: str | None
    completed_at: str | None
    progress: dict[str, Any] | None
    result: dict[str, Any] | None
    error: str | None


@dataclass(frozen=True)
class Metric:
    """A row of `metrics`."""

    job_uuid: str
    name: str
    step: int
    value: float
    timestamp: str


@dataclass(frozen=True)
class Adapter:
    """A row of `adapters`: a LoRA adapter that is served as `model_id` on top of the model `base`."""

    model_id: str
    base: str
    job_uuid: str
    created_at: str


def now() -> str:
    """The time in UTC, as ISO 8601."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Store:
    """The queries. Methods block; call them from a thread where an event loop runs."""

    def __init__(self, url: str) -> None:
        self.engine: Engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
        if self.engine.dialect.name == "sqlite":
            if database := make_url(url).database:
                Path(database).parent.mkdir(parents=True, exist_ok=True)
            event.listen(self.engine, "connect", _set_up_sqlite)
        with self.engine.begin() as connection:
            for table in schema.sorted_tables:
                connection.execute(CreateTable(table, if_not_exists=True))
                for index in sorted(table.indexes, key=lambda index: str(index.name)):
                    connection.execute(CreateIndex(index, if_not_exists=True))

    def close(self) -> None:
        self.engine.dispose()

    # Data sets

    def add_dataset(self, row: dict[str, Any]) -> bool:
        """Adds a data set; False if its uuid is taken."""
        return self._added(datasets, row)

    def dataset(self, uuid: str) -> dict[str, Any] | None:
        with self.engine.connect() as connection:
            found = connection.execute(select(datasets).where(datasets.c.uuid == uuid)).mappings().first()
        return dict(found) if found else None

    # Jobs

    def add_job(self, uuid: str, kind: str, request: dict[str, Any], submission_id: str | None) -> bool:
        """Adds a scheduled job; False if its uuid is taken. With a submission id, it counts as submitted to Ray."""
        row = dict(uuid=uuid, kind=kind, request=request, submission_id=submission_id, scheduled_at=now())
        return self._added(jobs, dict(row, status=JobStatus.scheduled))

    def job(self, uuid: str) -> Job | None:
        with self.engine.connect() as connection:
            found = connection.execute(select(jobs).where(jobs.c.uuid == uuid)).mappings().first()
        return Job(**found) if found else None

    def jobs_of_kinds(self, kinds: Sequence[str]) -> list[Job]:
        """The jobs of these kinds, newest first."""
        query = select(jobs).where(jobs.c.kind.in_(kinds)).order_by(jobs.c.scheduled_at.desc(), jobs.c.uuid)
        with self.engine.connect() as connection:
            return [Job(**row) for row in connection.execute(query).mappings()]

    def unfinished_jobs(self) -> list[Job]:
        """The jobs that are scheduled or running, oldest first."""
        query = select(jobs).where(jobs.c.status.in_((JobStatus.scheduled, JobStatus.running)))
        with self.engine.connect() as connection:
            return [Job(**row) for row in connection.execute(query.order_by(jobs.c.scheduled_at)).mappings()]

    def set_submission(self, uuid: str, submission_id: str) -> None:
        with self.engine.begin() as connection:
            connection.execute(update(jobs).where(jobs.c.uuid == uuid).values(submission_id=submission_id))

    def start_job(self, uuid: str) -> bool:
        """scheduled -> running; False if it was not scheduled."""
        return self._moved(uuid, (JobStatus.scheduled,), status=JobStatus.running, started_at=now())

    def complete_job(self, uuid: str, result: dict[str, Any], adapter: Adapter | None = None) -> bool:
        """running -> completed, and registers the adapter that the job has made; False if it was not running."""
        values = dict(status=JobStatus.completed, completed_at=now(), result=result)
        running = (jobs.c.uuid == uuid) & (jobs.c.status == JobStatus.running)
        with self.engine.begin() as connection:
            completed = connection.execute(update(jobs).where(running).values(**values)).rowcount == 1
            if completed and adapter is not None:
                connection.execute(insert(adapters).values(**asdict(adapter)))
        return completed

    def fail_job(self, uuid: str, reason: str) -> bool:
        """scheduled or running -> failed; False if it had ended already."""
        unfinished = (JobStatus.scheduled, JobStatus.running)
        return self._moved(uuid, unfinished, status=JobStatus.failed, completed_at=now(), error=reason)

    def record_progress(self, uuid: str, progress: dict[str, Any], values: Sequence[tuple[str, int, float]]) -> None:
        """Writes how far a job is, and new (metric name, step, value) triples; infinite values and NaN are left out."""
        timestamp = now()
        rows = [
            dict(job_uuid=uuid, name=name, step=step, value=value, timestamp=timestamp)
            for name, step, value in values
            if math.isfinite(value)
        ]
        with self.engine.begin() as connection:
            connection.execute(update(jobs).where(jobs.c.uuid == uuid).values(progress=progress))
            if rows:
                connection.execute(insert(metrics), rows)

    def metrics_of(self, job_uuid: str) -> list[Metric]:
        """All metric values of a job, in the order of their steps."""
        columns = (metrics.c.job_uuid, metrics.c.name, metrics.c.step, metrics.c.value, metrics.c.timestamp)
        query = select(*columns).where(metrics.c.job_uuid == job_uuid).order_by(metrics.c.step, metrics.c.id)
        with self.engine.connect() as connection:
            return [Metric(**row) for row in connection.execute(query).mappings()]

    def newest_metrics_of(self, job_uuid: str) -> dict[str, float]:
        """The last value of each metric of a job."""
        newest = select(func.max(metrics.c.id)).where(metrics.c.job_uuid == job_uuid).group_by(metrics.c.name)
        query = select(metrics.c.name, metrics.c.value).where(metrics.c.id.in_(newest))
        with self.engine.connect() as connection:
            return {row.name: row.value for row in connection.execute(query)}

    # Adapters

    def adapter(self, model_id: str) -> Adapter | None:
        with self.engine.connect() as connection:
            found = connection.execute(select(adapters).where(adapters.c.model_id == model_id)).mappings().first()
        return Adapter(**found) if found else None

    def adapters(self) -> list[Adapter]:
        """All adapters, newest first."""
        with self.engine.connect() as connection:
            rows = connection.execute(select(adapters).order_by(adapters.c.created_at.desc())).mappings()
            return [Adapter(**row) for row in rows]

    def _added(self, table: Table, row: dict[str, Any]) -> bool:
        try:
            with self.engine.begin() as connection:
                connection.execute(insert(table).values(row))
        except IntegrityError:
            with self.engine.connect() as connection:
                if connection.execute(select(table.c.uuid).where(table.c.uuid == row["uuid"])).first() is None:
                    raise  # it was not the uuid
            return False
        return True

    def _moved(self, uuid: str, states: Sequence[str], **values: Any) -> bool:
        query = update(jobs).where(jobs.c.uuid == uuid, jobs.c.status.in_(states)).values(**values)
        with self.engine.begin() as connection:
            return connection.execute(query).rowcount == 1


def _set_up_sqlite(connection: Any, _: Any) -> None:
    """Many processes read and write at once: a write-ahead log, and waiting instead of failing on a lock."""
    connection.execute(f"PRAGMA busy_timeout = {BUSY_S * 1_000}")
    # The switch to the write-ahead log does not heed the timeout: of several first openers, all but one must ask again.
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    connection.execute("PRAGMA synchronous = NORMAL")
