"""Commands of an auditor, who needs files and nothing else: challenge, verify."""

import os
import secrets
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gpu.clearing.stand import shelf_of
from gpu.device import from_env
from gpu.plan import Model
from proof import bundle
from proof.digest import canonical
from proof.encoding import octets, parse
from proof.errors import Malformed
from proof.messages import MAX_MESSAGE_BYTES, Challenge, Commitment, Verdict
from proof.policy import policy
from verifier import keys
from verifier.verify import verify

cli = typer.Typer()
out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Seed = Annotated[str | None, typer.Option("--seed", metavar="HEX", help="32 bytes; fresh ones when left out.")]


@cli.command()
def challenge(
    commitment: Annotated[Path, typer.Argument(metavar="COMMITMENT.json", exists=True, dir_okay=False)],
    to: Annotated[Path, typer.Option("--out", metavar="CHALLENGE.json")],
    policy_name: Annotated[str, typer.Option("--policy", help="spot, standard or full.")] = "standard",
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Draw the challenge to a commitment: which rows its worker must open."""
    if commitment.stat().st_size > MAX_MESSAGE_BYTES:
        raise Malformed(f"{commitment} is larger than {MAX_MESSAGE_BYTES} bytes")
    bound = Commitment.from_json(parse(commitment.read_bytes(), str(commitment), MAX_MESSAGE_BYTES))
    drawn = Challenge(bound.digest(), policy(policy_name).name, _seed(seed))
    to.write_bytes(canonical(drawn.to_json()))
    if as_json:
        out.print_json(data=drawn.to_json())
    else:
        out.print(f"challenge to {drawn.commitment.hex()}, policy {drawn.policy}", highlight=False)


@cli.command("verify")
def verify_(
    files: Annotated[list[Path], typer.Argument(metavar="[MODEL.onnx] PROOF.safetensors", exists=True, dir_okay=False)],
    key: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A secret key, in place of the model.")
    ] = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Check a proof or a bundle. Exit 0 accepted, 1 rejected, 2 malformed, 3 could not tell, or the key is retired."""
    drawn = _seed(seed)
    if len(files) != (1 if key else 2):
        raise Malformed("verify takes MODEL.onnx and PROOF.safetensors, or --key KEY.safetensors and the proof alone")
    with err.status("opening the model"):
        model = None if key else Model.open(files[0])
    with err.status("checking the proof"):
        given = bundle.read_proof(files[-1])
        if key:
            verdict = keys.judge(key, given, drawn, time.time())
        else:
            assert model is not None
            shelf = shelf_of(from_env(os.environ))
            verdict = verify(given, model, drawn, task=given.task, shelf=shelf)
    if as_json:
        out.print_json(data=verdict.to_json())
    else:
        out.print(_table(verdict))
    if verdict.verdict != "accepted":
        raise typer.Exit(1)


def _seed(value: str | None) -> bytes:
    return secrets.token_bytes(32) if value is None else octets(value, "--seed", 32)


def _table(verdict: Verdict) -> Table:
    table = Table(title=verdict.verdict, show_header=False)
    rows = "every row" if verdict.rows is None else f"{verdict.rows} rows of every tensor"
    table.add_row("nodes checked", f"{verdict.nodes_checked} of {verdict.nodes_total}")
    table.add_row("policy", f"{verdict.policy}: {rows}")
    if verdict.reason:
        table.add_row("reason", str(verdict.reason))
        table.add_row("node", verdict.node or "none")
        table.add_row("detail", verdict.detail)
    for family, entries in verdict.entries.items():
        table.add_row(f"entries checked, {family}", f"{entries:,}")
    for fraction, chance in verdict.misses.items():
        table.add_row(f"misses a cheat on {float(fraction):.0%} of the rows", f"{chance:.2g}")
    table.add_row("task", verdict.task.hex() if verdict.task else "none: inputs are bound by the commitment alone")
    if verdict.keyed:
        table.add_row("key", verdict.keyed.hex())
    table.add_row("check seed", verdict.check_seed.hex())
    return table
