"""The record: SQLAlchemy over SQLite (WAL) or PostgreSQL, every change of stage a compare-and-set.

Randomness is drawn here, inside the transaction that stores what it answers: the challenge with the commitment,
the check seed with the proof. Methods raise Conflict for a true message at the wrong stage, Unavailable when the
database does not answer. Times come from the caller.
"""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, CursorResult, Engine, create_engine, event, func, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from proof.attestation import PaymentAttestation, SignedAttestation
from proof.errors import Conflict, Unavailable
from proof.messages import Challenge, Commitment, Task, Verdict
from verifier.lifecycle import DUE, TRANSITIONS, Event, Expired, LostLease, Stage
from verifier.tables import (
    AttestationRow,
    CommitmentRow,
    ModelRow,
    ProofRow,
    ProtectionRow,
    Row,
    TaskRow,
    VerdictRow,
)

SEED_BYTES = 32
SWEPT = 100  # tasks a sweep looks at


@dataclass(frozen=True)
class Summary:
    """A task with what has come of it so far; rows that hold large messages are left out."""

    task: TaskRow
    commitment: str | None
    worker: str | None
    proof: str | None
    proof_size: int | None
    verdict: str | None
    reason: str | None
    seconds: float | None
    uid: str | None


@dataclass(frozen=True)
class Case:
    """Everything that judging a task needs."""

    task: Task
    commitment: Commitment
    challenge: Challenge
    proof: str  # blob
    check_seed: bytes


@dataclass(frozen=True)
class Judged:
    """A task with its verdict: what is signed, and when the verdict was durable."""

    task: Task
    commitment: Commitment
    challenge: Challenge
    verdict: Verdict
    outputs: tuple[str, ...]
    at: float


