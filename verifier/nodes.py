"""The record of a worker, a node of the network: what was signed about it, what it answered, and what it earned."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from proof.attestation import EXPIRED, FAIL, PASS
from verifier.database import Database
from verifier.summaries import Summary, summaries
from verifier.tables import AttestationRow, CommitmentRow, ProofRow, RevenueRow, TaskRow

LATEST = 1000  # commitments of a worker among which a tenant's own are looked for
NOBODY = "0x" + "00" * 20  # the payee of a task that nobody took


@dataclass(frozen=True)
class Earned:
    """Attested to a worker on one chain in one token, in the token's smallest unit."""

    chain_id: int
    token: str
    amount: int


@dataclass(frozen=True)
class NodeRecord:
    worker: str
    passed: int = 0  # attestations, by verdict
    refused: int = 0
    expired: int = 0
    challenged: int = 0  # commitments, each of which was challenged
    answered: int = 0  # proofs
    latest: float | None = None  # commitment, Unix seconds
    revenue: tuple[Earned, ...] = ()

    @property
    def share(self) -> float | None:
        """Of its challenges that it answered; None before the first."""
        return self.answered / self.challenged if self.challenged else None


def records(database: Database, limit: int, after: str = "") -> list[NodeRecord]:
    """Workers that committed to something or were attested, by address, those beyond `after`."""
    with database.read() as session:
        found: set[str] = set()
        for column in (CommitmentRow.worker, AttestationRow.payee):
            page = select(column).where(column > after, column != NOBODY).group_by(column).order_by(column).limit(limit)
            found |= set(session.scalars(page))
        return _records(session, sorted(found)[:limit])


def record(database: Database, worker: str) -> NodeRecord | None:
    """The record of one worker; None if it has none."""
    with database.read() as session:
        found = _records(session, [worker])[0]
    return None if found == NodeRecord(worker) else found


def recent(database: Database, worker: str, tenant: str | None, limit: int) -> list[Summary]:
    """Of the latest tasks that a worker committed to, those of one tenant, or all (None); the newest first."""
    own = select(CommitmentRow.task).where(CommitmentRow.worker == worker)
    latest = own.order_by(CommitmentRow.created.desc()).limit(LATEST).subquery()
    wanted = select(TaskRow.id).join_from(latest, TaskRow, TaskRow.id == latest.c.task)
    if tenant is not None:
        wanted = wanted.where(TaskRow.tenant == tenant)
    with database.read() as session:
        found = session.scalars(wanted.order_by(TaskRow.created.desc(), TaskRow.id.desc()).limit(limit)).all()
        return list(summaries(session, limit, TaskRow.id.in_(found), newest=True))


def _records(session: Session, workers: Sequence[str]) -> list[NodeRecord]:
    known: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    signed = (
        select(AttestationRow.payee, AttestationRow.verdict, func.count())
        .where(AttestationRow.payee.in_(workers))
        .group_by(AttestationRow.payee, AttestationRow.verdict)
    )
    for worker, verdict, count in session.execute(signed):
        known[worker][_COUNTED[verdict]] = count
    answers = (
        select(CommitmentRow.worker, func.count(), func.count(ProofRow.task), func.max(CommitmentRow.created))
        .outerjoin(ProofRow, ProofRow.task == CommitmentRow.task)
        .where(CommitmentRow.worker.in_(workers))
        .group_by(CommitmentRow.worker)
    )
    for worker, challenged, answered, latest in session.execute(answers):
        known[worker] |= {"challenged": challenged, "answered": answered, "latest": latest}
    earned = select(RevenueRow).where(RevenueRow.payee.in_(workers)).order_by(RevenueRow.chain_id, RevenueRow.token)
    for row in session.scalars(earned):
        known[row.payee].setdefault("revenue", []).append(Earned(row.chain_id, row.token, int(row.amount)))
    return [NodeRecord(worker, **_frozen(known[worker])) for worker in workers]


_COUNTED = {PASS: "passed", FAIL: "refused", EXPIRED: "expired"}


def _frozen(found: dict[str, Any]) -> dict[str, Any]:
    return found | {"revenue": tuple(found.get("revenue", ()))}
