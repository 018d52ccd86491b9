"""Data sets, jobs, metrics and adapters, of one tenant."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = depends_on = None


def upgrade() -> None:
    op.create_table(
        "datasets",
        sa.Column("uuid", sa.String(100), primary_key=True),
        sa.Column("columns", sa.JSON, nullable=False),
        sa.Column("content_url", sa.Text, nullable=False),
        sa.Column("metadata", sa.JSON),
        sa.Column("rows", sa.BigInteger, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
    )
    op.create_table(
        "jobs",
        sa.Column("uuid", sa.String(100), primary_key=True),
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("submission_id", sa.String(200)),
        sa.Column("scheduled_at", sa.String(40), nullable=False),
        sa.Column("started_at", sa.String(40)),
        sa.Column("completed_at", sa.String(40)),
        sa.Column("progress", sa.JSON),
        sa.Column("result", sa.JSON),
        sa.Column("error", sa.Text),
    )
    op.create_index("jobs_by_status", "jobs", ["status", "scheduled_at"])
    op.create_index("jobs_by_kind", "jobs", ["kind", "scheduled_at"])
    op.create_table(
        "metrics",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("job_uuid", sa.String(100), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("value", sa.Float, nullable=False),
        sa.Column("timestamp", sa.String(40), nullable=False),
    )
    op.create_index("metrics_by_job", "metrics", ["job_uuid", "name", "step"])
    op.create_table(
        "adapters",
        sa.Column("model_id", sa.String(400), primary_key=True),
        sa.Column("base", sa.String(300), nullable=False),
        sa.Column("job_uuid", sa.String(100), nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
    )
