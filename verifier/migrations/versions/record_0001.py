"""Models, tasks, and what comes of them: the tables before there were migrations."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0001", None

HEX, SHORT = sa.String(64), sa.String(16)


def upgrade() -> None:
    op.create_table(
        "models",
        sa.Column("id", HEX, primary_key=True),
        sa.Column("blob", HEX, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("report", sa.JSON, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
    )
    op.create_table(
        "tasks",
        sa.Column("id", HEX, primary_key=True),
        sa.Column("model", HEX, sa.ForeignKey("models.id"), nullable=False),
        sa.Column("document", sa.JSON, nullable=False),
        sa.Column("inputs", HEX, nullable=False),
        sa.Column("deadline", sa.BigInteger, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("stage", SHORT, nullable=False),
        sa.Column("owner", sa.String(32)),
        sa.Column("lease", sa.Double, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("detail", sa.Text),
    )
    for name, column in (("tasks_by_stage", "created"), ("tasks_by_deadline", "deadline"), ("tasks_by_lease", "lease")):
        op.create_index(name, "tasks", ["stage", column])
    op.create_table(
        "commitments",
        sa.Column("task", HEX, sa.ForeignKey("tasks.id"), primary_key=True),
        sa.Column("digest", HEX, nullable=False),
        sa.Column("worker", sa.String(42), nullable=False),
        sa.Column("document", sa.JSON, nullable=False),
        sa.Column("challenge", sa.JSON, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
    )
    op.create_table(
        "proofs",
        sa.Column("task", HEX, sa.ForeignKey("tasks.id"), primary_key=True),
        sa.Column("digest", HEX, nullable=False),
        sa.Column("blob", HEX, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("check_seed", HEX, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
    )
    op.create_index("ix_proofs_blob", "proofs", ["blob"])
    op.create_table(
        "verdicts",
        sa.Column("task", HEX, sa.ForeignKey("tasks.id"), primary_key=True),
        sa.Column("verdict", SHORT, nullable=False),
        sa.Column("reason", sa.String(32)),
        sa.Column("document", sa.JSON, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
    )
    op.create_table(
        "protection",
        sa.Column("committee", HEX, primary_key=True),
        sa.Column("task", HEX, primary_key=True),
        sa.Column("nonce", HEX, primary_key=True),
        sa.Column("uid", HEX, nullable=False),
        sa.Column("verdict", sa.Integer, nullable=False),
        sa.Column("evidence", HEX, nullable=False),
        sa.Column("document", sa.JSON, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
    )
    op.create_table(
        "attestations",
        sa.Column("uid", HEX, primary_key=True),
        sa.Column("task", HEX, sa.ForeignKey("tasks.id"), unique=True, nullable=False),
        sa.Column("document", sa.JSON, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
    )
