"""The demo: one service, one honest worker, and cheats of every kind, over HTTP. Nobody but the honest one is paid."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import import_module
from inspect import getdoc
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from gpu.plan import Model
from proof import attestation as signing
from proof import bundle
from proof.attestation import sign_commitment
from proof.errors import Conflict, Malformed, Unavailable
from proof.messages import Challenge, Reward
from prover import cheats, prove, sentences
from prover.client import Client, terms
from prover.engines.onnxruntime import Recorder, plain
from prover.sidecar import Engine, serve

START = 60.0  # seconds for the service to come up
STOP = 20.0
DEADLINE = 3600  # seconds a task stays open
POLICY = "standard"
REWARD = Reward(chain_id=31337, contract="0x" + "c0" * 20, token="0x" + "70" * 20, amount=250_000)
PAYER = "0x" + "9a" * 20

Array = npt.NDArray[Any]

TEXTS = (
    "The bridge over the river was closed after the flood had damaged two of its piers.",
    "After days of heavy rain the crossing was shut to traffic, and engineers examined its foundations.",
    "She has played the violin in a small chamber orchestra since she was a student.",
    "The string quartet rehearses every Tuesday evening in the old town hall.",
    "The central bank raised its interest rate by a quarter of a point to slow inflation.",
    "Borrowing became more expensive as policy makers tried to bring prices under control.",
    "Honey bees tell each other where to find flowers by dancing on the comb.",
    "A kernel was compiled for the accelerator, and the product took a tenth of the time.",
)


MODULES = ("random", "statistics", "argparse", "threading")
LENGTH = 512  # tokens of each document


def documents() -> tuple[str, ...]:
    """Real English at length: the documentation of Python's own modules."""
    modules = [import_module(name) for name in MODULES]
    members = [[m] + [getattr(m, n) for n in getattr(m, "__all__", dir(m))] for m in modules]
    return tuple(" ".join(str(getdoc(member) or "") for member in found) for found in members)


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


@dataclass
class Stage:
    """What all workers share: the service, the model, the task's inputs, and where bundles go."""

    client: Client
    source: bytes
    model: Model
    inputs: dict[str, Array]
    folder: Path

    @cached_property
    def run_seconds(self) -> float:
        """The model as it stands, nothing recorded, once it is warm."""
        model = plain(self.source)
        model(self.inputs)
        started = time.perf_counter()
        model(self.inputs)
        return time.perf_counter() - started

    def row(self, worker: str, did: str) -> Row:
        return Row(worker, did, "accepted", None, None, self.run_seconds)

    def post(self, inputs: dict[str, Array] | None = None) -> bytes:
        """A protocol posts a new task."""
        wanted = terms(self.model.id, POLICY, REWARD, PAYER, int(time.time()) + DEADLINE, secrets.token_bytes(32))
        return self.client.post(wanted, inputs or self.inputs)

    @cached_property
    def honest(self) -> Engine:
        return self.engine(self.source)

    def engine(self, source: bytes) -> Engine:
        """ONNX Runtime over the honest graph, or over another one that gives the same names."""
        plan = self.model.plan({name: array.shape for name, array in self.inputs.items()})
        return Recorder(source, self.model, plan).run

    def answer(self, task: bytes, key: bytes, seed: bytes | None = None) -> tuple[prove.Committed, Any]:
        """Honest work up to the proof; with `seed`, under a challenge that the worker made up."""
        asked = self.client.task(task)
        committed = prove.commit(self.model, self.honest(self.inputs), asked)
        signed = sign_commitment(committed.commitment, REWARD, key)
        challenge = self.client.commit(task, signed)
        if seed is not None:
            challenge = Challenge(challenge.commitment, challenge.policy, seed)
        return committed, prove.answer(committed, signed, challenge, asked)


Attempt = Callable[[Stage, bytes], Row]


def computing(worker: str, did: str, engine: Callable[[Stage], Engine]) -> Attempt:
    """A worker that goes through the protocol with whatever trace its engine gives."""

    def attempt(stage: Stage, key: bytes) -> Row:
        task = stage.post()
        served = serve(stage.client, task, stage.model, engine(stage), key)
        return _judged(stage, task, replace(stage.row(worker, did), proof_bytes=served.proof_bytes))

    return attempt


