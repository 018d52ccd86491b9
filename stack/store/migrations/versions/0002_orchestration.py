"""Tenants, attempts, experiments and runs: what the rows of the first release become.

All of them belong to the tenant `default`. Each job gets a run, in the experiment of its kind, and its metrics are the
run's. The Ray job that a job was submitted as is its first attempt, which is still open if the job has not ended: the
job supervisor finds out what became of it. What a completed job has made is an artifact of its run.
"""

import uuid as uuids
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = depends_on = None

TENANT = "default"
_JSON = sa.JSON(none_as_null=True)
_Number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_OLD_INDEXES = {"jobs_by_status": "jobs", "jobs_by_kind": "jobs", "metrics_by_job": "metrics"}
_OLD_TABLES = ("adapters", "datasets", "jobs", "metrics")


def upgrade() -> None:
    for table in _OLD_TABLES:
        _set_aside(table)
    _create_tables()
    connection = op.get_bind()
    jobs = connection.execute(sa.select(_first_jobs).order_by(_first_jobs.c.scheduled_at, _first_jobs.c.uuid))
    _copy_jobs(connection, [dict(job) for job in jobs.mappings()])
    _copy_metrics(connection)
    _copy_datasets(connection)
    _copy_adapters(connection)
    for table in _OLD_TABLES:
        op.drop_table(_first(table))


def _first(table: str) -> str:
    return f"first_{table}"


def _set_aside(table: str) -> None:
    """Renames a table, and frees the names that its index and its key have."""
    connection = op.get_bind()
    for index, of_table in _OLD_INDEXES.items():
        if of_table == table:
            op.drop_index(index, table)
    key = sa.inspect(connection).get_pk_constraint(table)["name"]
    op.rename_table(table, _first(table))
    if key is not None and connection.dialect.name == "postgresql":
        quote = connection.dialect.identifier_preparer.quote
        op.execute(f"ALTER TABLE {_first(table)} RENAME CONSTRAINT {quote(key)} TO pk_{_first(table)}")


# What is read and written here, apart from the schema of today, which changes.


def _table(name: str, *columns: str, **others: Any) -> sa.TableClause:
    given: list[sa.ColumnClause[Any]] = [sa.column(column) for column in columns]
    return sa.table(name, *given, *(sa.column(column, type_) for column, type_ in others.items()))


_first_jobs = _table(
    "first_jobs", "uuid", "kind", "status", "submission_id", "scheduled_at", "started_at", "completed_at", "error",
    request=_JSON, progress=_JSON, result=_JSON,
)  # fmt: skip
_first_metrics = _table("first_metrics", "id", "job_uuid", "name", "step", "value", "timestamp")
_first_adapters = _table("first_adapters", "model_id", "base", "job_uuid", "created_at")
_DATASET = ("uuid", "columns", "content_url", "metadata", "rows", "bytes", "sha256", "created_at")
_first_datasets = _table("first_datasets", *_DATASET)
_experiments = _table(
    "experiments", "id", "tenant", "name", "status", "created_at", "updated_at", metadata=_JSON
)  # fmt: skip
_runs = _table("runs", "id", "tenant", "experiment_id", "status", "started_at", "ended_at", metadata=_JSON)
_jobs = _table(
    "jobs", "id", "tenant", "uuid", "kind", "priority", "run_id", "status", "scheduled_at", "started_at",
    "completed_at", "error", request=_JSON, bundles=_JSON, resources_allocated=_JSON, progress=_JSON, result=_JSON,
)  # fmt: skip
_attempts = _table(
    "attempts", "job_id", "number", "submission_id", "heartbeat", "started_at", "ended_at", "exit_reason",
    retryable=sa.Boolean(),
)  # fmt: skip
_artifacts = _table(
    "artifacts", "id", "tenant", "experiment_id", "run_id", "name", "type", "path", "bytes", "created_at",
    metadata=_JSON,
)  # fmt: skip
_metrics = _table("metrics", "tenant", "run_id", "name", "step", "value", "timestamp")
_adapters = _table("adapters", "tenant", "model_id", "base", "job_uuid", "artifact", "created_at")
_datasets = _table("datasets", "tenant", *_DATASET)


