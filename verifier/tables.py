"""The record as SQL tables; migrations/ makes them. Messages are kept as the JSON that was received or made; a row is
never rewritten, except for stage, lease and detail of a task and a delivery, and for running totals. Times are Unix
seconds.
"""

from typing import Any

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Index, Integer, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

HEX = String(64)
ADDRESS = String(42)
NAME = String(64)
SERIAL = BigInteger().with_variant(Integer, "sqlite")
Json = dict[str, Any]


class Row(MappedAsDataclass, DeclarativeBase, kw_only=True):
    type_annotation_map = {Json: JSON, list[str]: JSON, float: Double}


class ModelRow(Row):
    __tablename__ = "models"

    id: Mapped[str] = mapped_column(HEX, primary_key=True)
    blob: Mapped[str] = mapped_column(HEX)
    size: Mapped[int] = mapped_column(BigInteger)
    report: Mapped[Json]
    created: Mapped[float]


class ModelFileRow(Row):
    """A file of weights that a model points to: one that no model names is nobody's."""

    __tablename__ = "model_files"

    model: Mapped[str] = mapped_column(HEX, ForeignKey("models.id"), primary_key=True)
    blob: Mapped[str] = mapped_column(HEX, primary_key=True, index=True)


class TaskRow(Row):
    __tablename__ = "tasks"
    __table_args__ = (
        Index("tasks_by_stage", "stage", "created"),
        Index("tasks_by_deadline", "stage", "deadline"),
        Index("tasks_by_lease", "stage", "lease"),
        Index("tasks_by_tenant", "tenant", "created"),
        Index("tasks_by_tenant_and_stage", "tenant", "stage"),
        Index("tasks_by_age", "created", "id"),
    )

    id: Mapped[str] = mapped_column(HEX, primary_key=True)
    model: Mapped[str] = mapped_column(HEX, ForeignKey("models.id"))
    document: Mapped[Json]
    tenant: Mapped[str] = mapped_column(NAME)  # whose API key posted it
    inputs: Mapped[str] = mapped_column(HEX, index=True)  # blob
    deadline: Mapped[int] = mapped_column(BigInteger)
    created: Mapped[float]
    changed: Mapped[float]  # when it came to its stage
    stage: Mapped[str] = mapped_column(String(16))
    worker: Mapped[str | None] = mapped_column(ADDRESS, default=None)  # who alone may commit; None: whoever is first
    owner: Mapped[str | None] = mapped_column(String(32), default=None)  # of the lease
    lease: Mapped[float] = mapped_column(default=0.0)  # nobody else may work on it before
    attempts: Mapped[int] = mapped_column(default=0)
    detail: Mapped[str | None] = mapped_column(Text, default=None)  # why it is late


class CommitmentRow(Row):
    __tablename__ = "commitments"
    __table_args__ = (Index("commitments_by_worker", "worker", "created"),)

    task: Mapped[str] = mapped_column(HEX, ForeignKey("tasks.id"), primary_key=True)
    digest: Mapped[str] = mapped_column(HEX)
    worker: Mapped[str] = mapped_column(ADDRESS)
    document: Mapped[Json]
    challenge: Mapped[Json]
    created: Mapped[float]


class ProofRow(Row):
    __tablename__ = "proofs"

    task: Mapped[str] = mapped_column(HEX, ForeignKey("tasks.id"), primary_key=True)
    digest: Mapped[str] = mapped_column(HEX)  # what the worker signed
    blob: Mapped[str] = mapped_column(HEX, index=True)
    size: Mapped[int] = mapped_column(BigInteger)
    check_seed: Mapped[str] = mapped_column(HEX)  # shown to nobody before the verdict
    created: Mapped[float]


class VerdictRow(Row):
    __tablename__ = "verdicts"

    task: Mapped[str] = mapped_column(HEX, ForeignKey("tasks.id"), primary_key=True)
    verdict: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(String(32))
    document: Mapped[Json]
    seconds: Mapped[float]  # that the check took
    created: Mapped[float]
    trail: Mapped[bytes | None] = mapped_column(LargeBinary, default=None)  # what each node's check saw: trail.py


