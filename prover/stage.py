"""A stage for workers: one real service over HTTP, a task for each of them, and a table of who was paid."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from gpu.plan import Model
from proof import attestation as signing
from proof import bundle
from proof.errors import Malformed, Unavailable
from proof.messages import Reward
from prover.client import Client, terms
from prover.prove import Engine
from prover.sidecar import serve

START = 60.0  # seconds for the service to come up
STOP = 20.0
PATIENCE = 120.0  # seconds for a verdict
DEADLINE = 3600  # seconds a task stays open
REWARD = Reward(chain_id=31337, contract="0x" + "c0" * 20, token="0x" + "70" * 20, amount=250_000)
PAYER = "0x" + "9a" * 20

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Row:
    """One worker's line in the table. `run_seconds` is the plain model on the task's inputs; the rest is None where it
    never came that far."""

    worker: str
    did: str
    verdict: str
    reason: str | None
    node: str | None
    run_seconds: float
    proof_bytes: int | None = None
    check_seconds: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.check_seconds / self.run_seconds if self.check_seconds else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}


@dataclass
class Stage:
    """What all workers share: the service, the model, the task, the honest engine, and where bundles go."""

    client: Client
    model: Model
    inputs: Mapping[str, Array]
    policy: str
    folder: Path
    honest: Engine
    run_seconds: float

    def row(self, worker: str, did: str) -> Row:
        return Row(worker, did, "accepted", None, None, self.run_seconds)

    def post(self) -> bytes:
        """A protocol posts a new task."""
        deadline = int(time.time()) + DEADLINE
        wanted = terms(self.model.id, self.policy, REWARD, PAYER, deadline, secrets.token_bytes(32))
        return self.client.ask(wanted, self.inputs)

    def worker(self, key: bytes) -> Client:
        """The service as the worker with this key calls it; to be closed."""
        return Client(self.client.origin, worker=key)

    def judged(self, task: bytes, row: Row) -> Row:
        """The row with the verdict in it; the bundle is kept under the worker's name."""
        verdict = self.client.verdict(task, PATIENCE)
        self.client.attestation(task)
        self.client.bundle(task, self.bundle(row.worker))
        return replace(
            row,
            verdict=verdict.verdict,
            reason=str(verdict.reason) if verdict.reason else None,
            node=verdict.node,
            check_seconds=self.client.state(task).check_seconds,
        )

    def bundle(self, worker: str) -> Path:
        return self.folder / f"{worker}.safetensors"

    def paid(self, worker: str) -> dict[str, str]:
        """An honest worker's attestation, verified against the signer that the service names."""
        found = bundle.read_bundle(self.bundle(worker))
        if found.attestation is None:
            raise Malformed("the bundle of an accepted task holds no attestation")
        signed = signing.SignedAttestation.from_json(found.attestation)
        signing.verify(signed, self.client.signer())
        return {
            "worker": worker,
            "uid": "0x" + signed.attestation.digest().hex(),
            "payee": signed.attestation.payee,
            "amount": str(signed.attestation.amount),
            "signer": signed.signer,
        }

    def output(self, worker: str) -> Array:
        """The first graph output as it was proven."""
        found = bundle.read_bundle(self.bundle(worker))
        name = self.model.graph.outputs[0]
        claim = next(c for c in found.proof.commitment.tensors if c.name == name)
        return found.proof.openings[name].rows.reshape(claim.shape)


Set = TypeVar("Set", bound=Stage)
Attempt = Callable[[Set, bytes], Row]  # a worker at work on a stage with its key


def computing(worker: str, did: str, engine: Callable[[Set], Engine]) -> Attempt[Set]:
    """A worker that goes through the protocol with whatever trace its engine gives."""

    def attempt(stage: Set, key: bytes) -> Row:
        task = stage.post()
        with stage.worker(key) as client:
            served = serve(client, task, stage.model, engine(stage))
        return stage.judged(task, replace(stage.row(worker, did), proof_bytes=served.proof_bytes))

    return attempt


def perform(attempts: Sequence[Attempt[Set]], stage: Set, tell: Callable[[str], None]) -> list[Row]:
    """One cheat after another, each with a key of its own."""
    rows = []
    for i, attempt in enumerate(attempts):
        tell(f"cheat {i + 1} of {len(attempts)} at work")
        rows.append(attempt(stage, secrets.token_bytes(32)))
    return rows


def result(stage: Stage, model: Path, honest: Sequence[Row], cheating: Sequence[Row]) -> dict[str, Any]:
    """What happened as JSON, `ok` true iff the honest alone were paid."""
    paid = [stage.paid(row.worker) for row in honest if row.verdict == "accepted"]
    refused = [row for row in cheating if row.verdict != "accepted" and row.reason]
    return {
        "ok": len(paid) == len(honest) and len(refused) == len(cheating),
        "policy": stage.policy,
        "paid": paid,
        "honest": [row.to_json() for row in honest],
        "cheats": [row.to_json() for row in cheating],
        "bundles": str(stage.folder),
        "model": str(model),
    }


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def show_table(told: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"who was paid, policy {told['policy']}")
    for column in ("worker", "what it did", "verdict", "reason", "proof", "run", "check", "ratio"):
        table.add_column(column, overflow="fold")
    for row in [*told["honest"], *told["cheats"]]:
        colour = "green" if row["verdict"] == "accepted" else "red"
        reason = row["reason"] or ""
        table.add_row(
            row["worker"],
            row["did"],
            f"[{colour}]{row['verdict']}[/]",
            f"{reason} at {row['node']}" if row["node"] else reason,
            f"{row['proof_bytes'] / 1e6:.1f} MB" if row["proof_bytes"] else "",
            f"{row['run_seconds']:.2f} s",
            f"{row['check_seconds']:.2f} s" if row["check_seconds"] else "",
            f"{row['ratio']:.2f}" if row["ratio"] else "",
        )
    console.print(table)


def show_traces(told: Mapping[str, Any], console: Console) -> None:
    """What was signed, and how to look at what was left behind."""
    for paid in told["paid"]:
        signed = f"{paid['amount']} units to {paid['payee']} ({paid['worker']}), signed by {paid['signer']}"
        console.print(f"attestation {paid['uid']}: {signed}", highlight=False)
    bundles = told["bundles"]
    console.print(f"\nevery task left a bundle in {bundles}/. Check one yourself:", highlight=False)
    console.print(f"  assay verify {told['model']} {bundles}/honest.safetensors", soft_wrap=True, highlight=False)


@contextmanager
def service(data: Path) -> Iterator[Client]:
    """`assay serve` on a free loopback port, as a protocol calls it; stopped on the way out."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key = _prepared(data)
    with (data / "log").open("wb") as log:
        command = [sys.executable, "-m", "assay", "serve", "--data", str(data), "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=os.environ.copy())
        try:
            _await(process, f"http://127.0.0.1:{port}", data / "log")
            with Client(f"http://127.0.0.1:{port}", key=key) as client:
                yield client
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP)
            except subprocess.TimeoutExpired:
                process.kill()


def _prepared(data: Path) -> str:
    """The API key of a fresh record."""
    command = [sys.executable, "-m", "assay", "init", "--data", str(data), "--json"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise Unavailable(f"the record cannot be prepared: {done.stderr.decode(errors='replace').strip()}")
    return str(json.loads(done.stdout)["api_key"])


def _await(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise Unavailable(f"the service did not start; its log is {log}")