def _copy_jobs(connection: sa.Connection, jobs: list[dict[str, Any]]) -> None:
    experiments: dict[str, str] = {}
    submissions: set[str] = set()
    for job in jobs:
        kind, time = job["kind"], job["scheduled_at"]
        if kind not in experiments:
            experiments[kind] = uuids.uuid4().hex
            row = dict(id=experiments[kind], tenant=TENANT, name=kind, status="running", metadata={})
            connection.execute(sa.insert(_experiments).values(created_at=time, updated_at=time, **row))
        run_id = uuids.uuid4().hex
        run = dict(
            id=run_id,
            tenant=TENANT,
            experiment_id=experiments[kind],
            status=job["status"],
            metadata={"job_uuid": job["uuid"], "kind": kind},
            started_at=job["started_at"] or time,
            ended_at=job["completed_at"],
        )
        connection.execute(sa.insert(_runs).values(**run))
        result = job.pop("result")
        submission_id = job.pop("submission_id")
        resources = result.pop("resources_allocated", None) if result else None
        row = dict(tenant=TENANT, priority=0, bundles=[], run_id=run_id, result=result, resources_allocated=resources)
        connection.execute(sa.insert(_jobs).values(**job, **row))
        if submission_id is not None:
            # A script that ran two drivers was one Ray job for both.
            unique = f"{submission_id}.{job['uuid']}" if submission_id in submissions else submission_id
            submissions.add(unique)
            job_id = sa.select(_jobs.c.id).where(_jobs.c.uuid == job["uuid"]).scalar_subquery()
            connection.execute(sa.insert(_attempts).values(job_id=job_id, submission_id=unique, **_attempt(job)))
        if result:
            _add_artifact(connection, job, run, result)


def _attempt(job: dict[str, Any]) -> dict[str, Any]:
    ended = job["completed_at"] is not None
    return dict(
        number=1,
        heartbeat=0 if job["started_at"] is None else 1,
        started_at=job["started_at"] or job["scheduled_at"],
        ended_at=job["completed_at"],
        exit_reason=(job["error"] or "completed") if ended else None,
        retryable=False if ended else None,
    )


def _add_artifact(connection: sa.Connection, job: dict[str, Any], run: dict[str, Any], result: dict[str, Any]) -> None:
    uuid, request = job["uuid"], job["request"]
    about = {"job_uuid": uuid}
    if checkpoints := result.get("checkpoints"):
        files, type_, path = checkpoints[0]["files"], "checkpoint", f"adapters/{uuid}"
        about |= {"model": f"{request['model']}:{uuid}", "base": request["model"]}
    else:
        files, type_, path = result["files"], "metric", f"evaluations/{uuid}"
        about |= {"model": request["checkpoint"]}
    row = dict(
        id=uuids.uuid4().hex,
        tenant=TENANT,
        experiment_id=run["experiment_id"],
        run_id=run["id"],
        name=uuid,
        type=type_,
        path=path,
        bytes=sum(file["bytes"] for file in files),
        metadata=about,
        created_at=job["completed_at"],
    )
    connection.execute(sa.insert(_artifacts).values(**row))


def _copy_metrics(connection: sa.Connection) -> None:
    old = _first_metrics.c
    of_run = sa.select(sa.literal(TENANT), _jobs.c.run_id, old.name, old.step, old.value, old.timestamp)
    query = of_run.join_from(_first_metrics, _jobs, _jobs.c.uuid == old.job_uuid).order_by(old.id)
    names = ["tenant", "run_id", "name", "step", "value", "timestamp"]
    connection.execute(sa.insert(_metrics).from_select(names, query))


def _copy_datasets(connection: sa.Connection) -> None:
    query = sa.select(sa.literal(TENANT), *(_first_datasets.c[name] for name in _DATASET))
    connection.execute(sa.insert(_datasets).from_select(["tenant", *_DATASET], query))


def _copy_adapters(connection: sa.Connection) -> None:
    old = _first_adapters.c
    artifact = sa.literal("adapters/", sa.String) + sa.cast(old.job_uuid, sa.String)
    query = sa.select(sa.literal(TENANT), old.model_id, old.base, old.job_uuid, artifact, old.created_at)
    names = ["tenant", "model_id", "base", "job_uuid", "artifact", "created_at"]
    connection.execute(sa.insert(_adapters).from_select(names, query))


