"""Commands on keys: the secret ones that stand for weights; API keys and the attester's have rooms of their own."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gpu import keys as arrays
from gpu.plan import Model
from verifier import api_key_cli, attester_cli, key_file, keys

cli = typer.Typer()
key_cli = typer.Typer(help="Secret keys, with which a proof is checked without the weights.", no_args_is_help=True)
cli.add_typer(key_cli, name="key")
key_cli.add_typer(api_key_cli.cli, name="api")
key_cli.add_typer(attester_cli.cli, name="attester")

ModelFile = Annotated[Path, typer.Argument(metavar="MODEL.onnx", exists=True, dir_okay=False)]
KeyFile = Annotated[Path, typer.Argument(metavar="KEY.safetensors", exists=True, dir_okay=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
EPOCH_SECONDS = 30 * 24 * 3600
out = Console()
err = Console(stderr=True)


@key_cli.command("make")
def make(
    model: ModelFile,
    epoch: Annotated[str, typer.Option(help="What to call the time that the key is for.")],
    to: Annotated[Path, typer.Option("--out", metavar="KEY.safetensors", help="A new file, kept secret.")],
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The day, in UTC, it ends; after 30 if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read every weight once and keep what a verifier needs of it. Exit 2 for a model that no key can stand for."""
    end = int(until.replace(tzinfo=UTC).timestamp()) if until else int(time.time()) + EPOCH_SECONDS
    with err.status("opening the model"):
        opened = Model.open(model)
    with _progress(opened) as step:
        keys.create(to, opened, key_file.Terms(epoch, end), progress=step)
    _say(to, as_json)


@key_cli.command("show")
def show(key: KeyFile, as_json: Json = False) -> None:
    """What a key is for and how often it was used; nothing of what it holds."""
    _say(key, as_json)


@key_cli.command("reveal")
def reveal(
    key: KeyFile, to: Annotated[Path, typer.Option("--out", metavar="REVEAL.safetensors")], as_json: Json = False
) -> None:
    """Retire a key for good and write its seed, from which anybody with the model can repeat its verdicts."""
    keys.reveal(key, to)
    _say(key, as_json)


@key_cli.command("rebuild")
def rebuild(
    model: ModelFile,
    revealed: Annotated[Path, typer.Argument(metavar="REVEAL.safetensors", exists=True, dir_okay=False)],
    to: Annotated[Path, typer.Option("--out", metavar="KEY.safetensors")],
    as_json: Json = False,
) -> None:
    """Make a revealed key again: for verdicts that were given before, as any later proof may know it."""
    with err.status("opening the model"):
        opened = Model.open(model)
    with _progress(opened) as step:
        keys.rebuild(to, opened, revealed, step)
    _say(to, as_json)


@contextmanager
def _progress(model: Model) -> Iterator[arrays.Progress]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=len(set(arrays.roles(model).values())))

        def step(name: str) -> None:
            bar.update(task, advance=1, description=name)

        yield step


def _say(path: Path, as_json: bool) -> None:
    held = key_file.read(path)
    state = None if held.terms.public else keys.state_of(path, held.key)
    report = {
        "key": held.key.id.hex(),
        "model": held.key.model.id.hex(),
        "epoch": held.terms.epoch,
        "until": held.terms.until,
        "matrices": len(held.key.parts),
        "bytes": path.stat().st_size,
        "public": held.terms.public,
        "verdicts": state and state.used,
        "verdicts_at_most": held.terms.checks,
        "retired": state and state.retired,
    }
    if as_json:
        out.print_json(data=report)
        return
    for name, value in report.items():
        out.print(f"{name}: {value}", markup=False, highlight=False)
