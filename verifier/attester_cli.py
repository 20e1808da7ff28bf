"""Commands on the key that signs attestations: assay key attester create, show, import."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from proof.attestation import read_key
from verifier import release
from verifier.settings import Settings

cli = typer.Typer(
    help="The key that signs attestations, encrypted at rest; `assay init` makes one.", no_args_is_help=True
)
out = Console()

Data = Annotated[Path | None, typer.Option(help="Where the record is kept; also ASSAY_DATA.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@cli.command()
def show(data: Data = None, as_json: Json = False) -> None:
    """The address that signs here, and its committee as attestations name it."""
    signer = release.signer_from(Settings.from_env(os.environ, data))
    told = {"address": signer.address, "committee": "0x" + release.committee(signer).hex()}
    if as_json:
        out.print_json(data=told)
    else:
        out.print("\n".join(f"{name} {value}" for name, value in told.items()), highlight=False)


@cli.command()
def create(data: Data = None) -> None:
    """Make a fresh key, encrypted under the record's password, as its attestation key; none may be there."""
    os.umask(0o077)
    settings = Settings.from_env(os.environ, data)
    out.print(f"{release.new_key(settings)} in {settings.default_key}", highlight=False, soft_wrap=True)


@cli.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="HEXFILE", exists=True, dir_okay=False)], data: Data = None
) -> None:
    """Encrypt a key of 64 hex digits under the record's password, as its attestation key; none may be there."""
    os.umask(0o077)
    settings = Settings.from_env(os.environ, data)
    address = release.new_key(settings, read_key(file))
    out.print(f"{address} in {settings.default_key}; remove {file}", highlight=False, soft_wrap=True)
