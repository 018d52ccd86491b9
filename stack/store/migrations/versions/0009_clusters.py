"""Ray's clusters that work by the database, and in which of them an attempt at a job is."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = depends_on = None

_Cluster = sa.String(100)


def upgrade() -> None:
    op.create_table(
        "clusters",
        sa.Column("id", _Cluster, nullable=False),
        sa.Column("told_at", sa.String(40), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_clusters"),
    )
    op.add_column("attempts", sa.Column("cluster", _Cluster))
