"""The tables. Each row belongs to a tenant, and each key that a client chooses is a key within its tenant.

A change here needs a migration in stack/store/migrations: `tests/unit/test_migrations.py` compares the two.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

schema = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    }
)
# SQLite counts up only a column of its own type Integer.
_Number = BigInteger().with_variant(Integer, "sqlite")
_Time = String(40)  # UTC, ISO 8601 with milliseconds, so that the order of the texts is that of the times
_Tenant = String(63)
_Id = String(100)

api_keys = Table(
    "api_keys",
    schema,
    Column("id", String(32), primary_key=True),
    Column("tenant", _Tenant, nullable=False),
    Column("name", String(200), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("created_at", _Time, nullable=False),
    Column("revoked_at", _Time),
)

# Which folder STACK_HOME is, where several nodes share it: one row at most, whose key is 1.
home = Table(
    "home",
    schema,
    Column("only", Integer, primary_key=True, autoincrement=False),
    Column("id", String(32), nullable=False),
)

# Ray's clusters that work by this database, and when each has said the last time that it lives.
clusters = Table(
    "clusters",
    schema,
    Column("id", _Id, primary_key=True),
    Column("told_at", _Time, nullable=False),
)

datasets = Table(
    "datasets",
    schema,
    Column("tenant", _Tenant, primary_key=True),
    Column("uuid", _Id, primary_key=True),
    Column("columns", JSON, nullable=False),
    Column("content_url", Text, nullable=False),
    Column("metadata", JSON),
    Column("rows", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("examples", Boolean),  # whether every row is one; not known of those of the first release
    Column("created_at", _Time, nullable=False),
    Index("datasets_by_time", "tenant", "created_at", "uuid"),
)

# Files that users sent; `name` is the user's, the content lies among the artifacts.
uploads = Table(
    "uploads",
    schema,
    Column("id", String(32), primary_key=True),
    Column("tenant", _Tenant, nullable=False),
    Column("name", String(255), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", _Time, nullable=False),
    Index("uploads_by_tenant", "tenant", "created_at"),
)

experiments = Table(
    "experiments",
    schema,
    Column("id", String(32), primary_key=True),
    Column("tenant", _Tenant, nullable=False),
    Column("name", String(200), nullable=False),
    Column("status", String(20), nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("updated_at", _Time, nullable=False),
    UniqueConstraint("tenant", "name"),
    Index("experiments_by_time", "tenant", "created_at", "id"),
)

runs = Table(
    "runs",
    schema,
    Column("id", String(32), primary_key=True),
    Column("tenant", _Tenant, nullable=False),
    Column("experiment_id", String(32), ForeignKey("experiments.id"), nullable=False),
    Column("status", String(100), nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("started_at", _Time, nullable=False),
    Column("ended_at", _Time),
    Index("runs_by_experiment", "tenant", "experiment_id", "started_at"),
)

# `id` is the order in which jobs were accepted. `bundles` is what must be free for a job at once, node by node.
# `furthest` is the greatest progress that there was: its `unit`, how much was `done`, and by which `attempt`.
jobs = Table(
    "jobs",
    schema,
    Column("id", _Number, primary_key=True, autoincrement=True),
    Column("tenant", _Tenant, nullable=False),
    Column("uuid", _Id, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("request", JSON, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("bundles", JSON, nullable=False),
    Column("run_id", String(32), ForeignKey("runs.id"), nullable=False),
    Column("status", String(20), nullable=False),
    Column("waiting_for", Text),
    Column("cancelled_at", _Time),
    Column("scheduled_at", _Time, nullable=False),
    Column("started_at", _Time),
    Column("completed_at", _Time),
    Column("resources_allocated", JSON),
    Column("progress", JSON),
    Column("furthest", JSON),
    Column("checkpoints", JSON),
    Column("result", JSON),
    Column("error", Text),
    Column("trace", String(100)),
    UniqueConstraint("tenant", "uuid"),
    Index("jobs_by_status", "status", "tenant", "kind", "id"),
    # With the status, all jobs are counted without a look at their rows.
    Index("jobs_by_kind", "tenant", "kind", "id", "status"),
)

# Attempts at jobs, each one Ray job. `heartbeat` counts up while its driver lives.
_is_open = text("ended_at IS NULL")
attempts = Table(
    "attempts",
    schema,
    Column("job_id", _Number, ForeignKey("jobs.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("submission_id", String(250), nullable=False, unique=True),
    Column("heartbeat", BigInteger, nullable=False),
    Column("started_at", _Time, nullable=False),
    Column("ended_at", _Time),
    Column("exit_reason", Text),
    Column("retryable", Boolean),
    Column("cluster", _Id),
    # No two processes can open an attempt at the same job, whatever they have read before.
    Index("open_attempts", "job_id", unique=True, sqlite_where=_is_open, postgresql_where=_is_open),
)

adapters = Table(
    "adapters",
    schema,
    Column("tenant", _Tenant, primary_key=True),
    Column("model_id", String(400), primary_key=True),
    Column("base", String(300), nullable=False),
    Column("job_uuid", _Id, nullable=False),
    Column("artifact", String(300), nullable=False),
    Column("created_at", _Time, nullable=False),
)

# Models that were added while the stack ran; `tenant` is whose administrator it was, or whose job. A private one may be
# asked by no other tenant.
models = Table(
    "models",
    schema,
    Column("id", String(200), primary_key=True),
    Column("tenant", _Tenant, nullable=False),
    Column("entry", JSON, nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("removed_at", _Time),
    Column("problem", Text),
    Column("private", Boolean, nullable=False, server_default=false()),
)

# Banks of documents. Their rows lie in LanceDB tables (stack/memory_banks/); `bytes` is about how large those are, and
# from `due_at` on they are to be maintained, which was tried last at `tried_at`.
memory_banks = Table(
    "memory_banks",
    schema,
    Column("id", _Id, primary_key=True),
    Column("tenant", _Tenant, nullable=False),
    Column("name", String(200), nullable=False),
    Column("url", Text),
    Column("config", JSON, nullable=False),
    Column("dimensions", Integer),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("written_at", _Time),
    Column("due_at", _Time),
    Column("tried_at", _Time),
    Index("memory_banks_by_time", "tenant", "created_at", "id"),
    Index("memory_banks_by_due", "due_at"),
)

# The writers of banks that there have been lately, by their numbers. Only the last one may write.
memory_writers = Table("memory_writers", schema, Column("epoch", _Number, primary_key=True, autoincrement=True))

# Banks that were dropped, until their files are removed.
dropped_memory_banks = Table(
    "dropped_memory_banks",
    schema,
    Column("id", _Id, primary_key=True),
    Column("tenant", _Tenant, nullable=False),
)

# Agents. `version` is the newest of theirs: a change of the config makes another one.
agents = Table(
    "agents",
    schema,
    Column("id", String(32), primary_key=True),
    Column("tenant", _Tenant, nullable=False),
    Column("version", Integer, nullable=False),
    Column("created_at", _Time, nullable=False),
    Index("agents_by_time", "tenant", "created_at", "id"),
)

agent_versions = Table(
    "agent_versions",
    schema,
    Column("agent_id", String(32), ForeignKey("agents.id"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("config", JSON, nullable=False),
    Column("created_at", _Time, nullable=False),
)

# `turns` is how many were accepted; `memory_bank_id` the bank of the session's attachments, once there are some.
agent_sessions = Table(
    "agent_sessions",
    schema,
    Column("id", String(32), primary_key=True),
    Column("tenant", _Tenant, nullable=False),
    Column("agent_id", String(32), ForeignKey("agents.id"), nullable=False),
    Column("name", String(200), nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("memory_bank_id", _Id),
    Column("turns", Integer, nullable=False),
    Index("agent_sessions_by_agent", "agent_id", "created_at", "id"),
)

# `request` holds the messages and attachments, `config` the agent's at its version with what the turn has in its place.
# Only the `owner` that took the turn last, whose number is `epoch`, may write what becomes of it. `cancelled_at` is
# when its end was asked for.
turns = Table(
    "turns",
    schema,
    Column("id", String(32), primary_key=True),
    Column("tenant", _Tenant, nullable=False),
    Column("agent_id", String(32), ForeignKey("agents.id"), nullable=False),
    Column("session_id", String(32), ForeignKey("agent_sessions.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("agent_version", Integer, nullable=False),
    Column("request", JSON, nullable=False),
    Column("config", JSON, nullable=False),
    Column("state", String(20), nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("owner", String(200)),
    Column("accepted_at", _Time, nullable=False),
    Column("started_at", _Time),
    Column("cancelled_at", _Time),
    Column("completed_at", _Time),
    Column("output_message", JSON(none_as_null=True)),
    Column("output_attachments", JSON, nullable=False),
    Column("error", JSON(none_as_null=True)),
    UniqueConstraint("session_id", "number"),
    Index("turns_by_agent", "agent_id"),
    Index("turns_by_state", "state", "session_id", "number"),
)

# The journal of turns. A step is written before it begins, and again with its `details` when it has ended. `about` is
# what it is for, and `attempt` counts how often it was begun.
steps = Table(
    "steps",
    schema,
    Column("id", String(32), primary_key=True),
    Column("turn_id", String(32), ForeignKey("turns.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("kind", String(20), nullable=False),
    Column("about", JSON, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("details", JSON(none_as_null=True)),
    Column("started_at", _Time, nullable=False),
    Column("completed_at", _Time),
    UniqueConstraint("turn_id", "number"),
)

# The calls of a step of the kind tool_execution. `approval` is asked, approved or denied, where the client is asked.
tool_runs = Table(
    "tool_runs",
    schema,
    Column("step_id", String(32), ForeignKey("steps.id"), primary_key=True),
    Column("call_id", String(200), primary_key=True),
    Column("began_at", _Time),
    Column("ended_at", _Time),
    Column("response", JSON(none_as_null=True)),
    Column("approval", String(10)),
)

# What `name` among the files of stack/artifacts.py is, and where it came from.
artifacts = Table(
    "artifacts",
    schema,
    Column("id", String(32), primary_key=True),
    Column("tenant", _Tenant, nullable=False),
    Column("experiment_id", String(32), ForeignKey("experiments.id"), nullable=False),
    Column("run_id", String(32), ForeignKey("runs.id")),
    Column("name", String(300), nullable=False),
    Column("type", String(20), nullable=False),
    Column("path", String(300), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("created_at", _Time, nullable=False),
    Index("artifacts_by_experiment", "tenant", "experiment_id", "created_at"),
)

# A value that is not a number (text, true, false) stands in `other`.
metrics = Table(
    "metrics",
    schema,
    Column("id", _Number, primary_key=True, autoincrement=True),
    Column("tenant", _Tenant, nullable=False),
    Column("run_id", String(32), nullable=False),
    Column("name", String(200), nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("value", Float),
    Column("other", JSON(none_as_null=True)),
    Column("timestamp", _Time, nullable=False),
    Index("metrics_by_run", "run_id", "name", "step"),
)

logs = Table(
    "logs",
    schema,
    Column("id", _Number, primary_key=True, autoincrement=True),
    Column("tenant", _Tenant, nullable=False),
    Column("run_id", String(32)),
    Column("timestamp", _Time, nullable=False),
    Column("level", String(20), nullable=False),
    Column("message", Text, nullable=False),
    Column("additional_info", JSON, nullable=False),
    Column("trace_id", String(100)),
    Index("logs_by_run", "tenant", "run_id", "id"),
    Index("logs_by_id", "tenant", "id"),
    Index("logs_by_time", "tenant", "timestamp"),
    Index("logs_by_trace", "tenant", "trace_id"),
)

spans = Table(
    "spans",
    schema,
    Column("tenant", _Tenant, primary_key=True),
    Column("trace_id", _Id, primary_key=True),
    Column("span_id", _Id, primary_key=True),
    Column("parent_span_id", _Id),
    Column("name", Text, nullable=False),
    Column("attributes", JSON, nullable=False),
    Column("status", String(20)),
    Column("started_at", _Time, nullable=False),
    Column("ended_at", _Time),
)
