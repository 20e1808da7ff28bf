"""A record in a folder with a clock that a test moves, and tasks of the world carried part of the way."""

import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path

import world

from proof import bundle
from proof.attestation import sign_commitment
from proof.bundle import Proof
from proof.messages import Challenge, Commitment
from prover import prove
from verifier import release
from verifier.blobs import Blobs
from verifier.database import Database
from verifier.jobs import Bench
from verifier.library import Library
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


def work(bend=None) -> Work:
    """A fresh task; `bend` changes the trace before it is committed."""
    asked = replace(world.small(), nonce=secrets.token_bytes(32))
    trace = asked.run()
    committed = prove.commit(asked.model, bend(trace) if bend else trace, asked.task)
    return Work(asked, committed, sign_commitment(committed.commitment, asked.task.reward, asked.key))


TENANT = "acme"
KEY = "7c" * 32  # of the attester; files of keys are tested elsewhere


@dataclass
class Record:
    root: Path
    url: str | None = None  # of the database; None: SQLite in the folder
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        key = self.root / "attester.key"
        key.write_text(KEY)
        key.chmod(0o600)
        self.settings = replace(Settings.from_env({}, self.root), key=key, origins=("http://testserver",))
        self.database = Database(self.url or self.settings.database)
        self.database.migrate()
        self.blobs, self.store = Blobs(self.root / "blobs"), Store(self.database)
        self.library = Library(self.store, self.blobs)
        self.signer = release.signer_from(self.settings)

    def bench(self, **changes) -> Bench:
        settings = replace(self.settings, **changes)
        return Bench(self.store, self.blobs, self.library, self.signer, settings, self.clock)

    def judge(self, **changes) -> None:
        """Have a worker process judge what is due now."""
        bench = self.bench(**changes)
        while due := self.store.due(self.clock()):
            bench.judge(due[0])

    def close(self) -> None:
        self.database.close()

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
        self.store.add_task(done.asked.task, self.keep(b"inputs"), self.clock(), TENANT)
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