def _judged(stage: Stage, task: bytes, row: Row) -> Row:
    verdict = stage.client.verdict(task)
    stage.client.attestation(task)
    stage.client.bundle(task, stage.folder / f"{row.worker}.safetensors")
    return replace(
        row,
        verdict=verdict.verdict,
        reason=str(verdict.reason) if verdict.reason else None,
        node=verdict.node,
        check_seconds=stage.client.check_seconds(task),
    )


def _bending(name: str, bend: Callable[[Array], Array]) -> Callable[[Stage], Engine]:
    def engine(stage: Stage) -> Engine:
        return lambda inputs: cheats.bent(dict(stage.honest(inputs)), name, bend)

    return engine


def _running(rewrite: Callable[[bytes], bytes]) -> Callable[[Stage], Engine]:
    return lambda stage: stage.engine(rewrite(stage.source))


def _without_a_layer(source: bytes) -> bytes:
    return cheats.skipped(source, "layer_norm_4", "layer_norm_6")


def _nudged(array: Array) -> Array:
    return array + np.float32(0.01)


def _stale(stage: Stage) -> Engine:
    """Yesterday's run on other words, with today's words put in front of it."""
    other = dict(stage.inputs) | {"input_ids": np.roll(stage.inputs["input_ids"], 1, axis=0)}
    return lambda inputs: dict(stage.honest(other)) | dict(inputs)


def _replay(stage: Stage, key: bytes) -> Row:
    row = stage.row("replayer", "uploads the proof of an earlier task")
    earlier, task = stage.post(), stage.post()
    _, old = stage.answer(earlier, key)
    committed, _ = stage.answer(task, key)
    return _uploaded(stage, task, key, old, committed, row)


def _other_rows(stage: Stage, key: bytes) -> Row:
    row = stage.row("chooser", "opens rows of its own choice")
    task = stage.post()
    committed, proof = stage.answer(task, key, seed=bytes(32))
    return _uploaded(stage, task, key, proof, committed, row)


def _uploaded(stage: Stage, task: bytes, key: bytes, proof: Any, committed: prove.Committed, row: Row) -> Row:
    path = stage.folder / "upload.safetensors"
    bundle.write_proof(path, proof)
    stage.client.upload(task, path, committed.commitment.digest(), REWARD, key)
    size = path.stat().st_size
    path.unlink()
    return _judged(stage, task, replace(row, proof_bytes=size))


def _second_commitment(stage: Stage, key: bytes) -> Row:
    row = stage.row("gambler", "commits again after it has seen the challenge")
    task = stage.post()
    stage.answer(task, key)
    lie = cheats.bent(dict(stage.honest(stage.inputs)), "linear_15", np.zeros_like)
    again = prove.commit(stage.model, lie, stage.client.task(task)).commitment
    try:
        stage.client.commit(task, sign_commitment(again, REWARD, key))
    except Conflict as failure:
        return replace(row, verdict="refused", reason=str(failure).partition(":")[0])
    return row


def _thief(stage: Stage, key: bytes) -> Row:
    row = stage.row("thief", "uploads a proof for the commitment of another")
    task = stage.post()
    committed, proof = stage.answer(task, key)
    path = stage.folder / "upload.safetensors"
    bundle.write_proof(path, proof)
    try:
        stage.client.upload(task, path, committed.commitment.digest(), REWARD, secrets.token_bytes(32))
    except Malformed as failure:
        return replace(row, verdict="refused", reason=str(failure).partition(":")[0])
    finally:
        path.unlink()
    return row


HONEST = computing("honest", "runs the model on 8 sentences", lambda stage: stage.honest)
READER = computing("reader", f"runs it on {len(MODULES)} documents of {LENGTH} tokens", lambda stage: stage.honest)
CHEATS: tuple[Attempt, ...] = (
    computing("miser", "runs the weights in 4 bits", _running(lambda s: cheats.quantised(s, 4))),
    computing("impostor", "runs another model of the same shape", _running(cheats.impostor)),
    computing("skipper", "skips one of six layers", _running(_without_a_layer)),
    computing("daydreamer", "attends to every word alike", _running(cheats.inattentive)),
    computing("forger", "changes the output after the run", _bending("last_hidden_state", _nudged)),
    computing("shuffler", "swaps the rows of one product", _bending("linear_15", cheats.swapped)),
    computing("inventor", "puts noise of the right size for one node", _bending("gelu_2", cheats.noise)),
    computing("idler", "returns zeros for one product", _bending("linear_20", np.zeros_like)),
    computing("sleeper", "returns an earlier run on other words", _stale),
    _replay,
    _other_rows,
    _second_commitment,
    _thief,
)


