"""Tasks with what has come of them so far, a page at a time; rows that hold large messages are left out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, or_, select, tuple_
from sqlalchemy.orm import Session

from verifier.lifecycle import Stage
from verifier.tables import AttestationRow, CommitmentRow, ProofRow, TaskRow, VerdictRow

Place = tuple[float, str]  # of a task among all: when it was posted, and its id


@dataclass(frozen=True)
class Summary:
    task: TaskRow
    commitment: str | None
    worker: str | None
    proof: str | None
    proof_size: int | None
    verdict: str | None
    reason: str | None
    seconds: float | None
    uid: str | None

    @property
    def place(self) -> Place:
        return self.task.created, self.task.id


@dataclass(frozen=True)
class Filter:
    """Which tasks; what is None does not choose."""

    tenant: str | None = None
    worker: str | None = None  # tasks that this worker may see: assigned to it, committed to by it, or for anybody
    stage: Stage | None = None
    after: Place | None = None
    newest: bool = False  # the newest first, and `after` leads to older ones

    def conditions(self) -> list[Any]:
        found: list[Any] = []
        if self.tenant is not None:
            found.append(TaskRow.tenant == self.tenant)
        if self.worker is not None:
            free = and_(TaskRow.worker.is_(None), TaskRow.stage == Stage.POSTED)
            found.append(or_(free, TaskRow.worker == self.worker, CommitmentRow.worker == self.worker))
        if self.stage is not None:
            found.append(TaskRow.stage == self.stage)
        if self.after is not None:
            place = tuple_(TaskRow.created, TaskRow.id)
            found.append(place < self.after if self.newest else place > self.after)
        return found


def summaries(session: Session, limit: int, *conditions: Any, newest: bool = False) -> Iterator[Summary]:
    """The oldest first, unless `newest`."""
    order = (TaskRow.created.desc(), TaskRow.id.desc()) if newest else (TaskRow.created, TaskRow.id)
    asked = (
        select(
            TaskRow,
            CommitmentRow.digest,
            CommitmentRow.worker,
            ProofRow.digest,
            ProofRow.size,
            VerdictRow.verdict,
            VerdictRow.reason,
            VerdictRow.seconds,
            AttestationRow.uid,
        )
        .outerjoin(CommitmentRow, CommitmentRow.task == TaskRow.id)
        .outerjoin(ProofRow, ProofRow.task == TaskRow.id)
        .outerjoin(VerdictRow, VerdictRow.task == TaskRow.id)
        .outerjoin(AttestationRow, AttestationRow.task == TaskRow.id)
        .where(*conditions)
        .order_by(*order)
        .limit(limit)
    )
    for row in session.execute(asked):
        yield Summary(*row)
