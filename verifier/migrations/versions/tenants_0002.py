"""Tenants and keys, events and webhooks, assigned workers, running totals, files that models point to.

What was posted before has the tenant `default`.
"""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0002", "0001"

HEX, SHORT, NAME, ADDRESS = sa.String(64), sa.String(16), sa.String(64), sa.String(42)
SERIAL = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    _tasks()
    _attestations()
    op.create_index("commitments_by_worker", "commitments", ["worker", "created"])
    op.add_column("verdicts", sa.Column("trail", sa.LargeBinary))
    op.create_table(
        "model_files",
        sa.Column("model", HEX, sa.ForeignKey("models.id"), primary_key=True),
        sa.Column("blob", HEX, primary_key=True),
    )
    op.create_index("ix_model_files_blob", "model_files", ["blob"])
    op.create_table(
        "counters",
        sa.Column("name", NAME, primary_key=True),
        sa.Column("label", NAME, primary_key=True),
        sa.Column("value", sa.Double, nullable=False),
    )
    _callers()
    _events()


def _tasks() -> None:
    op.add_column("tasks", sa.Column("tenant", NAME, nullable=False, server_default="default"))
    op.add_column("tasks", sa.Column("worker", ADDRESS))
    op.add_column("tasks", sa.Column("changed", sa.Double, nullable=False, server_default="0"))
    tasks = sa.table("tasks", sa.column("created", sa.Double), sa.column("changed", sa.Double))
    op.execute(tasks.update().values(changed=tasks.c.created))
    op.create_index("tasks_by_tenant", "tasks", ["tenant", "created"])
    op.create_index("tasks_by_tenant_and_stage", "tasks", ["tenant", "stage"])
    op.create_index("tasks_by_age", "tasks", ["created", "id"])
    op.create_index("ix_tasks_inputs", "tasks", ["inputs"])


def _attestations() -> None:
    """What is asked of attestations gets columns of its own, and amounts are summed up."""
    op.add_column("attestations", sa.Column("payee", ADDRESS, nullable=False, server_default=""))
    op.add_column("attestations", sa.Column("verdict", sa.Integer, nullable=False, server_default="0"))
    op.create_index("attestations_by_payee", "attestations", ["payee", "verdict"])
    revenue = op.create_table(
        "revenue",
        sa.Column("payee", ADDRESS, primary_key=True),
        sa.Column("chain_id", sa.BigInteger, primary_key=True),
        sa.Column("token", ADDRESS, primary_key=True),
        sa.Column("amount", sa.String(96), nullable=False),
    )
    columns = [sa.column(name, kind) for name, kind in (("uid", HEX), ("document", sa.JSON), ("payee", ADDRESS))]
    attestations = sa.table("attestations", *columns, sa.column("verdict", sa.Integer))
    totals: dict[tuple[str, int, str], int] = {}
    for uid, document in op.get_bind().execute(sa.select(attestations.c.uid, attestations.c.document)).all():
        message = document["message"]
        payee, verdict = message["payee"], int(message["verdict"])
        op.execute(attestations.update().where(attestations.c.uid == uid).values(payee=payee, verdict=verdict))
        key = (payee, int(document["domain"]["chainId"]), message["token"])
        totals[key] = totals.get(key, 0) + int(message["amount"])
    names = ("payee", "chain_id", "token", "amount")
    op.bulk_insert(revenue, [dict(zip(names, (*key, str(sum_)), strict=True)) for key, sum_ in totals.items() if sum_])


def _callers() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", SHORT, primary_key=True),
        sa.Column("tenant", NAME, nullable=False),
        sa.Column("name", NAME, nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("digest", HEX, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("expires", sa.Double),
        sa.Column("revoked", sa.Double),
    )
    op.create_index("ix_api_keys_tenant", "api_keys", ["tenant"])
    op.create_table(
        "idempotency",
        sa.Column("tenant", NAME, primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("request", HEX, nullable=False),
        sa.Column("status", sa.Integer),
        sa.Column("headers", sa.JSON),
        sa.Column("body", sa.Text),
        sa.Column("created", sa.Double, nullable=False),
    )
    op.create_index("ix_idempotency_created", "idempotency", ["created"])


def _events() -> None:
    op.create_table(
        "events",
        sa.Column("id", SERIAL, primary_key=True, autoincrement=True),
        sa.Column("task", HEX, sa.ForeignKey("tasks.id"), nullable=False),
        sa.Column("tenant", NAME, nullable=False),
        sa.Column("stage", SHORT, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sqlite_autoincrement=True,  # a number is never given twice, or a reader would miss an event
    )
    op.create_index("events_by_tenant", "events", ["tenant", "id"])
    op.create_index("events_by_task", "events", ["task", "id"])
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", NAME, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("secret", HEX, nullable=False),
        sa.Column("stages", sa.JSON, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("removed", sa.Double),
    )
    op.create_index("ix_webhooks_tenant", "webhooks", ["tenant"])
    op.create_table(
        "deliveries",
        sa.Column("id", HEX, primary_key=True),
        sa.Column("webhook", sa.String(32), sa.ForeignKey("webhooks.id"), nullable=False),
        sa.Column("event", sa.BigInteger, sa.ForeignKey("events.id"), nullable=False),
        sa.Column("stage", SHORT, nullable=False),
        sa.Column("due", sa.Double, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("status", sa.Integer),
        sa.Column("detail", sa.Text),
        sa.Column("created", sa.Double, nullable=False),
    )
    op.create_index("deliveries_by_due", "deliveries", ["stage", "due"])
    op.create_index("deliveries_by_webhook", "deliveries", ["webhook", "event"])