def run(folder: Path, console: Console) -> dict[str, Any]:
    """Run the demo in `folder`; returns what happened as JSON, `ok` true iff the honest one alone was paid."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = sentences.model_path()
    with console.status("starting the service") as status, _service(folder / "service") as url, Client(url) as client:
        status.update("registering all-MiniLM-L6-v2")
        client.register(path)
        stage = Stage(client, path.read_bytes(), Model.open(path), sentences.tokenised(TEXTS), folder)
        status.update("honest workers at work")
        honest = [HONEST(stage, secrets.token_bytes(32))]
        long = replace(stage, inputs=sentences.tokenised(documents(), LENGTH))
        honest.append(READER(long, secrets.token_bytes(32)))
        paid = [_paid(stage, row.worker) for row in honest if row.verdict == "accepted"]
        closest = _closest(stage) if honest[0].verdict == "accepted" else []
        cheating = []
        for i, cheat in enumerate(CHEATS):
            status.update(f"cheat {i + 1} of {len(CHEATS)} at work")
            cheating.append(cheat(stage, secrets.token_bytes(32)))
    refused = [row for row in cheating if row.verdict != "accepted" and row.reason]
    return {
        "ok": len(paid) == len(honest) and len(refused) == len(CHEATS),
        "paid": paid,
        "closest": closest,
        "honest": [asdict(row) | {"ratio": row.ratio} for row in honest],
        "cheats": [asdict(row) | {"ratio": row.ratio} for row in cheating],
        "bundles": str(folder),
        "model": str(path),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The table, the sentences, and how to look at what was left behind."""
    table = Table(title="who was paid")
    for column in ("worker", "what it did", "verdict", "reason", "proof", "run", "check", "ratio"):
        table.add_column(column, overflow="fold")
    for row in [*result["honest"], *result["cheats"]]:
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
    for pair in result["closest"]:
        console.print(f"closest ({pair['cosine']:.2f}): {pair['first']!r} and {pair['second']!r}", highlight=False)
    for paid in result["paid"]:
        told = f"{paid['amount']} units to {paid['payee']} ({paid['worker']}), signed by {paid['signer']}"
        console.print(f"attestation {paid['uid']}: {told}", highlight=False)
    bundles = result["bundles"]
    console.print(f"\nevery task left a bundle in {bundles}/. Check one yourself:", highlight=False)
    console.print(f"  assay verify {result['model']} {bundles}/honest.safetensors", soft_wrap=True, highlight=False)


def _paid(stage: Stage, worker: str) -> dict[str, str]:
    """An honest worker's attestation, verified against the signer that the service names."""
    found = bundle.read_bundle(stage.folder / f"{worker}.safetensors")
    if found.attestation is None:
        raise Malformed("the bundle of an accepted task holds no attestation")
    signed = signing.SignedAttestation.from_json(found.attestation)
    signing.verify(signed, stage.client.signer())
    return {
        "worker": worker,
        "uid": "0x" + signed.attestation.digest().hex(),
        "payee": signed.attestation.payee,
        "amount": str(signed.attestation.amount),
        "signer": signed.signer,
    }


def _closest(stage: Stage) -> list[dict[str, Any]]:
    """The three pairs of sentences whose proven embeddings are closest."""
    found = bundle.read_bundle(stage.folder / "honest.safetensors")
    name = stage.model.graph.outputs[0]
    claim = next(c for c in found.proof.commitment.tensors if c.name == name)
    hidden = found.proof.openings[name].rows.reshape(claim.shape)
    vectors = sentences.embeddings(hidden, stage.inputs["attention_mask"])
    cosines = vectors @ vectors.T
    pairs = sorted(((cosines[i, j], i, j) for i in range(len(TEXTS)) for j in range(i)), reverse=True)
    return [{"cosine": float(c), "first": TEXTS[j], "second": TEXTS[i]} for c, i, j in pairs[:3]]


@contextmanager
def _service(data: Path) -> Iterator[str]:
    """`assay serve` on a free loopback port, stopped on the way out."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data.mkdir(parents=True)
    with (data / "log").open("wb") as log:
        command = [sys.executable, "-m", "assay", "serve", "--data", str(data), "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=os.environ.copy())
        try:
            _await(process, f"http://127.0.0.1:{port}", data / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP)
            except subprocess.TimeoutExpired:
                process.kill()


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
