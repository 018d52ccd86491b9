"""How far a job has ever been, and by which attempt, so that those count that were lost since."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("furthest", sa.JSON()))
