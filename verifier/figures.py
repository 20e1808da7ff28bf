"""What is counted: running totals, moved in the transaction of what they count, and figures read from the record."""

from collections import Counter
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from verifier.database import Database
from verifier.lifecycle import DUE, Stage
from verifier.tables import AttestationRow, CounterRow, DeliveryRow, RevenueRow, TaskRow, VerdictRow


def count(session: Session, name: str, label: str, amount: float) -> None:
    """Add to a running total. Who adds to several in one transaction does it in the order of labels: no deadlock."""
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    new = dialect.insert(CounterRow).values(name=name, label=label, value=float(amount))
    added = {"value": CounterRow.value + new.excluded.value}
    session.execute(new.on_conflict_do_update(index_elements=["name", "label"], set_=added))


@dataclass(frozen=True)
class Stalled:
    task: str
    detail: str | None


class Figures:
    """Figures over all tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def stages(self) -> dict[str, int]:
        """Tasks by stage."""
        with self._database.read() as session:
            rows = session.execute(select(TaskRow.stage, func.count()).group_by(TaskRow.stage))
            found = {str(stage): number for stage, number in rows}
        return {str(stage): found.get(stage, 0) for stage in Stage}

    def verdicts(self) -> list[tuple[str, str, int]]:
        """(verdict, reason, how many)."""
        columns = VerdictRow.verdict, VerdictRow.reason
        with self._database.read() as session:
            rows = session.execute(select(*columns, func.count()).group_by(*columns))
            return [(verdict, reason or "", number) for verdict, reason, number in rows]

    def totals(self) -> dict[tuple[str, str], float]:
        """(name, label) -> running total."""
        with self._database.read() as session:
            return {(row.name, row.label): row.value for row in session.scalars(select(CounterRow))}

    def attested(self) -> dict[tuple[int, str], int]:
        """(chain, token) -> the sum of what was attested, exactly."""
        sums: Counter[tuple[int, str]] = Counter()
        with self._database.read() as session:
            for row in session.scalars(select(RevenueRow)):
                sums[(row.chain_id, row.token)] += int(row.amount)
        return dict(sums)

    def deliveries(self) -> dict[str, int]:
        """Deliveries to webhooks by stage."""
        with self._database.read() as session:
            rows = session.execute(select(DeliveryRow.stage, func.count()).group_by(DeliveryRow.stage))
            return {str(stage): number for stage, number in rows}

    def waiting_since(self) -> float | None:
        """Since when the task that has waited longest waits for us; None: none does."""
        with self._database.read() as session:
            return session.scalar(select(func.min(TaskRow.changed)).where(TaskRow.stage.in_(DUE)))

    def last_attestation(self) -> float | None:
        with self._database.read() as session:
            return session.scalar(select(func.max(AttestationRow.created)))

    def stalled(self, limit: int) -> list[Stalled]:
        """Tasks that wait for a person, the oldest first."""
        asked = select(TaskRow.id, TaskRow.detail).where(TaskRow.stage == Stage.STALLED).order_by(TaskRow.changed)
        with self._database.read() as session:
            return [Stalled(*row) for row in session.execute(asked.limit(limit))]
