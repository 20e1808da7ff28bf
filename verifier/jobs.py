"""What a worker process does with a model: lease its due tasks, judge them, store the verdicts, sign.

A fault of ours is no verdict: the task is given back and tried again, and stalls after too many attempts. As many tasks
are taken at once as are judged in a moment: small ones share their transactions, large ones go to whoever is free.
"""

import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event as Signal
from threading import Thread
from time import perf_counter

from gpu.clearing.stand import Shelf
from gpu.plan import Model
from proof.bundle import Proof, read_proof
from proof.errors import Conflict, Malformed, Unavailable
from proof.messages import Verdict
from verifier.blobs import Blobs
from verifier.library import Library
from verifier.lifecycle import Stage
from verifier.logs import say
from verifier.release import Signer, attest
from verifier.settings import Settings
from verifier.store import Case, Judgement, Store
from verifier.tables import TaskRow
from verifier.trail import Trail
from verifier.verify import verify

BEATS = 4  # of a lease: how often it is renewed
LONGEST_PAUSE = 60.0  # seconds before a task that met a fault of ours is tried again
MOMENT = 0.25  # seconds of checking that share a transaction
MOST_AT_ONCE = 64

log = logging.getLogger(__name__)


@dataclass
class Bench:
    """What a worker process keeps between jobs."""

    store: Store
    blobs: Blobs
    library: Library
    signer: Signer
    settings: Settings
    clock: Callable[[], float]
    again: Callable[[str], None] = lambda model: None  # asks for the rest of a model's tasks
    shelf: Shelf | None = None  # of the device that checks, where there is one
    _seconds: dict[str, float] = field(default_factory=dict)  # that a task of a model took lately

    def judge(self, model: str) -> None:
        """Bring due tasks of a model to their ends, or as far as this process gets; what is left goes to the next."""
        owner, now = secrets.token_hex(16), self.clock()
        limit = max(1, min(MOST_AT_ONCE, int(MOMENT / self._seconds.get(model, MOMENT))))
        rows = self.store.lease(model, owner, now, now + self.settings.lease, limit)
        if not rows:
            return
        if len(rows) == limit:
            self.again(model)
        tasks = [row.id for row in rows]
        with self._held(tasks, owner):
            try:
                self._finish(self._decide(model, rows, owner), owner)
            except Unavailable as failure:
                self._give_back(rows, owner, str(failure))
            except BaseException as failure:
                self._give_back(rows, owner, f"a bug of ours: {type(failure).__name__}")
                raise

    def _decide(self, model: str, rows: Sequence[TaskRow], owner: str) -> list[str]:
        """Judge what is to be judged; the tasks that can be signed now."""
        judgements, started = [], perf_counter()
        cases = self.store.cases([row.id for row in rows if row.stage == Stage.CHECKING])
        for i, row in enumerate(rows):
            if row.stage == Stage.CHECKING and row.attempts > self.settings.attempts:
                reason = f"no verdict after {self.settings.attempts} attempts: {row.detail or 'worker processes died'}"
                self._stall(row.id, owner, reason)
            elif row.stage == Stage.CHECKING:
                try:
                    judgements.append(self._judgement(row.id, cases[row.id]))
                except Unavailable as failure:
                    self._give_back([row], owner, str(failure))
            if perf_counter() - started > 2 * MOMENT and i + 1 < len(rows):
                self.store.give_back([left.id for left in rows[i + 1 :]], owner, self.clock(), None)
                rows = rows[: i + 1]
                break
        stored = self.store.judge(judgements, owner, self.clock()) if judgements else []
        for one in judgements:
            if one.task in stored:
                verdict = one.verdict
                say(log, f"task.{verdict.verdict}", task=one.task, seconds=one.seconds, reason=verdict.reason)
            else:
                say(log, "task.lease_lost", logging.WARNING, task=one.task)
        if judgements:
            self._seconds[model] = (perf_counter() - started) / len(rows)
        return [row.id for row in rows if row.stage != Stage.CHECKING] + stored

    def _judgement(self, task: str, case: Case) -> Judgement:
        try:
            proof = read_proof(self.blobs.check(case.proof))
        except Malformed as error:  # it was well formed when it came
            raise Unavailable(f"the stored proof does not read: {error}") from error
        model = self.library.model(case.task.model)
        started, trail = perf_counter(), Trail()
        verdict = decide(case, proof, model, self.shelf, trail)
        seconds = perf_counter() - started
        return Judgement(task, verdict, seconds, trail.packed(), trail.seconds_by_family())

    def _finish(self, tasks: Sequence[str], owner: str) -> None:
        for task, outcome in attest(self.store, self.signer, tasks, self.settings.validity, self.clock()).items():
            if isinstance(outcome, Conflict):
                self._stall(task, owner, str(outcome))
            else:
                said = outcome.attestation
                say(log, "task.signed", task=task, uid=said.digest().hex(), verdict=said.verdict, amount=said.amount)

    def _stall(self, task: str, owner: str, reason: str) -> None:
        self.store.stall(task, owner, reason, self.clock())
        say(log, "task.stalled", logging.ERROR, task=task, reason=reason)

    def _give_back(self, rows: Sequence[TaskRow], owner: str, reason: str) -> None:
        pause = min(2.0 ** (max(row.attempts for row in rows) - 1), LONGEST_PAUSE)
        self.store.give_back([row.id for row in rows], owner, self.clock() + pause, reason)
        for row in rows:
            say(log, "task.given_back", logging.WARNING, task=row.id, attempt=row.attempts, reason=reason)

    @contextmanager
    def _held(self, tasks: Sequence[str], owner: str) -> Iterator[None]:
        """Renew the leases as long as the work goes on."""
        done = Signal()

        def beat() -> None:
            while not done.wait(self.settings.lease / BEATS):
                try:
                    self.store.renew(tasks, owner, self.clock() + self.settings.lease)
                except Unavailable as failure:
                    say(log, "lease.not_renewed", logging.WARNING, tasks=len(tasks), reason=str(failure))

        beats = Thread(target=beat, daemon=True)
        beats.start()
        try:
            yield
        finally:
            done.set()
            beats.join()


def decide(case: Case, proof: Proof, model: Model, shelf: Shelf | None = None, trail: Trail | None = None) -> Verdict:
    """The verdict on a proof file in the case that it was uploaded for."""
    recorded = (case.commitment, case.challenge)
    return verify(proof, model, case.check_seed, task=case.task, recorded=recorded, shelf=shelf, watch=trail)
