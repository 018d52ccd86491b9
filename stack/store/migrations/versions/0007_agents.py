"""Agents, their sessions and the turns of these, with the journal of each turn."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = depends_on = None

_Time = sa.String(40)
_Own = sa.String(32)


def upgrade() -> None:
    op.create_table(
        "agents",
        sa.Column("id", _Own, nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", _Time, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_agents"),
    )
    op.create_table(
        "agent_versions",
        sa.Column("agent_id", _Own, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("created_at", _Time, nullable=False),
        sa.PrimaryKeyConstraint("agent_id", "version", name="pk_agent_versions"),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.id"], name="fk_agent_versions_agent_id"),
    )
    op.create_table(
        "agent_sessions",
        sa.Column("id", _Own, nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("agent_id", _Own, nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("created_at", _Time, nullable=False),
        sa.Column("memory_bank_id", sa.String(100)),
        sa.Column("turns", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_agent_sessions"),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.id"], name="fk_agent_sessions_agent_id"),
    )
    op.create_table(
        "turns",
        sa.Column("id", _Own, nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("agent_id", _Own, nullable=False),
        sa.Column("session_id", _Own, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("agent_version", sa.Integer(), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("owner", sa.String(200)),
        sa.Column("accepted_at", _Time, nullable=False),
        sa.Column("started_at", _Time),
        sa.Column("cancelled_at", _Time),
        sa.Column("completed_at", _Time),
        sa.Column("output_message", sa.JSON()),
        sa.Column("output_attachments", sa.JSON(), nullable=False),
        sa.Column("error", sa.JSON()),
        sa.PrimaryKeyConstraint("id", name="pk_turns"),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.id"], name="fk_turns_agent_id"),
        sa.ForeignKeyConstraint(["session_id"], ["agent_sessions.id"], name="fk_turns_session_id"),
        sa.UniqueConstraint("session_id", "number", name="uq_turns_session_id_number"),
    )
    op.create_table(
        "steps",
        sa.Column("id", _Own, nullable=False),
        sa.Column("turn_id", _Own, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("about", sa.JSON(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("details", sa.JSON()),
        sa.Column("started_at", _Time, nullable=False),
        sa.Column("completed_at", _Time),
        sa.PrimaryKeyConstraint("id", name="pk_steps"),
        sa.ForeignKeyConstraint(["turn_id"], ["turns.id"], name="fk_steps_turn_id"),
        sa.UniqueConstraint("turn_id", "number", name="uq_steps_turn_id_number"),
    )
    op.create_table(
        "tool_runs",
        sa.Column("step_id", _Own, nullable=False),
        sa.Column("call_id", sa.String(200), nullable=False),
        sa.Column("began_at", _Time),
        sa.Column("ended_at", _Time),
        sa.Column("response", sa.JSON()),
        sa.Column("approval", sa.String(10)),
        sa.PrimaryKeyConstraint("step_id", "call_id", name="pk_tool_runs"),
        sa.ForeignKeyConstraint(["step_id"], ["steps.id"], name="fk_tool_runs_step_id"),
    )
    op.create_index("agents_by_time", "agents", ["tenant", "created_at", "id"])
    op.create_index("agent_sessions_by_agent", "agent_sessions", ["agent_id", "created_at", "id"])
    op.create_index("turns_by_agent", "turns", ["agent_id"])
    op.create_index("turns_by_state", "turns", ["state", "session_id", "number"])
