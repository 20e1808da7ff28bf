"""assay protection export and import: what was signed moves with the key; assay equivocation compares statements."""

import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from proof import bundle
from proof.attestation import SignedAttestation
from proof.encoding import parse
from proof.equivocation import equivocation
from proof.errors import Malformed
from proof.messages import MAX_MESSAGE_BYTES
from verifier import protection
from verifier.database import Database
from verifier.settings import Settings

cli = typer.Typer()
protection_cli = typer.Typer(help="What was signed, to take along when the key moves.", no_args_is_help=True)
cli.add_typer(protection_cli, name="protection")
out = Console()

EQUIVOCATION = 1
Data = Annotated[Path | None, typer.Option(help="Where the record is kept; also ASSAY_DATA.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@protection_cli.command("export")
def export(
    to: Annotated[Path | None, typer.Argument(metavar="FILE", help="Standard output, if left out.")] = None,
    data: Data = None,
) -> None:
    """Write the protection table. Stop the service first: what is signed afterwards is not in the file."""
    with closing(_database(data)) as database:
        if to is None:
            protection.export(database, sys.stdout.buffer)
            return
        try:
            with to.open("xb") as file:
                written = protection.export(database, file)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            raise Malformed(f"{to} exists: it is not overwritten") from None
    out.print(f"{written} rows in {to}", highlight=False, soft_wrap=True)


@protection_cli.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False)],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Take over a protection table: all of it, or nothing when a row contradicts the record (exit 2)."""
    with closing(_database(data)) as database, file.open("rb") as content:
        new = protection.import_(database, content)
    if as_json:
        out.print_json(data={"new": new})
    else:
        out.print(f"{new} rows are new", highlight=False)


@cli.command("equivocation")
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", exists=True, dir_okay=False)],
    second: Annotated[Path, typer.Argument(metavar="B", exists=True, dir_okay=False)],
    as_json: Json = False,
) -> None:
    """Compare two attestations (JSON, or audit bundles). Exit 1, with the evidence, when a signer contradicts itself;
    0 when both say the same; 2 when they are not about one task by one signer."""
    found = equivocation(_attestation(first), _attestation(second))
    if found is None:
        out.print_json(data={"equivocation": False}) if as_json else out.print("both say the same")
        return
    if as_json:
        out.print_json(data={"equivocation": True} | found.to_json())
    else:
        told = found.to_json()
        out.print(f"{told['signer']} has signed two statements on task {told['task']}:", highlight=False)
        for one in (found.first, found.second):
            said = one.attestation
            out.print(f"  {said.digest().hex()} verdict {said.verdict} amount {said.amount}", highlight=False)
    raise typer.Exit(EQUIVOCATION)


def _attestation(path: Path) -> SignedAttestation:
    """From JSON as the service answers it, or from a bundle, where the size of the header comes first."""
    with path.open("rb") as file:
        content = file.read(MAX_MESSAGE_BYTES + 1)
    bundled = b"\0" in content[:8]
    held = bundle.read_bundle(path).attestation if bundled else parse(content, str(path), MAX_MESSAGE_BYTES)
    if held is None:
        raise Malformed(f"{path}: a bundle without an attestation")
    return SignedAttestation.from_json(held, str(path))


def _database(data: Path | None) -> Database:
    database = Database(Settings.from_env(os.environ, data).database)
    database.check()
    return database
