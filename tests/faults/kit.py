"""A deployment of real processes, a crowd that uses it as real protocols and workers do, and the audit at the end."""

import ctypes
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from threading import Condition
from typing import Any

import httpx
import numpy as np
import world
from onnx import TensorProto, helper
from servers import PR_SET_PDEATHSIG, Postgres, RedisServer, until
from sqlalchemy import select

from gpu.plan import Model
from proof import attestation, bundle
from proof.attestation import EXPIRED, FAIL, PASS, SignedAttestation, sign_commitment
from proof.errors import Malformed
from proof.messages import Commitment, Task
from prover import prove
from prover.calls import Purpose, TaskState
from prover.client import Client, body, terms
from verifier.blobs import Blobs
from verifier.database import Database
from verifier.lifecycle import FINAL, TRANSITIONS
from verifier.store import Store
from verifier.sweeping import collect
from verifier.tables import AttestationRow, EventRow, ModelRow, ProofRow, ProtectionRow, RevenueRow, TaskRow

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds that a caller repeats one call, and that a scenario waits for its end
HOUR = 3600
THREADS = 8
HONEST = (bytes.fromhex("11" * 32), bytes.fromhex("22" * 32), bytes.fromhex("33" * 32))
CHEAT = bytes.fromhex("44" * 32)
ENVIRON = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "ASSAY_DEVICE": "cpu",
    "ASSAY_LEASE_SECONDS": "2",
    "ASSAY_RATE_KEY": "10000000/minute",
    "ASSAY_RATE_ADDRESS": "10000000/minute",
    "ASSAY_HEAD_SECONDS": "3",
    "ASSAY_BODY_STALL_SECONDS": "3",
}

_libc = ctypes.CDLL(None)


# ---- processes


class Running:
    """`python -m assay …`, gone at the latest with the tests; started again when it was killed."""

    def __init__(self, arguments: Sequence[str], environ: dict[str, str], log: Path) -> None:
        self._command = [sys.executable, "-m", "assay", *arguments]
        self.environ, self.log = environ, log
        self.prepare: Callable[[], None] = lambda: None  # in the new process, before the program
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def start(self) -> None:
        def prepared() -> None:
            _libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
            self.prepare()

        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env={**os.environ, **self.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                preexec_fn=prepared,
            )

    def ready(self) -> str:
        """The line that a service prints once it answers."""
        assert self._process
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert re.match(r"ready http://\S+ signer 0x[0-9a-f]{40}$", line), f"{line!r}: {self.said()}"
        return line

    def said(self) -> str:
        return self.log.read_text()[-3000:]

    def kill(self) -> None:
        assert self._process
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """Ask it to end, as an operator does; its exit status."""
        assert self._process
        self._process.terminate()
        return self._process.wait(PATIENCE)


class Deployment:
    """An API with what it needs: SQLite and an embedded Valkey, or PostgreSQL, Redis and worker processes beside it."""

    def __init__(self, folder: Path, workers: int = 2, *, production: bool = False, **settings: str) -> None:
        self.folder, self.data = folder, folder / "data"
        key = folder / "attester.key"
        key.write_text(secrets.token_hex(32))
        key.chmod(0o600)
        self.environ = ENVIRON | {"ASSAY_KEY_FILE": str(key)} | settings  # a keystore would take each process a second
        self.postgres = Postgres() if production else None
        self.redis = RedisServer() if production else None
        self.database_url = f"sqlite:///{self.data / 'assay.db'}"
        if self.postgres and self.redis:
            self.postgres.start()
            self.redis.start()
            self.database_url = self.postgres.fresh()
            self.environ |= {"ASSAY_DATABASE_URL": self.database_url, "ASSAY_REDIS_URL": self.redis.url}
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        inside = 0 if production else min(workers, 1)
        serve = ["serve", "--data", str(self.data), "--port", str(self.port), "--workers", str(inside)]
        self.api = Running(serve, self.environ, folder / "serve.log")
        outside = workers if production else 0
        work = ["work", "--data", str(self.data)]
        self.workers = [Running(work, self.environ, folder / f"work{i}.log") for i in range(outside)]
        self.key, self.signer = self._prepared()

    def _prepared(self) -> tuple[str, str]:
        command = [sys.executable, "-m", "assay", "init", "--data", str(self.data), "--json"]
        environ = {**os.environ, **self.environ}
        said = subprocess.run(command, cwd=ROOT, env=environ, check=True, stdout=subprocess.PIPE).stdout
        told = json.loads(said)
        return told["api_key"], told["signer"]

    def start(self) -> None:
        for process in (self.api, *self.workers):
            process.start()
        self.api.ready()

    def stop(self) -> None:
        for process in (*self.workers, self.api):
            process.kill()
        for server in (self.postgres, self.redis):
            if server:
                server.stop()

    def children(self, *wanted: str) -> list[int]:
        """Processes that the service started, by what their command lines hold."""
        found = [pid for pid in descendants(self.api.pid) if all(word in command(pid) for word in wanted)]
        return sorted(found)

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """The record, read beside the processes."""
        database = Database(self.database_url)
        try:
            yield Store(database)
        finally:
            database.close()


