"""The record of tasks: every change of stage is a compare-and-set, told in the transaction that makes it (outbox.py).

Randomness is drawn here, inside the transaction that stores what it answers: the challenge with the commitment,
the check seed with the proof. Methods raise Conflict for a true message at the wrong stage, Unavailable when the
database does not answer. Times come from the caller.
"""

import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from proof.attestation import EXPIRED, PaymentAttestation, SignedAttestation
from proof.errors import Conflict, Unavailable
from proof.messages import Challenge, Commitment, Task, Verdict
from verifier.database import Database
from verifier.figures import count
from verifier.lifecycle import DUE, TRANSITIONS, Event, Expired, Stage
from verifier.outbox import Moved, announce
from verifier.settings import LONGEST_LEASE
from verifier.summaries import Filter, Summary, summaries
from verifier.tables import (
    AttestationRow,
    CommitmentRow,
    ModelFileRow,
    ModelRow,
    ProofRow,
    ProtectionRow,
    RevenueRow,
    Row,
    TaskRow,
    VerdictRow,
)

SEED_BYTES = 32
FARTHEST = LONGEST_LEASE  # seconds ahead: what is farther was written by a clock that jumped
LAPSED_AT_ONCE = 500  # tasks whose deadline passed, in one transaction
EVERYTHING = Filter()


@dataclass(frozen=True)
class Case:
    """Everything that judging a task needs."""

    task: Task
    commitment: Commitment
    challenge: Challenge
    proof: str  # blob
    check_seed: bytes


@dataclass(frozen=True)
class Judgement:
    """A verdict on its way into the record."""

    task: str
    verdict: Verdict
    seconds: float  # that the check took
    trail: bytes | None = None  # packed: trail.py
    families: Mapping[str, float] | None = None  # op family -> seconds


@dataclass(frozen=True)
class Outcome:
    """What became of a task, and since when that is durable; without a verdict, its deadline passed."""

    task: Task
    commitment: Commitment | None
    challenge: Challenge | None
    verdict: Verdict | None
    outputs: tuple[str, ...]
    at: float


