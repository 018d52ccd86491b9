"""Models that only the tenant may ask whose job has trained them. Those that there are were added for everybody."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = depends_on = None


def upgrade() -> None:
    op.add_column("models", sa.Column("private", sa.Boolean(), nullable=False, server_default=sa.false()))
