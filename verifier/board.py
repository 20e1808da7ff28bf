"""What the first page shows of a tenant's tasks, or of everybody's: how many are where, and what became of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select

from verifier.database import Database
from verifier.lifecycle import Stage
from verifier.tables import EventRow, TaskRow, VerdictRow

LATEST = 1000  # tasks whose verdicts are counted: what there is of all would be read every time


@dataclass(frozen=True)
class Outcome:
    """Verdicts of one kind, of the latest tasks."""

    verdict: str
    reason: str | None
    count: int
    seconds: float  # that their checks took, all together


@dataclass(frozen=True)
class Board:
    stages: dict[Stage, int]  # all of them
    outcomes: Sequence[Outcome]  # accepted first, then the most frequent reason

    def count(self, verdict: str) -> int:
        return sum(one.count for one in self.outcomes if one.verdict == verdict)

    @property
    def tasks(self) -> int:
        return sum(self.stages.values())


def board(database: Database, tenant: str | None) -> Board:
    """Of one tenant, or of all (None)."""
    staged = select(TaskRow.stage, func.count()).group_by(TaskRow.stage)
    latest = select(TaskRow.id).order_by(TaskRow.created.desc(), TaskRow.id.desc()).limit(LATEST)
    if tenant is not None:
        staged, latest = staged.where(TaskRow.tenant == tenant), latest.where(TaskRow.tenant == tenant)
    judged = (
        select(VerdictRow.verdict, VerdictRow.reason, func.count(), func.sum(VerdictRow.seconds))
        .join_from(judging := latest.subquery(), VerdictRow, VerdictRow.task == judging.c.id)
        .group_by(VerdictRow.verdict, VerdictRow.reason)
    )
    with database.read() as session:
        found = {row[0]: row[1] for row in session.execute(staged)}
        outcomes = [Outcome(*row) for row in session.execute(judged)]
    outcomes.sort(key=lambda one: (one.verdict != "accepted", -one.count, one.reason or ""))
    return Board({stage: found.get(stage, 0) for stage in Stage}, outcomes)


def timeline(database: Database, task: str) -> list[tuple[Stage, float]]:
    """The stages that a task came to, in order, and when (Unix seconds)."""
    events = select(EventRow.stage, EventRow.created).where(EventRow.task == task).order_by(EventRow.id)
    with database.read() as session:
        return [(Stage(stage), created) for stage, created in session.execute(events)]
