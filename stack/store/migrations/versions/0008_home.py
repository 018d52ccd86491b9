"""Which folder STACK_HOME is, that all nodes of a cluster share."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = depends_on = None


def upgrade() -> None:
    op.create_table(
        "home",
        sa.Column("only", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("only", name="pk_home"),
    )
