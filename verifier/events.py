"""Events as they are told, over SSE and to webhooks: a task came to a stage, what was decided and signed by then."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from verifier.lifecycle import Stage
from verifier.tables import AttestationRow, EventRow, VerdictRow

DECIDED = (Stage.ACCEPTED, Stage.REJECTED, Stage.ATTESTED)
SIGNED = (Stage.ATTESTED, Stage.EXPIRED)


@dataclass(frozen=True)
class Told:
    """One event. It says the same whenever it is read: nothing that was known only at a later stage."""

    number: int
    task: str
    tenant: str
    stage: str
    created: float  # Unix seconds
    verdict: str | None
    reason: str | None
    attestation: str | None  # uid

    @property
    def kind(self) -> str:
        return f"task.{self.stage}"

    def to_json(self) -> dict[str, Any]:
        return {
            "event": self.number,
            "task": self.task,
            "stage": self.stage,
            "verdict": self.verdict,
            "reason": self.reason,
            "attestation": self.attestation,
        }


def read(session: Session, after: int, limit: int, tenant: str | None = None, task: str | None = None) -> list[Told]:
    """Events numbered above `after`, in their order; tenant None: of all tenants."""
    wanted = _ALL.where(EventRow.id > after).order_by(EventRow.id).limit(limit)
    if tenant is not None:
        wanted = wanted.where(EventRow.tenant == tenant)
    if task is not None:
        wanted = wanted.where(EventRow.task == task)
    return [_told(*row) for row in session.execute(wanted)]


def one(session: Session, number: int) -> Told:
    return _told(*session.execute(_ALL.where(EventRow.id == number)).one())


def newest(session: Session) -> int:
    """The highest number so far; 0 before the first event."""
    return session.scalar(select(func.max(EventRow.id))) or 0


_ALL: Select[EventRow, str | None, str | None, str | None] = (
    select(EventRow, VerdictRow.verdict, VerdictRow.reason, AttestationRow.uid)
    .outerjoin(VerdictRow, VerdictRow.task == EventRow.task)
    .outerjoin(AttestationRow, AttestationRow.task == EventRow.task)
)


def _told(event: EventRow, verdict: str | None, reason: str | None, uid: str | None) -> Told:
    decided, signed = event.stage in DECIDED, event.stage in SIGNED
    return Told(
        number=event.id,
        task=event.task,
        tenant=event.tenant,
        stage=event.stage,
        created=event.created,
        verdict=verdict if decided else None,
        reason=reason if decided else None,
        attestation=uid if signed else None,
    )
