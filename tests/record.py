"""A record in a folder with a clock that a test moves, and tasks of the world carried part of the way."""

import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path

import world

from proof import bundle
from proof.attestation import sign_commitment, sign_upload
from proof.bundle import Proof
from proof.messages import Challenge, Commitment
from prover import prove
from verifier.blobs import Blobs
from verifier.jobs import Bench
from verifier.library import Library
from verifier.release import Signer
from verifier.settings import Settings
from verifier.store import Store
from verifier.tables import ModelRow

NOW = 1_800_000_000.0


@dataclass
class Clock:
    now: float = NOW

    def __call__(self) -> float:
        return self.now


@dataclass
class Work:
    """One task of the small world, and the honest worker's answers to it."""

    asked: world.World
    committed: prove.Committed
    signed: Commitment

    @property
    def id(self) -> str:
        return self.asked.task.id().hex()

    def proof(self, challenge: Challenge) -> Proof:
        return prove.answer(self.committed, self.signed, challenge, self.asked.task)

    def signature(self, path: Path, key: bytes = world.WORKER) -> str:
        task = self.asked.task
        digest = bundle.file_digest(path)
        return "0x" + sign_upload(task.id(), self.signed.digest(), digest, task.reward, key).hex()


def work(bend=None) -> Work:
    """A fresh task; `bend` changes the trace before it is committed."""
    asked = replace(world.small(), nonce=secrets.token_bytes(32))
    trace = asked.run()
    committed = prove.commit(asked.model, bend(trace) if bend else trace, asked.task)
    return Work(asked, committed, sign_commitment(committed.commitment, asked.task.reward, asked.key))


@dataclass
class Record:
    root: Path
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.settings = Settings.from_env({}, self.root)
        self.blobs, self.store = Blobs(self.root / "blobs"), Store(self.settings.database)
        self.store.create()
        self.library = Library(self.store, self.blobs)
        self.signer = Signer.create(self.settings.default_key)

    def bench(self, **changes) -> Bench:
        settings = replace(self.settings, **changes)
        return Bench(self.store, self.blobs, self.library, self.signer, settings, self.clock)

    def keep(self, data: bytes) -> str:
        path = self.blobs.scratch()
        path.write_bytes(data)
        return self.blobs.adopt(path)

    def register(self) -> None:
        model = world.small().model
        row = ModelRow(
            id=model.id.hex(), blob=self.keep(world.small().source), size=1, report=model.report(), created=NOW
        )
        self.store.add_model(row)

    def post(self, done: Work) -> str:
        self.register()
        self.store.add_task(done.asked.task, self.keep(b"inputs"), self.clock())
        return done.id

    def check(self, done: Work, bend=lambda proof: proof) -> str:
        """Bring a task to `checking`; `bend` changes the proof that is stored."""
        task = self.post(done)
        challenge = self.store.commit(done.signed, self.clock())
        path = self.blobs.scratch()
        bundle.write_proof(path, bend(done.proof(challenge)))
        digest, size = bundle.file_digest(path), path.stat().st_size
        self.store.prove(task, digest, self.blobs.adopt(path), size, self.clock())
        return task

    def stage(self, task: str) -> str:
        return self.store.task(task).task.stage