def descendants(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in map(int, children):
            found += [child, *descendants(child)]
    return found


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # its own end was quicker
        os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# ---- errands: tasks with what their workers will say, made ready before the clock runs


@dataclass(frozen=True)
class Errand:
    task: Task
    key: bytes
    committed: prove.Committed = field(repr=False)
    signed: Commitment = field(repr=False)

    @property
    def id(self) -> str:
        return self.task.id().hex()

    @property
    def honest(self) -> bool:
        return self.key != CHEAT

    @property
    def body(self) -> dict[str, object]:
        task = self.task
        asked = terms(task.model, task.policy, task.reward, task.payer, task.deadline, task.nonce)
        return body(asked, perceptron().inputs)


@cache
def perceptron() -> world.World:
    """Two layers on eight rows: next to nothing to run or check."""
    write = world.Writer(0)
    write.weight("w1", 16, 32, scale=0.25)
    write.weight("w2", 32, 8, scale=0.2)
    write.op("Relu", write.op("MatMul", "x", "w1", to="wide"), to="active")
    write.op("MatMul", "active", "w2", to="y")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", n]) for name, n in (("x", 16), ("y", 8)))
    source = write.model([x], [y])
    inputs = {"x": np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)}
    return world.World(source, Model.open(source), inputs)


@cache
def _trace(honest: bool) -> world.Trace:
    """A cheat says another output than the model gives."""
    trace = perceptron().run()
    return trace if honest else trace | {"y": trace["y"] + 1}


def errand(key: bytes = HONEST[0], seconds: int = HOUR) -> Errand:
    one = perceptron()
    claims = tuple(world.claim(name, array) for name, array in one.inputs.items())
    deadline = int(time.time()) + seconds
    task = Task(one.model.id, claims, one.policy, world.REWARD, "0x" + "9a" * 20, deadline, secrets.token_bytes(32))
    committed = prove.commit(one.model, _trace(key != CHEAT), task)
    return Errand(task, key, committed, sign_commitment(committed.commitment, task.reward, key))


def errands(count: int, cheats: int, seconds: int = HOUR) -> list[Errand]:
    """Cheats among honest workers, evenly."""
    every = count // cheats if cheats else count + 1
    keys = (CHEAT if i % every == every - 1 else HONEST[i % len(HONEST)] for i in range(count))
    return [errand(key, seconds) for key in keys]


# ---- the crowd


class Crowd:
    """A protocol and its workers, as many calls at once as there are threads; each call is repeated as clients do."""

    def __init__(self, deployment: Deployment) -> None:
        self.folder = deployment.folder
        self.protocol = Client(deployment.url, key=deployment.key, patience=PATIENCE)
        self.ahead = 0.0  # seconds by which workers' clocks go with a service whose clock has jumped
        self.workers = {key: _Elsewhen(self, deployment.url, worker=key, patience=PATIENCE) for key in (*HONEST, CHEAT)}
        self.calls = 0  # that were answered
        self._answered = Condition()

    def __enter__(self) -> "Crowd":
        return self

    def __exit__(self, *_: object) -> None:
        for client in (self.protocol, *self.workers.values()):
            client.__exit__(None, None, None)

    def register(self) -> None:
        path = self.folder / "model.onnx"
        path.write_bytes(perceptron().source)
        self.protocol.register(path)

    def run(self, todo: Sequence[Errand], meanwhile: Callable[[], None] = lambda: None) -> None:
        """Bring every errand's proof in; `meanwhile` happens in this thread."""
        with ThreadPoolExecutor(THREADS) as pool:
            running = [pool.submit(self.serve, one) for one in todo]
            meanwhile()
            for one in running:
                one.result()

    def serve(self, one: Errand) -> None:
        self._counted(lambda: self.protocol.post(one.body))
        path = self.answer(one)
        self._counted(lambda: self.workers[one.key].upload(one.task.id(), path, one.task.reward))
        path.unlink()

    def answer(self, one: Errand) -> Path:
        """Commit, and have the proof file that answers the challenge."""
        worker = self.workers[one.key]
        challenge = self._counted(lambda: worker.commit(one.task.id(), one.signed, one.task.reward))
        path = self.folder / f"{one.id}.{secrets.token_hex(4)}"
        bundle.write_proof(path, prove.answer(one.committed, one.signed, challenge, one.task))
        return path

    def reached(self, calls: int) -> None:
        """Wait until so many calls were answered."""
        with self._answered:
            assert self._answered.wait_for(lambda: self.calls >= calls, 2 * PATIENCE), f"{self.calls} of {calls} calls"

    def settled(self, todo: Iterable[Errand], seconds: float = PATIENCE) -> dict[str, TaskState]:
        """The errands' tasks by id, each at its end."""
        wanted, found = {one.id for one in todo}, dict[str, TaskState]()

        def all_final() -> bool:
            found.update({state.id.hex(): state for state in self.protocol.tasks() if state.id.hex() in wanted})
            return len(found) == len(wanted) and all(state.final for state in found.values())

        until(all_final, "not every task comes to its end", seconds, pause=0.3)
        return found

    def _counted(self, call: Callable[[], Any]) -> Any:
        result = call()
        with self._answered:
            self.calls += 1
            self._answered.notify_all()
        return result


