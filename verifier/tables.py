"""The record as SQL tables. Messages are kept as the JSON that was received or made; a row is never rewritten,
except for stage, lease and detail of a task. Times are Unix seconds.
"""

from typing import Any

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Index, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

HEX = String(64)
Json = dict[str, Any]


class Row(MappedAsDataclass, DeclarativeBase, kw_only=True):
    type_annotation_map = {Json: JSON, float: Double}


class ModelRow(Row):
    __tablename__ = "models"

    id: Mapped[str] = mapped_column(HEX, primary_key=True)
    blob: Mapped[str] = mapped_column(HEX)
    size: Mapped[int] = mapped_column(BigInteger)
    report: Mapped[Json]
    created: Mapped[float]


class TaskRow(Row):
    __tablename__ = "tasks"
    __table_args__ = (
        Index("tasks_by_stage", "stage", "created"),
        Index("tasks_by_deadline", "stage", "deadline"),
        Index("tasks_by_lease", "stage", "lease"),
    )

    id: Mapped[str] = mapped_column(HEX, primary_key=True)
    model: Mapped[str] = mapped_column(HEX, ForeignKey("models.id"))
    document: Mapped[Json]
    inputs: Mapped[str] = mapped_column(HEX)  # blob
    deadline: Mapped[int] = mapped_column(BigInteger)
    created: Mapped[float]
    stage: Mapped[str] = mapped_column(String(16))
    owner: Mapped[str | None] = mapped_column(String(32), default=None)  # of the lease
    lease: Mapped[float] = mapped_column(default=0.0)  # nobody else may work on it before
    attempts: Mapped[int] = mapped_column(default=0)
    detail: Mapped[str | None] = mapped_column(Text, default=None)  # why it is late


class CommitmentRow(Row):
    __tablename__ = "commitments"

    task: Mapped[str] = mapped_column(HEX, ForeignKey("tasks.id"), primary_key=True)
    digest: Mapped[str] = mapped_column(HEX)
    worker: Mapped[str] = mapped_column(String(42))
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

    uid: Mapped[str] = mapped_column(HEX, primary_key=True)
    task: Mapped[str] = mapped_column(HEX, ForeignKey("tasks.id"), unique=True)
    document: Mapped[Json]
    created: Mapped[float]
