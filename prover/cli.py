"""Commands of the proving side: model, run, commit, open, take."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table

from gpu.device import from_env
from gpu.plan import Model
from gpu.plan import report as describe
from gpu.resident import Resident
from proof import bundle
from proof.attestation import read_key, sign_commitment
from proof.digest import canonical
from proof.encoding import octets, parse
from proof.errors import Malformed
from proof.graph import read_graph
from proof.messages import MAX_MESSAGE_BYTES, Challenge, Commitment, Task
from proof.policy import policy
from prover import prove

cli = typer.Typer()
model_cli = typer.Typer(help="Look at a model, or make one of a decoder's folder.", no_args_is_help=True)
cli.add_typer(model_cli, name="model")

ModelFile = Annotated[Path, typer.Argument(metavar="MODEL.onnx", exists=True, dir_okay=False)]
TraceFile = Annotated[Path, typer.Argument(metavar="TRACE.safetensors", exists=True, dir_okay=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Threads = Annotated[int, typer.Option(help="Threads of the engine; 0 leaves the choice to it.")]
Attention = Annotated[str, typer.Option(help="Of a decoder, which Transformers runs: sdpa or eager.")]
out = Console()
err = Console(stderr=True)


@model_cli.command("show")
def show(model: ModelFile, as_json: Json = False) -> None:
    """Id, nodes, ops by family and weights, and whether the model can be verified at every node: exit 1 if not."""
    report = describe(read_graph(model))
    if as_json:
        out.print_json(data=report)
    else:
        _show(report)
    if not report["verifiable"]:
        raise typer.Exit(1)


def _show(report: Mapping[str, Any]) -> None:
    table = Table(title=f"model {report['model']}")
    for column in ("family", "nodes", "ops"):
        table.add_column(column)
    for family, ops in report["ops"].items():
        named = ", ".join(f"{op} {count}" for op, count in sorted(ops.items()))
        table.add_row(family, str(report["families"][family]), named)
    out.print(table)
    weights = report["weights"]
    out.print(f"{report['nodes']} nodes to check, {report['folded']} folded into constants")
    out.print(f"{weights['elements']:,} weights in {weights['tensors']} tensors, {weights['bytes']:,} bytes")
    for entry in report["inputs"]:
        out.print(f"input {entry['name']}: {entry['dtype']} {entry['shape']}")
    out.print(report["refusal"] or "every node can be verified", markup=False, highlight=False)


@model_cli.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", exists=True, file_okay=False)],
    to: Annotated[Path | None, typer.Option("--out", help="In DIR, beside the weights.", metavar="MODEL.onnx")] = None,
    as_json: Json = False,
) -> None:
    """Write the graph of a decoder beside its weights, once it gave what Transformers gives on random tokens."""
    try:
        from prover.decoders import check
    except ModuleNotFoundError as error:
        raise Malformed(f"{error.name} is not installed: pip install 'assay[torch]'") from error
    from prover.decoders import graph

    to = to or folder / "model.onnx"
    if to.resolve().parent != folder.resolve():
        raise Malformed(f"{to} is not in {folder}: a model lies beside its weights")
    with err.status("comparing the graph with Transformers") as status:
        model, apart = check.checked(folder)
        status.update("hashing the weights")
        written = graph.save(model, to)
    told = {"model": written.id.hex(), "file": str(to), "nodes": len(written.nodes)}
    _say(told | {"relative_error": max(apart.values())}, as_json)


@cli.command()
def run(
    model: ModelFile,
    inputs: Annotated[Path, typer.Argument(metavar="INPUTS.safetensors", exists=True, dir_okay=False)],
    trace: Annotated[Path, typer.Option(help="Where the trace goes.", metavar="TRACE.safetensors")],
    threads: Threads = 0,
    attention: Attention = "sdpa",
    as_json: Json = False,
) -> None:
    """Run a model and record every node output: a decoder with Transformers, any other with ONNX Runtime."""
    opened = Model.open(model)
    with err.status("running the model"):
        left = _engine(model, opened, threads, attention).run(bundle.read(inputs).tensors)
        recorded = {name: tensor.numpy() if isinstance(tensor, Resident) else tensor for name, tensor in left.items()}
    bundle.write(trace, recorded.items(), {"model": opened.id.hex()})
    size = sum(array.nbytes for array in recorded.values())
    _say({"trace": str(trace), "tensors": len(recorded), "bytes": size}, as_json)


@cli.command()
def commit(
    model: ModelFile,
    trace: TraceFile,
    to: Annotated[Path, typer.Option("--out", metavar="COMMITMENT.json")],
    task: Annotated[Path | None, typer.Option(help="The task that the run is for.", metavar="TASK.json")] = None,
    key: Annotated[Path | None, typer.Option(help="File with the worker's key; needed with a task.")] = None,
    policy_name: Annotated[
        str, typer.Option("--policy", help="Says what is committed where there is no task.")
    ] = "standard",
    as_json: Json = False,
) -> None:
    """Commit to a trace, honest or not: one Merkle root a tensor and one over all of them."""
    if (task is None) != (key is None):
        raise Malformed("a task and a key go together: the commitment to a task is signed")
    wanted = Task.from_json(read_json(task)) if task else None
    made = _committed(model, trace, wanted, policy_name).commitment
    if wanted and key:
        made = sign_commitment(made, wanted.reward, read_key(key))
    to.write_bytes(canonical(made.to_json()))
    _say({"commitment": made.digest().hex(), "root": made.root().hex(), "tensors": len(made.tensors)}, as_json)


@cli.command("open")
def open_(
    model: ModelFile,
    trace: TraceFile,
    challenge: Annotated[Path, typer.Argument(metavar="CHALLENGE.json", exists=True, dir_okay=False)],
    to: Annotated[Path, typer.Option("--out", metavar="PROOF.safetensors")],
    task: Annotated[Path | None, typer.Option(metavar="TASK.json")] = None,
    commitment: Annotated[
        Path | None, typer.Option(help="The signed commitment, where there is one.", metavar="COMMITMENT.json")
    ] = None,
    as_json: Json = False,
) -> None:
    """Open the rows that a challenge selects, and write the proof."""
    asked = Challenge.from_json(read_json(challenge))
    wanted = Task.from_json(read_json(task)) if task else None
    committed = _committed(model, trace, wanted, asked.policy)
    signed = Commitment.from_json(read_json(commitment)) if commitment else committed.commitment
    if asked.commitment != signed.digest():
        raise Malformed("the challenge is for another commitment: commit to this trace and have it challenged")
    proof = prove.answer(committed, signed, asked, wanted)
    bundle.write_proof(to, proof)
    rows = sum(len(opening.rows) for opening in proof.openings.values())
    _say({"proof": str(to), "rows": rows, "bytes": to.stat().st_size}, as_json)


@cli.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where bundles go; emptied first.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """An honest worker and cheats of every kind against a real service; exit 0 iff the honest one alone is paid."""
    from prover import demo as show_case  # needs the packages of the extra `demo`

    result = show_case.run(folder, err)
    if as_json:
        out.print_json(data=result)
    else:
        show_case.show(result, out)
    if not result["ok"]:
        raise typer.Exit(1)


@cli.command("demo-llm")
def demo_llm(
    folder: Annotated[
        Path, typer.Option("--out", help="Where the model and bundles go; bundles are emptied first.")
    ] = Path("demo-llm"),
    as_json: Json = False,
) -> None:
    """A chat with a decoder, answered by an honest worker and by cheats; exit 0 iff the honest one alone is paid."""
    try:
        from prover import demo_llm as show_case
    except ModuleNotFoundError as error:
        raise Malformed(f"{error.name} is not installed: pip install 'assay[demo,torch,gguf]'") from error

    result = show_case.run(folder, err)
    if as_json:
        out.print_json(data=result)
    else:
        show_case.show(result, out)
    if not result["ok"]:
        raise typer.Exit(1)


@cli.command()
def take(
    model: ModelFile,
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task's id, 64 hex digits.")],
    key: Annotated[Path, typer.Option(help="File with the worker's key, 64 hex digits; its address is paid.")],
    url: Annotated[str, typer.Option(envvar="ASSAY_URL", help="The verification service.")] = "http://127.0.0.1:8420",
    threads: Threads = 0,
    attention: Attention = "sdpa",
    as_json: Json = False,
) -> None:
    """Do one task of a service: fetch its inputs, run, commit, open, upload, and wait for the verdict."""
    from prover.client import Client
    from prover.sidecar import serve

    opened = Model.open(model)
    with Client(url, worker=read_key(key)) as client, err.status("at work"):
        engine = _engine(model, opened, threads, attention)
        served = serve(client, octets(task, "TASK", 32), opened, engine.run)
    verdict = served.verdict
    reason = verdict.reason and str(verdict.reason)
    told: dict[str, object] = {"verdict": verdict.verdict, "reason": reason, "detail": verdict.detail}
    _say(told | engine.kept(), as_json)
    if verdict.verdict != "accepted":
        raise typer.Exit(1)


@dataclass(frozen=True)
class Worker:
    """What runs a model, and after a run on a device what bytes of it were kept there and in pinned host memory."""

    run: Callable[[Mapping[str, npt.NDArray[Any]]], prove.Recorded]
    kept: Callable[[], dict[str, int]] = dict


def _engine(model: Path, opened: Model, threads: int, attention: str) -> Worker:
    """What runs a model: a worker need only have installed what its own models take."""
    device = from_env(os.environ)
    if not opened.answers:
        from prover.engines import onnxruntime

        kept_bytes: dict[str, int] = {}

        def record(inputs: Mapping[str, npt.NDArray[Any]]) -> prove.Recorded:
            trace = onnxruntime.record(model, opened, inputs, threads, device)
            if device:
                kept_bytes["device_bytes"] = sum(t.spec.nbytes for t in trace.values() if isinstance(t, Resident))
            return trace

        return Worker(record, lambda: kept_bytes)
    try:
        from prover.engines import torch
    except ModuleNotFoundError as error:
        raise Malformed(f"{error.name} is not installed: pip install 'assay[torch]'") from error
    recorder = torch.loaded(model.parent, opened, threads, attention, device)

    def kept() -> dict[str, int]:
        return {"device_bytes": recorder.peak.device, "pinned_bytes": recorder.peak.host} if device else {}

    return Worker(recorder.generate, kept)


def _committed(model: Path, trace: Path, task: Task | None, policy_name: str) -> prove.Committed:
    opened = Model.open(model)
    tensors: Mapping[str, npt.NDArray[Any]] = bundle.read(trace).tensors
    with err.status("hashing the trace") as status:
        return prove.commit(
            opened, tensors, task, lambda name: status.update(f"hashed {name}"), rules=policy(policy_name)
        )


def read_json(path: Path) -> object:
    """A JSON file of bounded size. Raises Malformed naming the file."""
    if not path.is_file() or path.stat().st_size > MAX_MESSAGE_BYTES:
        raise Malformed(f"{path} is not a file of at most {MAX_MESSAGE_BYTES} bytes")
    return parse(path.read_bytes(), str(path), MAX_MESSAGE_BYTES)


def _say(values: Mapping[str, object], as_json: bool) -> None:
    if as_json:
        out.print_json(data=dict(values))
        return
    for name, value in values.items():
        shown = f"{value:,}" if isinstance(value, int | np.integer) else value
        out.print(f"{name}: {shown}", highlight=False)