class Store:
    def __init__(self, database: Database) -> None:
        self.database = database

    # ---- models and tasks

    def add_model(self, row: ModelRow, files: Iterable[str] = ()) -> bool:
        """Whether it is new; a model that is there stays as it is. `files` are the blobs that it points to."""
        return self._add(row, *(ModelFileRow(model=row.id, blob=blob) for blob in sorted(set(files))))

    def model(self, model: str) -> ModelRow | None:
        with self.database.read() as session:
            return session.get(ModelRow, model)

    def add_task(self, task: Task, inputs: str, now: float, tenant: str, worker: str | None = None) -> bool:
        """Whether it is new. Raises Conflict when it was posted by another tenant or for another worker."""
        row = TaskRow(
            id=task.id().hex(),
            model=task.model.hex(),
            document=task.to_json(),
            tenant=tenant,
            worker=worker,
            inputs=inputs,
            deadline=task.deadline,
            created=now,
            changed=now,
            stage=Stage.POSTED,
        )
        if self._add(row, moved=Moved(row.id, tenant, Stage.POSTED), now=now):
            return True
        self.same_task(row.id, tenant, worker)
        return False

    def same_task(self, task: str, tenant: str, worker: str | None) -> Summary | None:
        """The task, if this tenant posted it before, for this worker; raises Conflict if anybody did otherwise."""
        known = self.task(task)
        if known and (known.task.tenant, known.task.worker) != (tenant, worker):
            raise Conflict(f"task {task} was posted before, by another tenant or for another worker")
        return known

    def task(self, task: str) -> Summary | None:
        with self.database.read() as session:
            return next(summaries(session, 1, TaskRow.id == task), None)

    def tasks(self, limit: int, wanted: Filter = EVERYTHING) -> list[Summary]:
        with self.database.read() as session:
            return list(summaries(session, limit, *wanted.conditions(), newest=wanted.newest))

    # ---- commitment and challenge

    def commit(self, commitment: Commitment, now: float) -> Challenge:
        """Store the commitment to its task and draw the challenge, in one transaction.

        The same commitment again gets the same challenge. Raises Conflict for another one: there is no second
        roll of the dice. Raises Expired past the deadline.
        """
        task, digest = (commitment.task or b"").hex(), commitment.digest()
        with self._change(now) as session:
            _lapse(session, now, TaskRow.id == task)
            if not _move(session, Event.COMMIT, now, task):
                return _challenge_again(session, task, commitment)
            row = session.get_one(TaskRow, task)
            challenge = Challenge(digest, str(row.document["policy"]), secrets.token_bytes(SEED_BYTES))
            session.add(
                CommitmentRow(
                    task=task,
                    digest=digest.hex(),
                    worker=commitment.worker or "",
                    document=commitment.to_json(),
                    challenge=challenge.to_json(),
                    created=now,
                )
            )
            return challenge

    def commitment(self, task: str) -> CommitmentRow | None:
        with self.database.read() as session:
            return session.get(CommitmentRow, task)

    # ---- proof and check seed

    def prove(self, task: str, digest: bytes, blob: str, size: int, now: float) -> bool:
        """Record a proof that is durable already, and draw the check seed, in one transaction.

        Whether it is new. Raises Conflict for another proof than the stored one, Expired past the deadline.
        """
        with self._change(now) as session:
            _lapse(session, now, TaskRow.id == task)
            if _move(session, Event.PROVE, now, task, lease=now):
                seed = secrets.token_bytes(SEED_BYTES).hex()
                row = ProofRow(task=task, digest=digest.hex(), blob=blob, size=size, check_seed=seed, created=now)
                session.add(row)
                count(session, "proof_bytes", "", size)
                count(session, "proofs", "", 1)
                return True
            _same_proof(session, task, digest)
            return False

    def check_proof(self, task: str, digest: bytes) -> None:
        """Raise what `prove` would raise for a task that is not waiting for its proof."""
        with self.database.read() as session:
            _same_proof(session, task, digest)

    def proof(self, task: str) -> ProofRow | None:
        with self.database.read() as session:
            return session.get(ProofRow, task)

    # ---- leases: a task belongs to one worker process at a time, and to the next when that one falls silent

    def lease(self, model: str, owner: str, now: float, until: float, limit: int) -> list[TaskRow]:
        """Due tasks of a model, now the owner's, the longest waiting first.

        One that was tried before comes alone: if it ends the process, it takes no other with it.
        """
        due = select(TaskRow).where(TaskRow.model == model, TaskRow.stage.in_(DUE), _free(now))
        with self._change(now) as session:
            found = due.order_by(TaskRow.lease, TaskRow.id).limit(limit).with_for_update(skip_locked=True)
            rows = list(session.scalars(found))
            rows = rows[:1] if rows and rows[0].attempts else [row for row in rows if not row.attempts]
            silent = sum(row.owner is not None for row in rows)
            if silent:
                count(session, "lease_losses", "", silent)
            for row in rows:
                row.owner, row.lease, row.attempts = owner, until, row.attempts + 1
            return rows

    def renew(self, tasks: Sequence[str], owner: str, until: float) -> None:
        """Hold the owner's leases until then; those that it lost stay lost."""
        mine = update(TaskRow).where(TaskRow.id.in_(tasks), TaskRow.owner == owner, TaskRow.stage.in_(DUE))
        with self.database.write() as session:
            session.execute(mine.values(lease=until), execution_options=_BLIND)

    def give_back(self, tasks: Sequence[str], owner: str, until: float, detail: str | None) -> None:
        """Let any process take the owner's tasks from `until` on; `detail` says why, or that nothing was tried."""
        mine = update(TaskRow).where(TaskRow.id.in_(tasks), TaskRow.owner == owner, TaskRow.stage.in_(DUE))
        untried = {} if detail is not None else {"attempts": TaskRow.attempts - 1}
        with self.database.write() as session:
            session.execute(mine.values(owner=None, lease=until, detail=detail, **untried), execution_options=_BLIND)

    def stall(self, task: str, owner: str, detail: str, now: float) -> None:
        with self._change(now) as session:
            _move(session, Event.STALL, now, task, TaskRow.owner == owner, owner=None, detail=detail)

    def retry(self, task: str, now: float) -> Stage:
        """Put a stalled task back to where it stalled, with fresh attempts. Raises Conflict when it is not stalled."""
        with self._change(now) as session:
            verdict = session.get(VerdictRow, task)
            if verdict:
                event = Event.RETRY_ACCEPTED if verdict.verdict == "accepted" else Event.RETRY_REJECTED
            else:
                event = Event.RETRY_CHECK if session.get(ProofRow, task) else Event.RETRY_LAPSED
            if not _move(session, event, now, task, lease=now, attempts=0, detail=None):
                raise Conflict(f"task {task} is not stalled")
            return TRANSITIONS[event].target

    def due(self, now: float) -> Sequence[str]:
        """Models with tasks that wait for a worker process, the longest waiting first."""
        waiting = select(TaskRow.model).where(TaskRow.stage.in_(DUE), _free(now))
        with self.database.read() as session:
            return session.scalars(waiting.group_by(TaskRow.model).order_by(func.min(TaskRow.lease))).all()

    def backlog(self) -> int:
        """Tasks that worker processes have not finished with."""
        with self.database.read() as session:
            return session.scalar(select(func.count()).where(TaskRow.stage.in_(DUE))) or 0

    def lapse(self, now: float) -> int:
        """How many tasks were past their deadline without a proof: their expiry is to be signed."""
        open_ = TaskRow.stage.in_(TRANSITIONS[Event.LAPSE].sources)
        with self.database.read() as session:  # most of the time there is none, and no writer has to wait
            late = session.scalars(select(TaskRow.id).where(open_, TaskRow.deadline < now).limit(LAPSED_AT_ONCE)).all()
        if not late:
            return 0
        with self._change(now) as session:
            return _lapse(session, now, TaskRow.id.in_(late))

    # ---- verdict and attestation

    def cases(self, tasks: Sequence[str]) -> dict[str, Case]:
        """What there is to judge, of tasks at the stage `checking`."""
        asked = (
            select(TaskRow, CommitmentRow, ProofRow)
            .join(CommitmentRow, CommitmentRow.task == TaskRow.id)
            .join(ProofRow, ProofRow.task == TaskRow.id)
            .where(TaskRow.id.in_(tasks))
        )
        with self.database.read() as session:
            return {
                row.id: Case(
                    task=Task.from_json(row.document),
                    commitment=Commitment.from_json(bound.document),
                    challenge=Challenge.from_json(bound.challenge),
                    proof=proof.blob,
                    check_seed=bytes.fromhex(proof.check_seed),
                )
                for row, bound, proof in session.execute(asked)
            }

    def judge(self, judgements: Sequence[Judgement], owner: str, now: float) -> list[str]:
        """Store verdicts in one transaction; those tasks whose lease the owner has lost are left out.

        Returns the tasks whose verdict is stored.
        """
        accepted = {one.task for one in judgements if one.verdict.verdict == "accepted"}
        ours, free = TaskRow.owner == owner, {"detail": None}
        with self._change(now) as session:
            stored = _moved(session, Event.ACCEPT, now, TaskRow.id.in_(accepted), ours, **free)
            rejected = {one.task for one in judgements} - accepted
            stored += _moved(session, Event.REJECT, now, TaskRow.id.in_(rejected), ours, **free)
            families: Counter[str] = Counter()
            for one in (one for one in judgements if one.task in stored):
                session.add(_verdict_row(one, now))
                families.update(one.families or {})
            for family, seconds in sorted(families.items()):
                count(session, "check_seconds", family, seconds)
        return stored

    def verdict(self, task: str) -> VerdictRow | None:
        with self.database.read() as session:
            return session.get(VerdictRow, task)

    def outcomes(self, tasks: Sequence[str]) -> dict[str, Outcome]:
        """What is to be signed, of tasks that are judged or lapsed."""
        asked = (
            select(TaskRow, ModelRow.report, CommitmentRow, VerdictRow)
            .join(ModelRow, ModelRow.id == TaskRow.model)
            .outerjoin(CommitmentRow, CommitmentRow.task == TaskRow.id)
            .outerjoin(VerdictRow, VerdictRow.task == TaskRow.id)
            .where(TaskRow.id.in_(tasks))
        )
        with self.database.read() as session:
            return {
                row.id: Outcome(
                    task=Task.from_json(row.document),
                    commitment=Commitment.from_json(bound.document) if bound else None,
                    challenge=Challenge.from_json(bound.challenge) if bound else None,
                    verdict=Verdict.from_json(verdict.document) if verdict else None,
                    outputs=tuple(report["outputs"]),
                    at=verdict.created if verdict else float(row.deadline),
                )
                for row, report, bound, verdict in session.execute(asked)
            }

    def protect(self, attestations: Sequence[PaymentAttestation], now: float) -> list[PaymentAttestation | Conflict]:
        """Make it durable that these, and nothing else, are signed for their (committee, task, nonce).

        For each: what was protected first, when verdict and evidence are the same: that is what to sign; else the
        Conflict. Raises Unavailable when another process protects the same tasks just now.
        """
        try:
            with self.database.write() as session:
                tasks = [attestation.task_id.hex() for attestation in attestations]
                found = session.scalars(select(ProtectionRow).where(ProtectionRow.task.in_(tasks)))
                known = {(row.committee, row.task, row.nonce): row for row in found}
                return [_protected(session, known, attestation, now) for attestation in attestations]
        except IntegrityError as error:
            raise Unavailable("another process is about to sign for the same task") from error

    def attest(self, signed: Sequence[SignedAttestation], now: float) -> None:
        """Store signed verdicts and lapses in one transaction; again is the same."""
        try:
            with self._change(now) as session:
                self._attest(session, signed, now)
        except IntegrityError as error:
            raise Unavailable("another process stores the same attestation, or a payee's first") from error

    def _attest(self, session: Session, signed: Sequence[SignedAttestation], now: float) -> None:
        lapsed = {one.attestation.task_id.hex() for one in signed if one.attestation.verdict == EXPIRED}
        judged = {one.attestation.task_id.hex() for one in signed} - lapsed
        free = {"owner": None, "detail": None}
        moved = _moved(session, Event.ATTEST, now, TaskRow.id.in_(judged), **free)
        moved += _moved(session, Event.EXPIRE, now, TaskRow.id.in_(lapsed), **free)
        revenue: Counter[tuple[str, int, str]] = Counter()
        for one in (one for one in signed if one.attestation.task_id.hex() in moved):
            said = one.attestation
            session.add(
                AttestationRow(
                    uid=said.digest().hex(),
                    task=said.task_id.hex(),
                    payee=said.payee,
                    verdict=said.verdict,
                    document=one.to_json(),
                    created=now,
                )
            )
            if said.amount:
                revenue[(said.payee, said.chain_id, said.token)] += said.amount
        for key, amount in sorted(revenue.items()):
            _earn(session, key, amount)

    def attestation(self, uid: str) -> AttestationRow | None:
        with self.database.read() as session:
            return session.get(AttestationRow, uid)

    def attestation_of(self, task: str) -> AttestationRow | None:
        with self.database.read() as session:
            return session.scalar(select(AttestationRow).where(AttestationRow.task == task))

    # ---- files

    def unreferenced(self, blobs: Iterable[str]) -> set[str]:
        """Those that nothing on record points to."""
        left = set(blobs)
        with self.database.read() as session:
            for column in (TaskRow.inputs, ProofRow.blob, ModelRow.blob, ModelFileRow.blob):
                if left:
                    left -= set(session.scalars(select(column).where(column.in_(left))))
        return left

    # ---- transactions

    def _add(self, row: ModelRow | TaskRow, *others: Row, moved: Moved | None = None, now: float = 0.0) -> bool:
        """Whether the row was new; the others, and what is told, belong to it."""
        try:
            with self._change(now) as session:
                if session.get(type(row), row.id) is not None:
                    return False
                session.add(row)
                session.flush()
                session.add_all(others)
                session.info["moved"].extend([moved] if moved else [])
        except IntegrityError:
            return False  # somebody else was first
        return True

    @contextmanager
    def _change(self, now: float) -> Iterator[Session]:
        """One transaction that tells, at its end, which tasks it moved."""
        with self.database.write() as session:
            session.info["moved"] = []
            yield session
            announce(session, session.info["moved"], now)