class Store:
    def __init__(self, url: str) -> None:
        self._engine = _engine(url)

    def create(self) -> None:
        """Create the tables that are missing."""
        with _available():
            Row.metadata.create_all(self._engine)

    def ping(self) -> None:
        with self._read() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        self._engine.dispose()

    # ---- models and tasks

    def add_model(self, row: ModelRow) -> bool:
        """Whether it is new; a model that is there stays as it is."""
        return self._add(row, row.id)

    def model(self, model: str) -> ModelRow | None:
        with self._read() as session:
            return session.get(ModelRow, model)

    def add_task(self, task: Task, inputs: str, now: float) -> bool:
        row = TaskRow(
            id=task.id().hex(),
            model=task.model.hex(),
            document=task.to_json(),
            inputs=inputs,
            deadline=task.deadline,
            created=now,
            stage=Stage.POSTED,
        )
        return self._add(row, row.id)

    def task(self, task: str) -> Summary | None:
        with self._read() as session:
            return next(_summaries(session, TaskRow.id == task, 1), None)

    def tasks(self, stage: Stage | None, limit: int) -> list[Summary]:
        """The oldest first."""
        with self._read() as session:
            return list(_summaries(session, True if stage is None else TaskRow.stage == stage, limit))

    # ---- commitment and challenge

    def commit(self, commitment: Commitment, now: float) -> Challenge:
        """Store the commitment to its task and draw the challenge, in one transaction.

        The same commitment again gets the same challenge. Raises Conflict for another one: there is no second
        roll of the dice. Raises Expired past the deadline.
        """
        task, digest = (commitment.task or b"").hex(), commitment.digest()
        with self._write() as session:
            _expire(session, now, task)
            if not _move(session, Event.COMMIT, task):
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
        with self._read() as session:
            return session.get(CommitmentRow, task)

    # ---- proof and check seed

    def prove(self, task: str, digest: bytes, blob: str, size: int, now: float) -> bool:
        """Record a proof that is durable already, and draw the check seed, in one transaction.

        Whether it is new. Raises Conflict for another proof than the stored one, Expired past the deadline.
        """
        with self._write() as session:
            _expire(session, now, task)
            if _move(session, Event.PROVE, task, lease=now):
                seed = secrets.token_bytes(SEED_BYTES).hex()
                row = ProofRow(task=task, digest=digest.hex(), blob=blob, size=size, check_seed=seed, created=now)
                session.add(row)
                return True
            _same_proof(session, task, digest)
            return False

    def check_proof(self, task: str, digest: bytes) -> None:
        """Raise what `prove` would raise for a task that is not waiting for its proof."""
        with self._read() as session:
            _same_proof(session, task, digest)

    def proof(self, task: str) -> ProofRow | None:
        with self._read() as session:
            return session.get(ProofRow, task)

    def proof_is_kept(self, blob: str) -> bool:
        with self._read() as session:
            return session.scalar(select(ProofRow.task).where(ProofRow.blob == blob).limit(1)) is not None

    # ---- leases: a task belongs to one worker process at a time, and to the next when that one falls silent

    def lease(self, task: str, owner: str, now: float, until: float) -> TaskRow | None:
        """The task, now the owner's; None when nothing is left to do or another process holds it."""
        mine = update(TaskRow).where(TaskRow.id == task, TaskRow.stage.in_(DUE), TaskRow.lease <= now)
        with self._write() as session:
            taken = mine.values(owner=owner, lease=until, attempts=TaskRow.attempts + 1)
            return session.get_one(TaskRow, task) if _changed(session, taken) else None

    def renew(self, task: str, owner: str, until: float) -> None:
        """Hold the lease until then; raises LostLease."""
        self._held(task, owner, lease=until)

    def give_back(self, task: str, owner: str, until: float, detail: str) -> None:
        """Let any process take the task from `until` on; raises LostLease."""
        self._held(task, owner, owner=None, lease=until, detail=detail)

    def stall(self, task: str, owner: str, detail: str) -> None:
        with self._write() as session:
            if not _move(session, Event.STALL, task, TaskRow.owner == owner, owner=None, detail=detail):
                raise LostLease(f"task {task} is no longer ours")

    def due(self, now: float) -> Sequence[tuple[str, int]]:
        """(id, attempts) of tasks that wait for a worker process, the longest waiting first."""
        waiting = select(TaskRow.id, TaskRow.attempts).where(TaskRow.stage.in_(DUE), TaskRow.lease <= now)
        with self._read() as session:
            return [(row.id, row.attempts) for row in session.execute(waiting.order_by(TaskRow.lease).limit(SWEPT))]

    def expire(self, now: float) -> int:
        """How many tasks were past their deadline without a proof."""
        with self._write() as session:
            return _expire(session, now)

    # ---- verdict and attestation

    def case(self, task: str) -> Case:
        """What there is to judge, of a task at the stage `checking`."""
        with self._read() as session:
            row, proof = session.get_one(TaskRow, task), session.get_one(ProofRow, task)
            bound = session.get_one(CommitmentRow, task)
            return Case(
                task=Task.from_json(row.document),
                commitment=Commitment.from_json(bound.document),
                challenge=Challenge.from_json(bound.challenge),
                proof=proof.blob,
                check_seed=bytes.fromhex(proof.check_seed),
            )

    def judge(self, task: str, owner: str, verdict: Verdict, seconds: float, now: float) -> None:
        """Store the verdict; raises LostLease, and stores nothing, when the task is no longer the owner's."""
        happened = Event.ACCEPT if verdict.verdict == "accepted" else Event.REJECT
        with self._write() as session:
            if not _move(session, happened, task, TaskRow.owner == owner, detail=None):
                raise LostLease(f"task {task} is no longer ours")
            session.add(
                VerdictRow(
                    task=task,
                    verdict=verdict.verdict,
                    reason=verdict.reason and str(verdict.reason),
                    document=verdict.to_json(),
                    seconds=seconds,
                    created=now,
                )
            )

    def verdict(self, task: str) -> VerdictRow | None:
        with self._read() as session:
            return session.get(VerdictRow, task)

    def judged(self, task: str) -> Judged:
        with self._read() as session:
            row, bound = session.get_one(TaskRow, task), session.get_one(CommitmentRow, task)
            verdict, model = session.get_one(VerdictRow, task), session.get_one(ModelRow, row.model)
            return Judged(
                task=Task.from_json(row.document),
                commitment=Commitment.from_json(bound.document),
                challenge=Challenge.from_json(bound.challenge),
                verdict=Verdict.from_json(verdict.document),
                outputs=tuple(model.report["outputs"]),
                at=verdict.created,
            )

    def protect(self, attestation: PaymentAttestation, now: float) -> PaymentAttestation:
        """Make it durable that this, and nothing else, is signed for its (committee, task, nonce).

        Returns what was protected first, when verdict and evidence are the same: that is what to sign.
        Raises Conflict when they are not.
        """
        key = (attestation.committee_id.hex(), attestation.task_id.hex(), attestation.nonce.hex())
        row = ProtectionRow(
            committee=key[0],
            task=key[1],
            nonce=key[2],
            uid=attestation.digest().hex(),
            verdict=attestation.verdict,
            evidence=attestation.evidence_hash.hex(),
            document=attestation.to_json(),
            created=now,
        )
        if self._add(row, key):
            return attestation
        with self._read() as session:
            first = session.get_one(ProtectionRow, key)
        if (first.verdict, first.evidence) != (attestation.verdict, attestation.evidence_hash.hex()):
            raise Conflict(f"task {key[1]}: another verdict was signed for this task and nonce")
        return PaymentAttestation.from_json(first.document)

    def attest(self, signed: SignedAttestation, now: float) -> None:
        """Store the signed verdict; again is the same."""
        task, uid = signed.attestation.task_id.hex(), signed.attestation.digest().hex()
        with self._write() as session:
            if _move(session, Event.ATTEST, task, owner=None, detail=None):
                session.add(AttestationRow(uid=uid, task=task, document=signed.to_json(), created=now))

    def attestation(self, uid: str) -> AttestationRow | None:
        with self._read() as session:
            return session.get(AttestationRow, uid)

    def attestation_of(self, task: str) -> AttestationRow | None:
        with self._read() as session:
            return session.scalar(select(AttestationRow).where(AttestationRow.task == task))

    # ---- figures

    def stages(self) -> dict[str, int]:
        with self._read() as session:
            rows = session.execute(select(TaskRow.stage, func.count()).group_by(TaskRow.stage))
            return {str(stage): count for stage, count in rows}

    def verdicts(self) -> list[tuple[str, str, int, float]]:
        """(verdict, reason, how many, seconds of checking), over all tasks."""
        columns = VerdictRow.verdict, VerdictRow.reason
        asked = select(*columns, func.count(), func.sum(VerdictRow.seconds)).group_by(*columns)
        with self._read() as session:
            return [(verdict, reason or "", count, total) for verdict, reason, count, total in session.execute(asked)]

    # ---- transactions

    def _add(self, row: Row, key: object) -> bool:
        try:
            with self._write() as session:
                if session.get(type(row), key) is not None:
                    return False
                session.add(row)
        except IntegrityError:
            return False  # somebody else was first
        return True

    def _held(self, task: str, holder: str, **values: Any) -> None:
        mine = update(TaskRow).where(TaskRow.id == task, TaskRow.owner == holder, TaskRow.stage.in_(DUE))
        with self._write() as session:
            if not _changed(session, mine.values(**values)):
                raise LostLease(f"task {task} is no longer ours")

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with _available(), Session(self._engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def _write(self) -> Iterator[Session]:
        engine = self._engine.execution_options(begin="BEGIN IMMEDIATE")
        with _available(), Session(engine, expire_on_commit=False) as session, session.begin():
            yield session


@contextmanager
def _available() -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise
    except (DBAPIError, PoolTimeout) as error:
        raise Unavailable(f"the database does not answer: {type(error).__name__}") from error


def _engine(url: str) -> Engine:
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True, isolation_level="READ COMMITTED")
    engine = create_engine(url, connect_args={"timeout": 30, "isolation_level": None})

    @event.listens_for(engine, "connect")
    def durable(connection: Any, _: Any) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        """A writer takes the lock at once: one that read first could not upgrade without a deadlock."""
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine


