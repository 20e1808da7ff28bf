"""assay serve: the API, and on the embedded default Valkey and a worker process beside it, all stopped together."""

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from types import FrameType
from typing import Annotated

import typer
import uvicorn

from api.app import create_app
from api.door import Door
from proof.errors import Malformed, Unavailable
from verifier.blobs import Blobs
from verifier.children import Child
from verifier.library import Library
from verifier.queue import TaskQueue, sweep
from verifier.release import Signer
from verifier.settings import Settings
from verifier.store import Store
from verifier.valkey import EmbeddedValkey

cli = typer.Typer()

SWEEP_SECONDS = 1.0
PARTIAL_SECONDS = 86_400.0  # an upload that was last written to so long ago is dead
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")

log = logging.getLogger(__name__)


@cli.command()
def serve(
    data: Annotated[Path | None, typer.Option(help="Where the record is kept; also ASSAY_DATA.")] = None,
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8420,
    host: Annotated[str, typer.Option(help="Loopback unless a proxy with TLS stands in front.")] = "127.0.0.1",
    workers: Annotated[int, typer.Option(min=0, help="Worker processes beside the API.")] = 1,
) -> None:
    """Serve the API. Prints `ready http://HOST:PORT signer ADDRESS` once it answers; stops on SIGINT or SIGTERM."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    os.umask(0o077)
    signal.signal(signal.SIGTERM, _leave)
    settings = Settings.from_env(os.environ, data)
    with ExitStack() as running:
        listener = running.enter_context(_listen(host, port))
        door, children = _start(settings, workers, running)
        running.enter_context(_Watch(door, children))
        address = f"http://{host}:{listener.getsockname()[1]}"
        server = _Server(
            uvicorn.Config(create_app(door), log_level="warning", timeout_graceful_shutdown=10),
            lambda: typer.echo(f"ready {address} signer {door.signer}"),
        )
        try:
            server.run([listener])
        except KeyboardInterrupt:
            log.info("stopped")


def _start(settings: Settings, workers: int, running: ExitStack) -> tuple[Door, list[Child]]:
    """Record, key, queue, worker processes; each is stopped when `running` closes, in reverse."""
    blobs, store = Blobs(settings.data / "blobs"), Store(settings.database)
    running.callback(store.close)
    store.create()
    blobs.clear(time.time() - PARTIAL_SECONDS)
    signer = Signer.open(settings.key) if settings.key else Signer.create(settings.default_key)
    children = []
    if settings.redis is None:
        valkey = EmbeddedValkey(os.environ)
        running.callback(valkey.stop)
        valkey.start()
        children.append(valkey.child)
        settings = replace(settings, redis=valkey.url)
    environ = {**THREADS, **os.environ, "ASSAY_REDIS_URL": settings.redis or "", "ASSAY_DATA": str(settings.data)}
    for _ in range(workers):
        child = Child("verifier.cli", ["--with-parent"], environ)
        running.callback(child.stop)
        child.ensure()
        children.append(child)
    queue = TaskQueue(settings.redis or "")
    running.callback(queue.close)
    return Door(store, blobs, Library(store, blobs), queue, signer.address, time.time), children


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise Malformed(f"cannot listen on {host}:{port}: {error.strerror}") from error


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


class _Watch(Thread):
    """Keeps the children running and the record swept."""

    def __init__(self, door: Door, children: Sequence[Child]) -> None:
        super().__init__(daemon=True)
        self._door, self._children, self._done = door, children, Event()

    def run(self) -> None:
        while not self._done.wait(SWEEP_SECONDS):
            for child in self._children:
                child.ensure()
            try:
                sweep(self._door.store, self._door.queue, self._door.clock())
            except Unavailable as failure:
                log.warning("not swept: %s", failure)

    def __enter__(self) -> "_Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()


if __name__ == "__main__":
    cli()