_BLIND = {"synchronize_session": False}


def _move(session: Session, happened: Event, now: float, task: str, *where: Any, **values: Any) -> bool:
    """Compare-and-set: the task goes to the event's target iff it is at one of its sources."""
    return bool(_moved(session, happened, now, TaskRow.id == task, *where, **values))


def _moved(session: Session, happened: Event, now: float, *where: Any, **values: Any) -> list[str]:
    sources, target = TRANSITIONS[happened]
    change = update(TaskRow).where(TaskRow.stage.in_(sources), *where)
    told = change.values(stage=target, changed=now, **values).returning(TaskRow.id, TaskRow.tenant)
    rows = session.execute(told, execution_options=_BLIND).all()
    session.info["moved"].extend(Moved(task, tenant, target) for task, tenant in rows)
    return [task for task, _ in rows]


def _free(now: float) -> Any:
    """Nobody holds it. Who was held up by a clock that was set right loses it, as with any lease that ran out."""
    return or_(TaskRow.lease <= now, TaskRow.lease > now + FARTHEST)


def _lapse(session: Session, now: float, which: Any) -> int:
    return len(_moved(session, Event.LAPSE, now, TaskRow.deadline < now, which, lease=now))


def _challenge_again(session: Session, task: str, commitment: Commitment) -> Challenge:
    row = session.get_one(TaskRow, task)
    bound = session.get(CommitmentRow, task)
    if bound and (bound.digest, bound.worker) == (commitment.digest().hex(), commitment.worker):
        return Challenge.from_json(bound.challenge)
    if bound is None and row.stage in (Stage.LAPSED, Stage.EXPIRED):
        raise Expired(f"task {task} expired at {row.deadline}")
    raise Conflict(f"task {task} has another commitment")