def _create_tables() -> None:
    op.create_table(
        "adapters",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("model_id", sa.String(400), primary_key=True),
        sa.Column("base", sa.String(300), nullable=False),
        sa.Column("job_uuid", sa.String(100), nullable=False),
        sa.Column("artifact", sa.String(300), nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False, unique=True),
        sa.Column("created_at", sa.String(40), nullable=False),
        sa.Column("revoked_at", sa.String(40)),
    )
    op.create_table(
        "datasets",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("uuid", sa.String(100), primary_key=True),
        sa.Column("columns", sa.JSON, nullable=False),
        sa.Column("content_url", sa.Text, nullable=False),
        sa.Column("metadata", sa.JSON),
        sa.Column("rows", sa.BigInteger, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("examples", sa.Boolean),
        sa.Column("created_at", sa.String(40), nullable=False),
    )
    op.create_index("datasets_by_time", "datasets", ["tenant", "created_at", "uuid"])
    op.create_table(
        "experiments",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
        sa.Column("updated_at", sa.String(40), nullable=False),
        sa.UniqueConstraint("tenant", "name"),
    )
    op.create_index("experiments_by_time", "experiments", ["tenant", "created_at", "id"])
    op.create_table(
        "logs",
        sa.Column("id", _Number, primary_key=True, autoincrement=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("run_id", sa.String(32)),
        sa.Column("timestamp", sa.String(40), nullable=False),
        sa.Column("level", sa.String(20), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("additional_info", sa.JSON, nullable=False),
        sa.Column("trace_id", sa.String(100)),
    )
    op.create_index("logs_by_run", "logs", ["tenant", "run_id", "id"])
    op.create_index("logs_by_id", "logs", ["tenant", "id"])
    op.create_index("logs_by_time", "logs", ["tenant", "timestamp"])
    op.create_index("logs_by_trace", "logs", ["tenant", "trace_id"])
    op.create_table(
        "metrics",
        sa.Column("id", _Number, primary_key=True, autoincrement=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("run_id", sa.String(32), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("value", sa.Float),
        sa.Column("other", sa.JSON),
        sa.Column("timestamp", sa.String(40), nullable=False),
    )
    op.create_index("metrics_by_run", "metrics", ["run_id", "name", "step"])
    op.create_table(
        "spans",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("trace_id", sa.String(100), primary_key=True),
        sa.Column("span_id", sa.String(100), primary_key=True),
        sa.Column("parent_span_id", sa.String(100)),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("attributes", sa.JSON, nullable=False),
        sa.Column("status", sa.String(20)),
        sa.Column("started_at", sa.String(40), nullable=False),
        sa.Column("ended_at", sa.String(40)),
    )
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
    )
    op.create_index("uploads_by_tenant", "uploads", ["tenant", "created_at"])
    op.create_table(
        "runs",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("experiment_id", sa.String(32), sa.ForeignKey("experiments.id"), nullable=False),
        sa.Column("status", sa.String(100), nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("started_at", sa.String(40), nullable=False),
        sa.Column("ended_at", sa.String(40)),
    )
    op.create_index("runs_by_experiment", "runs", ["tenant", "experiment_id", "started_at"])
    op.create_table(
        "artifacts",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("experiment_id", sa.String(32), sa.ForeignKey("experiments.id"), nullable=False),
        sa.Column("run_id", sa.String(32), sa.ForeignKey("runs.id")),
        sa.Column("name", sa.String(300), nullable=False),
        sa.Column("type", sa.String(20), nullable=False),
        sa.Column("path", sa.String(300), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
    )
    op.create_index("artifacts_by_experiment", "artifacts", ["tenant", "experiment_id", "created_at"])
    op.create_table(
        "jobs",
        sa.Column("id", _Number, primary_key=True, autoincrement=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("uuid", sa.String(100), nullable=False),
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("bundles", sa.JSON, nullable=False),
        sa.Column("run_id", sa.String(32), sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("waiting_for", sa.Text),
        sa.Column("cancelled_at", sa.String(40)),
        sa.Column("scheduled_at", sa.String(40), nullable=False),
        sa.Column("started_at", sa.String(40)),
        sa.Column("completed_at", sa.String(40)),
        sa.Column("resources_allocated", sa.JSON),
        sa.Column("progress", sa.JSON),
        sa.Column("checkpoints", sa.JSON),
        sa.Column("result", sa.JSON),
        sa.Column("error", sa.Text),
        sa.Column("trace", sa.String(100)),
        sa.UniqueConstraint("tenant", "uuid"),
    )
    op.create_index("jobs_by_kind", "jobs", ["tenant", "kind", "id", "status"])
    op.create_index("jobs_by_status", "jobs", ["status", "tenant", "kind", "id"])
    op.create_table(
        "attempts",
        sa.Column("job_id", _Number, sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("submission_id", sa.String(250), nullable=False, unique=True),
        sa.Column("heartbeat", sa.BigInteger, nullable=False),
        sa.Column("started_at", sa.String(40), nullable=False),
        sa.Column("ended_at", sa.String(40)),
        sa.Column("exit_reason", sa.Text),
        sa.Column("retryable", sa.Boolean),
    )
    is_open = sa.text("ended_at IS NULL")
    op.create_index(
        "open_attempts", "attempts", ["job_id"], unique=True, sqlite_where=is_open, postgresql_where=is_open
    )