def _changed(session: Session, statement: Any) -> int:
    result = session.execute(statement.execution_options(synchronize_session=False))
    assert isinstance(result, CursorResult)
    return result.rowcount


def _move(session: Session, happened: Event, task: str, *where: Any, **values: Any) -> bool:
    """Compare-and-set: the task goes to the event's target iff it is at one of its sources."""
    sources, target = TRANSITIONS[happened]
    moved = update(TaskRow).where(TaskRow.id == task, TaskRow.stage.in_(sources), *where)
    return _changed(session, moved.values(stage=target, **values)) == 1


def _expire(session: Session, now: float, task: str | None = None) -> int:
    sources, target = TRANSITIONS[Event.EXPIRE]
    late = update(TaskRow).where(TaskRow.stage.in_(sources), TaskRow.deadline < now)
    if task is not None:
        late = late.where(TaskRow.id == task)
    return _changed(session, late.values(stage=target))


def _challenge_again(session: Session, task: str, commitment: Commitment) -> Challenge:
    row = session.get_one(TaskRow, task)
    bound = session.get(CommitmentRow, task)
    if bound and (bound.digest, bound.worker) == (commitment.digest().hex(), commitment.worker):
        return Challenge.from_json(bound.challenge)
    if bound is None and row.stage == Stage.EXPIRED:
        raise Expired(f"task {task} expired at {row.deadline}")
    raise Conflict(f"task {task} has another commitment")


def _same_proof(session: Session, task: str, digest: bytes) -> None:
    row, proof = session.get_one(TaskRow, task), session.get(ProofRow, task)
    if proof and proof.digest == digest.hex():
        return
    if proof:
        raise Conflict(f"task {task} has another proof")
    if row.stage == Stage.EXPIRED:
        raise Expired(f"task {task} expired at {row.deadline}")
    if row.stage == Stage.POSTED:
        raise Conflict(f"task {task} has no commitment yet")


def _summaries(session: Session, where: Any, limit: int) -> Iterator[Summary]:
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
        .where(where)
        .order_by(TaskRow.created, TaskRow.id)
        .limit(limit)
    )
    for row in session.execute(asked):
        yield Summary(*row)
