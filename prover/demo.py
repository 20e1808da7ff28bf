"""The demo: one service, one honest worker, and cheats of every kind, over HTTP. Nobody but the honest one is paid."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from inspect import getdoc
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from gpu.plan import Model
from proof import bundle
from proof.attestation import sign_commitment
from proof.errors import Conflict, Malformed
from proof.messages import Challenge
from prover import cheats, prove, sentences
from prover.client import Client
from prover.engines.onnxruntime import Recorder, plain
from prover.prove import Engine
from prover.stage import (
    REWARD,
    Array,
    Attempt,
    Row,
    Stage,
    computing,
    emptied,
    perform,
    result,
    service,
    show_table,
    show_traces,
)

POLICY = "standard"

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


@dataclass
class Texts(Stage):
    """Texts for a sentence encoder, whose ONNX file cheats rewrite."""

    source: bytes

    def engine(self, source: bytes) -> Engine:
        """ONNX Runtime over the honest graph, or over another one that gives the same names."""
        return _engine(source, self.model, self.inputs)

    def answer(self, task: bytes, key: bytes, seed: bytes | None = None) -> tuple[prove.Committed, Any]:
        """Honest work up to the proof; with `seed`, under a challenge that the worker made up."""
        asked = self.client.task(task)
        committed = prove.commit(self.model, self.honest(self.inputs), asked)
        signed = sign_commitment(committed.commitment, REWARD, key)
        with self.worker(key) as client:
            challenge = client.commit(task, signed, REWARD)
        if seed is not None:
            challenge = Challenge(challenge.commitment, challenge.policy, seed)
        return committed, prove.answer(committed, signed, challenge, asked)


def _texts(client: Client, path: Path, folder: Path, inputs: dict[str, Array]) -> Texts:
    source, model = path.read_bytes(), Model.open(path)
    honest = _engine(source, model, inputs)
    return Texts(client, model, inputs, POLICY, folder, honest, _run_seconds(source, inputs), source)


def _engine(source: bytes, model: Model, inputs: Any) -> Engine:
    return Recorder(source, model, model.plan({name: array.shape for name, array in inputs.items()})).run


def _run_seconds(source: bytes, inputs: dict[str, Array]) -> float:
    """The model as it stands, nothing recorded, once it is warm."""
    model = plain(source)
    model(inputs)
    started = time.perf_counter()
    model(inputs)
    return time.perf_counter() - started


def _bending(name: str, bend: Callable[[Array], Array]) -> Callable[[Texts], Engine]:
    def engine(stage: Texts) -> Engine:
        return lambda inputs: cheats.bent(dict(stage.honest(inputs)), name, bend)

    return engine


def _running(rewrite: Callable[[bytes], bytes]) -> Callable[[Texts], Engine]:
    return lambda stage: stage.engine(rewrite(stage.source))


def _without_a_layer(source: bytes) -> bytes:
    return cheats.skipped(source, "layer_norm_4", "layer_norm_6")


def _nudged(array: Array) -> Array:
    return array + np.float32(0.01)


def _stale(stage: Texts) -> Engine:
    """Yesterday's run on other words, with today's words put in front of it."""
    other = dict(stage.inputs) | {"input_ids": np.roll(stage.inputs["input_ids"], 1, axis=0)}
    return lambda inputs: dict(stage.honest(other)) | dict(inputs)


def _replay(stage: Texts, key: bytes) -> Row:
    row = stage.row("replayer", "uploads the proof of an earlier task")
    earlier, task = stage.post(), stage.post()
    _, old = stage.answer(earlier, key)
    stage.answer(task, key)
    return _uploaded(stage, task, key, old, row)


def _other_rows(stage: Texts, key: bytes) -> Row:
    row = stage.row("chooser", "opens rows of its own choice")
    task = stage.post()
    _, proof = stage.answer(task, key, seed=bytes(32))
    return _uploaded(stage, task, key, proof, row)


def _uploaded(stage: Texts, task: bytes, key: bytes, proof: Any, row: Row) -> Row:
    path = stage.folder / "upload.safetensors"
    bundle.write_proof(path, proof)
    with stage.worker(key) as client:
        client.upload(task, path, REWARD)
    size = path.stat().st_size
    path.unlink()
    return stage.judged(task, replace(row, proof_bytes=size))


def _second_commitment(stage: Texts, key: bytes) -> Row:
    row = stage.row("gambler", "commits again after it has seen the challenge")
    task = stage.post()
    stage.answer(task, key)
    lie = cheats.bent(dict(stage.honest(stage.inputs)), "linear_15", np.zeros_like)
    again = prove.commit(stage.model, lie, stage.client.task(task)).commitment
    try:
        with stage.worker(key) as client:
            client.commit(task, sign_commitment(again, REWARD, key), REWARD)
    except Conflict as failure:
        return replace(row, verdict="refused", reason=str(failure).partition(":")[0])
    return row


def _thief(stage: Texts, key: bytes) -> Row:
    row = stage.row("thief", "uploads a proof for the commitment of another")
    task = stage.post()
    _, proof = stage.answer(task, key)
    path = stage.folder / "upload.safetensors"
    bundle.write_proof(path, proof)
    try:
        with stage.worker(secrets.token_bytes(32)) as client:
            client.upload(task, path, REWARD)
    except Malformed as failure:
        return replace(row, verdict="refused", reason=str(failure).partition(":")[0])
    finally:
        path.unlink()
    return row


HONEST: Attempt[Texts] = computing("honest", "runs the model on 8 sentences", lambda stage: stage.honest)
READER: Attempt[Texts] = computing(
    "reader", f"runs it on {len(MODULES)} documents of {LENGTH} tokens", lambda stage: stage.honest
)
CHEATS: tuple[Attempt[Texts], ...] = (
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
    path = sentences.model_path()
    with (
        console.status("starting the service") as status,
        service(emptied(folder) / "service") as client,
    ):
        status.update("registering all-MiniLM-L6-v2")
        client.register(path)
        status.update("honest workers at work")
        stage = _texts(client, path, folder, sentences.tokenised(TEXTS))
        honest = [HONEST(stage, secrets.token_bytes(32))]
        long = _texts(client, path, folder, sentences.tokenised(documents(), LENGTH))
        honest.append(READER(long, secrets.token_bytes(32)))
        closest = _closest(stage) if honest[0].verdict == "accepted" else []
        cheating = perform(CHEATS, stage, status.update)
        return result(stage, path, honest, cheating) | {"closest": closest}


def show(told: dict[str, Any], console: Console) -> None:
    """The table, the sentences, and how to look at what was left behind."""
    show_table(told, console)
    for pair in told["closest"]:
        console.print(f"closest ({pair['cosine']:.2f}): {pair['first']!r} and {pair['second']!r}", highlight=False)
    show_traces(told, console)


def _closest(stage: Texts) -> list[dict[str, Any]]:
    """The three pairs of sentences whose proven embeddings are closest."""
    vectors = sentences.embeddings(stage.output("honest"), stage.inputs["attention_mask"])
    cosines = vectors @ vectors.T
    pairs = sorted(((cosines[i, j], i, j) for i in range(len(TEXTS)) for j in range(i)), reverse=True)
    return [{"cosine": float(c), "first": TEXTS[j], "second": TEXTS[i]} for c, i, j in pairs[:3]]
