"""Memory banks, whose rows lie elsewhere."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = depends_on = None

_Number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_Time = sa.String(40)


def upgrade() -> None:
    op.create_table(
        "memory_banks",
        sa.Column("id", sa.String(100), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("url", sa.Text()),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("dimensions", sa.Integer()),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", _Time, nullable=False),
        sa.Column("written_at", _Time),
        sa.Column("due_at", _Time),
        sa.Column("tried_at", _Time),
        sa.PrimaryKeyConstraint("id", name="pk_memory_banks"),
    )
    op.create_table(
        "dropped_memory_banks",
        sa.Column("id", sa.String(100), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_dropped_memory_banks"),
    )
    op.create_table(
        "memory_writers",
        sa.Column("epoch", _Number, primary_key=True, autoincrement=True),
    )
    op.create_index("memory_banks_by_time", "memory_banks", ["tenant", "created_at", "id"])
    op.create_index("memory_banks_by_due", "memory_banks", ["due_at"])