class _Elsewhen(Client):
    """A worker by the crowd's clock."""

    def __init__(self, crowd: Crowd, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._crowd = crowd

    def signed(self, purpose: Purpose | None, now: float | None = None) -> dict[str, str]:
        return super().signed(purpose, time.time() + self._crowd.ahead if now is None else now)

    def call(self, method: str, url: str, *, purpose: Purpose | None = None, **content: Any) -> httpx.Response:
        """Once more when the service's clock was elsewhere: libfaketime's jumps are ragged where there are threads."""
        try:
            return super().call(method, url, purpose=purpose, **content)
        except Malformed as refusal:
            if not self._crowd.ahead or "request.expired" not in str(refusal):
                raise
            return super().call(method, url, purpose=purpose, **content)


# ---- the audit


def audit(deployment: Deployment, todo: Sequence[Errand], crowd: Crowd) -> None:
    """What must hold after whatever happened: each task at its one end, signed once, and nothing left over."""
    states = crowd.settled(todo)
    for one in todo:
        end = states[one.id].stage, states[one.id].verdict
        assert end == ("attested", "accepted" if one.honest else "rejected"), f"{one}: {states[one.id]}"
    with deployment.opened() as store:
        for one in todo:
            row = store.attestation_of(one.id)
            assert row
            said = SignedAttestation.from_json(row.document).attestation
            amount = one.task.reward.amount if one.honest else 0
            payee = crowd.workers[one.key].worker.address
            assert (said.verdict, said.amount, said.payee) == (PASS if one.honest else FAIL, amount, payee)
    audit_record(deployment, todo)


def audit_record(deployment: Deployment, todo: Iterable[Errand]) -> None:
    """The record agrees with itself, and the files with the record."""
    with deployment.opened() as store:
        _signed_once(store, deployment.signer, {one.id for one in todo})
        _told_in_order(store)
        _files(store, Blobs(deployment.data / "blobs"))


def _signed_once(store: Store, signer: str, ended: set[str]) -> None:
    with store.database.read() as session:
        tasks = {row.id: row for row in session.scalars(select(TaskRow))}
        attested = session.scalars(select(AttestationRow)).all()
        protected = {(row.task, row.uid) for row in session.scalars(select(ProtectionRow))}
        revenue = {row.payee: int(row.amount) for row in session.scalars(select(RevenueRow))}
    assert [task for task in ended if tasks[task].stage not in FINAL] == []
    assert protected == {(row.task, row.uid) for row in attested}
    assert len(protected) == len(attested) == sum(row.stage in ("attested", "expired") for row in tasks.values())
    said = [SignedAttestation.from_json(row.document) for row in attested]
    for one in said:
        attestation.verify(one, signer)
    assert len({(one.attestation.task_id, one.attestation.nonce) for one in said}) == len(said)
    assert {one.attestation.task_id.hex() for one in said if one.attestation.verdict == EXPIRED} == {
        row.id for row in tasks.values() if row.stage == "expired"
    }
    earned = Counter[str]()
    for one in said:
        earned[one.attestation.payee] += one.attestation.amount
    assert revenue == {payee: amount for payee, amount in earned.items() if amount}


def _told_in_order(store: Store) -> None:
    """Each task's events are one way through the table of stages, up to where it stands."""
    ways: dict[str, list[str]] = {}
    with store.database.read() as session:
        for event in session.scalars(select(EventRow).order_by(EventRow.id)):
            ways.setdefault(event.task, []).append(event.stage)
        stages = {row.id: row.stage for row in session.scalars(select(TaskRow))}
    assert ways.keys() == stages.keys()
    steps = {(source, way.target) for way in TRANSITIONS.values() for source in way.sources}
    for task, way in ways.items():
        assert way[0] == "posted"
        assert all(step in steps for step in pairwise(way)), f"task {task}: {way}"
        assert way[-1] == stages[task]


def _files(store: Store, blobs: Blobs) -> None:
    """After a collection there is each file that the record names, whole, and no other."""
    now = time.time() + 1
    blobs.clear(now)
    collect(store, blobs, now)
    with store.database.read() as session:
        named = {*session.scalars(select(TaskRow.inputs)), *session.scalars(select(ProofRow.blob))}
        named |= set(session.scalars(select(ModelRow.blob)))
    kept = {path.name for path in blobs.root.rglob("*") if path.is_file()}
    assert kept == named
    for address in named:
        blobs.check(address)