class ProtectionRow(Row):
    """What was about to be signed, written before signing: one row for ever a (committee, task, nonce)."""

    __tablename__ = "protection"

    committee: Mapped[str] = mapped_column(HEX, primary_key=True)
    task: Mapped[str] = mapped_column(HEX, primary_key=True)
    nonce: Mapped[str] = mapped_column(HEX, primary_key=True)
    uid: Mapped[str] = mapped_column(HEX)
    verdict: Mapped[int]
    evidence: Mapped[str] = mapped_column(HEX)
    document: Mapped[Json]
    created: Mapped[float]


class AttestationRow(Row):
    __tablename__ = "attestations"
    __table_args__ = (Index("attestations_by_payee", "payee", "verdict"),)

    uid: Mapped[str] = mapped_column(HEX, primary_key=True)
    task: Mapped[str] = mapped_column(HEX, ForeignKey("tasks.id"), unique=True)
    payee: Mapped[str] = mapped_column(ADDRESS)
    verdict: Mapped[int]
    document: Mapped[Json]
    created: Mapped[float]


class RevenueRow(Row):
    """What was attested to a payee, kept with the attestations: amounts are too large for SQL to add."""

    __tablename__ = "revenue"

    payee: Mapped[str] = mapped_column(ADDRESS, primary_key=True)
    chain_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    token: Mapped[str] = mapped_column(ADDRESS, primary_key=True)
    amount: Mapped[str] = mapped_column(String(96))  # decimal


class CounterRow(Row):
    """A running total, moved in the transaction of what it counts."""

    __tablename__ = "counters"

    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    label: Mapped[str] = mapped_column(NAME, primary_key=True)
    value: Mapped[float]


class ApiKeyRow(Row):
    """Who may call: the secret is known by its digest only."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    tenant: Mapped[str] = mapped_column(NAME, index=True)
    name: Mapped[str] = mapped_column(NAME)
    scopes: Mapped[list[str]]
    digest: Mapped[str] = mapped_column(HEX)
    created: Mapped[float]
    expires: Mapped[float | None] = mapped_column(default=None)
    revoked: Mapped[float | None] = mapped_column(default=None)


class IdempotencyRow(Row):
    """The answer that a tenant's Idempotency-Key got; without one while the first request is at work."""

    __tablename__ = "idempotency"

    tenant: Mapped[str] = mapped_column(NAME, primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request: Mapped[str] = mapped_column(HEX)  # digest of method, path and body
    created: Mapped[float] = mapped_column(index=True)
    status: Mapped[int | None] = mapped_column(default=None)
    headers: Mapped[Json | None] = mapped_column(default=None)
    body: Mapped[str | None] = mapped_column(Text, default=None)


class EventRow(Row):
    """A task came to a stage. Numbers rise in the order in which transactions were committed."""

    __tablename__ = "events"
    __table_args__ = (
        Index("events_by_tenant", "tenant", "id"),
        Index("events_by_task", "task", "id"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(SERIAL, primary_key=True, autoincrement=True, init=False)
    task: Mapped[str] = mapped_column(HEX, ForeignKey("tasks.id"))
    tenant: Mapped[str] = mapped_column(NAME)
    stage: Mapped[str] = mapped_column(String(16))
    created: Mapped[float]


class WebhookRow(Row):
    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(NAME, index=True)
    url: Mapped[str] = mapped_column(Text)
    secret: Mapped[str] = mapped_column(String(64))  # whsec_…: it signs, so that it is kept itself
    stages: Mapped[list[str]]  # that are told; empty: all
    created: Mapped[float]
    removed: Mapped[float | None] = mapped_column(default=None)


class DeliveryRow(Row):
    """One event on its way to one webhook; made with the event, so that none is lost."""

    __tablename__ = "deliveries"
    __table_args__ = (Index("deliveries_by_due", "stage", "due"), Index("deliveries_by_webhook", "webhook", "event"))

    id: Mapped[str] = mapped_column(HEX, primary_key=True)
    webhook: Mapped[str] = mapped_column(String(32), ForeignKey("webhooks.id"))
    event: Mapped[int] = mapped_column(BigInteger, ForeignKey("events.id"))
    stage: Mapped[str] = mapped_column(String(16))  # waiting, delivered, failed
    due: Mapped[float]  # nobody tries before
    created: Mapped[float]
    attempts: Mapped[int] = mapped_column(default=0)
    status: Mapped[int | None] = mapped_column(default=None)  # of the last answer over HTTP
    detail: Mapped[str | None] = mapped_column(Text, default=None)  # why the last attempt failed