def _same_proof(session: Session, task: str, digest: bytes) -> None:
    row, proof = session.get_one(TaskRow, task), session.get(ProofRow, task)
    if proof and proof.digest == digest.hex():
        return
    if proof:
        raise Conflict(f"task {task} has another proof")
    if row.stage in (Stage.LAPSED, Stage.EXPIRED):
        raise Expired(f"task {task} expired at {row.deadline}")
    if row.stage == Stage.POSTED:
        raise Conflict(f"task {task} has no commitment yet")


def _verdict_row(one: Judgement, now: float) -> VerdictRow:
    return VerdictRow(
        task=one.task,
        verdict=one.verdict.verdict,
        reason=one.verdict.reason and str(one.verdict.reason),
        document=one.verdict.to_json(),
        seconds=one.seconds,
        trail=one.trail,
        created=now,
    )


def _protected(
    session: Session, known: Mapping[tuple[str, str, str], ProtectionRow], attestation: PaymentAttestation, now: float
) -> PaymentAttestation | Conflict:
    key = (attestation.committee_id.hex(), attestation.task_id.hex(), attestation.nonce.hex())
    first = known.get(key)
    if first is None:
        session.add(protection_row(attestation, now))
        return attestation
    if (first.verdict, first.evidence) != (attestation.verdict, attestation.evidence_hash.hex()):
        return Conflict(f"task {key[1]}: another verdict was signed for this task and nonce")
    return PaymentAttestation.from_json(first.document)


def protection_row(attestation: PaymentAttestation, now: float) -> ProtectionRow:
    return ProtectionRow(
        committee=attestation.committee_id.hex(),
        task=attestation.task_id.hex(),
        nonce=attestation.nonce.hex(),
        uid=attestation.digest().hex(),
        verdict=attestation.verdict,
        evidence=attestation.evidence_hash.hex(),
        document=attestation.to_json(),
        created=now,
    )


def _earn(session: Session, key: tuple[str, int, str], amount: int) -> None:
    """Amounts go beyond what SQL adds exactly, so the row is read, locked, and written."""
    row = session.get(RevenueRow, key, with_for_update=True)
    if row is None:
        payee, chain_id, token = key
        session.add(RevenueRow(payee=payee, chain_id=chain_id, token=token, amount=str(amount)))
    else:
        row.amount = str(int(row.amount) + amount)
