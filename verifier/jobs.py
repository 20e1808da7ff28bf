"""What a worker process does with a task id: take the lease, judge, store the verdict, release.

A fault of ours is no verdict: the task is given back and tried again, and stalls after too many attempts.
"""

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event as Signal
from threading import Thread
from time import perf_counter

from gpu.clearing.stand import Shelf
from gpu.plan import Model
from proof.bundle import Proof, read_proof
from proof.errors import Malformed, Unavailable
from proof.messages import Verdict
from verifier.blobs import Blobs
from verifier.library import Library
from verifier.lifecycle import LostLease, Stage
from verifier.release import Signer
from verifier.settings import Settings
from verifier.store import Case, Store
from verifier.verify import verify

BEATS = 4  # of a lease: how often it is renewed
DETAIL_CHARACTERS = 1000  # a rejection quotes what it refuses, and a verdict is bounded
LONGEST_PAUSE = 60.0  # seconds before a task that met a fault of ours is tried again

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """What a worker process keeps between jobs."""

    store: Store
    blobs: Blobs
    library: Library
    signer: Signer
    settings: Settings
    clock: Callable[[], float]
    shelf: Shelf | None = None  # of the device that checks, where there is one

    def judge(self, task: str) -> None:
        """Bring a task from `checking` to `attested`, or as far as this process gets."""
        owner, now = secrets.token_hex(16), self.clock()
        row = self.store.lease(task, owner, now, now + self.settings.lease)
        if row is None:
            return
        try:
            with self._held(task, owner):
                if row.stage == Stage.CHECKING and not self._decide(task, owner, row.attempts):
                    return
                signed = self.signer.attest(self.store, task, self.settings.validity, self.clock())
                log.info("attested task=%s uid=%s", task, signed.attestation.digest().hex())
        except Unavailable as failure:
            log.warning("no verdict yet task=%s attempt=%d: %s", task, row.attempts, failure)
            pause = min(2.0 ** (row.attempts - 1), LONGEST_PAUSE)
            self.store.give_back(task, owner, self.clock() + pause, str(failure))
        except LostLease as failure:
            log.warning("%s", failure)

    def _decide(self, task: str, owner: str, attempt: int) -> bool:
        """Whether there is a verdict now; otherwise the task has stalled."""
        if attempt > self.settings.attempts:
            self.store.stall(task, owner, f"no verdict after {self.settings.attempts} attempts")
            log.error("stalled task=%s", task)
            return False
        case = self.store.case(task)
        try:
            proof = read_proof(self.blobs.check(case.proof))
        except Malformed as error:  # it was well formed when it came
            raise Unavailable(f"the stored proof does not read: {error}") from error
        model = self.library.model(case.task.model)
        started = perf_counter()
        verdict = decide(case, proof, model, self.shelf)
        seconds = perf_counter() - started
        self.store.judge(task, owner, verdict, seconds, self.clock())
        log.info("%s task=%s seconds=%.3f reason=%s", verdict.verdict, task, seconds, verdict.reason)
        return True

    @contextmanager
    def _held(self, task: str, owner: str) -> Iterator[None]:
        """Renew the lease as long as the work goes on."""
        done = Signal()

        def beat() -> None:
            while not done.wait(self.settings.lease / BEATS):
                try:
                    self.store.renew(task, owner, self.clock() + self.settings.lease)
                except Unavailable as failure:
                    log.warning("lease not renewed task=%s: %s", task, failure)
                except LostLease:
                    return

        beats = Thread(target=beat, daemon=True)
        beats.start()
        try:
            yield
        finally:
            done.set()
            beats.join()


def decide(case: Case, proof: Proof, model: Model, shelf: Shelf | None = None) -> Verdict:
    """The verdict on a proof file in the case that it was uploaded for."""
    recorded = (case.commitment, case.challenge)
    return verify(proof, model, case.check_seed, task=case.task, recorded=recorded, shelf=shelf)
