"""The command work: the process that judges tasks."""

import logging
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from gpu.clearing.stand import shelf_of
from gpu.device import select
from proof.errors import Malformed
from verifier.blobs import Blobs
from verifier.children import end_with_parent
from verifier.jobs import Bench
from verifier.library import Library
from verifier.queue import JUDGE
from verifier.queue import work as run_jobs
from verifier.release import Signer
from verifier.settings import Settings
from verifier.store import Store

cli = typer.Typer()

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


@cli.command()
def work(
    data: Annotated[Path | None, typer.Option(help="Where the record is; also ASSAY_DATA.")] = None,
    with_parent: Annotated[bool, typer.Option("--with-parent", hidden=True)] = False,
) -> None:
    """Judge tasks: any number of these processes, on any machine, on one database, Redis and blob directory."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    os.umask(0o077)
    settings = Settings.from_env(os.environ, data)
    if settings.redis is None:
        raise Malformed("ASSAY_REDIS_URL: not set; `assay serve` starts an embedded Valkey and its own worker process")
    store, blobs = Store(settings.database), Blobs(settings.data / "blobs")
    store.create()
    signer = Signer.open(settings.key or settings.default_key)
    shelf = shelf_of(select(settings.device))
    logging.getLogger(__name__).info("checking on %s", shelf.device.name if shelf else "the CPU")
    bench = Bench(store, blobs, Library(store, blobs), signer, settings, time.time, shelf)
    if with_parent:
        end_with_parent()
    run_jobs(settings.redis, {JUDGE: bench.judge})


if __name__ == "__main__":
    cli()
