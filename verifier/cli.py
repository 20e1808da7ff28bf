"""Commands of the checking side: init, which prepares a record, and work, the process that judges or delivers."""

import logging
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gpu.clearing.stand import shelf_of
from gpu.device import select
from proof.errors import Malformed
from verifier import logs, tenants
from verifier.blobs import Blobs
from verifier.children import end_with_parent
from verifier.database import Database
from verifier.deliveries import Courier
from verifier.jobs import Bench
from verifier.library import Library
from verifier.queue import DELIVER, JUDGE, TaskQueue
from verifier.queue import work as run_jobs
from verifier.release import create, signer_from
from verifier.settings import Settings
from verifier.store import Store
from verifier.sweeping import Sweeper

cli = typer.Typer()
out = Console()

ADMIN = "admin"
log = logging.getLogger(__name__)

Data = Annotated[Path | None, typer.Option(help="Where the record is kept; also ASSAY_DATA.")]


@cli.command()
def init(
    data: Data = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prepare a record: its tables, the attestation key, and an API key that may do everything, shown this once.

    Again it brings the tables to this version, makes whatever is missing, and shows another API key.
    """
    os.umask(0o077)
    settings = Settings.from_env(os.environ, data)
    settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    database = Database(settings.database)
    database.migrate()
    if settings.key is None and settings.signer_url is None:
        create(settings)
    signer = signer_from(settings)
    _, token = tenants.create(database, ADMIN, "init", (ADMIN,), time.time(), None)
    database.close()
    if as_json:
        out.print_json(data={"data": str(settings.data), "signer": signer.address, "api_key": token})
        return
    out.print(f"record      {settings.data}\nsigner      {signer.address}", highlight=False)
    if settings.key is None and settings.signer_url is None:
        out.print(f"key         {settings.default_key}, its password beside it: keep them apart", highlight=False)
    out.print(f"API key     {token}\n\nIt is not shown again. Now: assay serve", highlight=False, soft_wrap=True)


@cli.command()
def work(
    data: Data = None,
    deliveries: Annotated[bool, typer.Option("--deliveries", help="Send webhooks instead of judging.")] = False,
    with_parent: Annotated[bool, typer.Option("--with-parent", hidden=True)] = False,
) -> None:
    """Judge tasks: any number of these processes, on any machine, on one database, Redis and blob directory.

    Stops on SIGTERM once the tasks at hand are done; what it has not begun goes to another process.
    """
    os.umask(0o077)
    settings = Settings.from_env(os.environ, data)
    logs.configure(settings.log, "deliver" if deliveries else "work")
    if settings.redis is None:
        raise Malformed("ASSAY_REDIS_URL: not set; `assay serve` starts an embedded Valkey and its own worker process")
    database, queue = Database(settings.database), TaskQueue(settings.redis)
    database.check()
    store, blobs = Store(database), Blobs(settings.data / "blobs")
    if with_parent:
        end_with_parent()
    with Sweeper(store, blobs, queue, time.time, settings.orphan):
        if deliveries:
            with closing(Courier(database, settings, time.time)) as courier:
                run_jobs(settings.redis, DELIVER, courier.deliver)
        else:
            run_jobs(settings.redis, JUDGE, _bench(settings, store, blobs, queue).judge)


def _bench(settings: Settings, store: Store, blobs: Blobs, queue: TaskQueue) -> Bench:
    shelf = shelf_of(select(settings.device))
    logs.say(log, "worker.started", device=shelf.device.name if shelf else "cpu")

    def again(model: str) -> None:
        queue.put(JUDGE, model)

    library = Library(store, blobs)
    return Bench(store, blobs, library, signer_from(settings), settings, time.time, again, shelf)


if __name__ == "__main__":
    cli()
