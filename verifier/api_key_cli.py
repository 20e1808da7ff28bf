"""Commands on API keys: assay key api create, list, revoke."""

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from verifier import tenants
from verifier.database import Database
from verifier.settings import Settings

cli = typer.Typer(help="API keys: who may call, for which tenant, and what for.", no_args_is_help=True)
out = Console()

DAY = 86_400.0
Data = Annotated[Path | None, typer.Option(help="Where the record is kept; also ASSAY_DATA.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@cli.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose tasks it may see.")],
    name: Annotated[str, typer.Option(help="What it is for.")],
    scope: Annotated[list[str], typer.Option(help=f"One or more of {', '.join(tenants.SCOPES)}.")],
    expires_days: Annotated[float | None, typer.Option(help="Never, if left out.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Make a key. It is printed once, and cannot be shown again."""
    now = time.time()
    expires = None if expires_days is None else now + expires_days * DAY
    row, token = tenants.create(_database(data), tenant, name, scope, now, expires)
    if as_json:
        out.print_json(data={"id": row.id, "tenant": tenant, "scopes": row.scopes, "api_key": token})
    else:
        typer.echo(token)


@cli.command("list")
def list_(data: Data = None, as_json: Json = False) -> None:
    """All keys, without their secrets."""
    rows = tenants.listed(_database(data))
    names = ("id", "tenant", "name", "scopes", "created", "expires", "revoked")
    if as_json:
        out.print_json(data=[{name: getattr(row, name) for name in names} for row in rows])
        return
    table = Table(*names)
    for row in rows:
        times = (_day(at) for at in (row.created, row.expires, row.revoked))
        table.add_row(row.id, row.tenant, row.name, " ".join(row.scopes), *times)
    out.print(table)


@cli.command()
def revoke(key: Annotated[str, typer.Argument(metavar="ID")], data: Data = None) -> None:
    """End a key; services that have just seen it believe it for a minute more."""
    tenants.revoke(_database(data), key, time.time())


def _database(data: Path | None) -> Database:
    database = Database(Settings.from_env(os.environ, data).database)
    database.check()
    return database


def _day(at: float | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
