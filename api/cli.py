"""assay serve: the API, and on the embedded default Valkey and worker processes beside it, all stopped together."""

import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event, Thread
from types import FrameType
from typing import Annotated

import typer
import uvicorn

from api.app import create_app
from api.door import Door
from api.slow import PatientProtocol
from proof.errors import Malformed
from verifier import logs
from verifier.blobs import Blobs
from verifier.children import Child
from verifier.database import Database
from verifier.inspector import Inspector
from verifier.library import Library
from verifier.queue import TaskQueue
from verifier.release import signer_from
from verifier.settings import Settings
from verifier.store import Store
from verifier.sweeping import Sweeper
from verifier.valkey import EmbeddedValkey

cli = typer.Typer()

WATCH_SECONDS = 0.5
GRACE_SECONDS = 10  # that requests at hand get when the service stops
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")

log = logging.getLogger(__name__)


@cli.command()
def serve(
    data: Annotated[Path | None, typer.Option(help="Where the record is kept; also ASSAY_DATA.")] = None,
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8420,
    host: Annotated[str, typer.Option(help="Loopback unless a proxy with TLS stands in front.")] = "127.0.0.1",
    workers: Annotated[int, typer.Option(min=0, help="Judging processes beside the API.")] = 1,
) -> None:
    """Serve the API. Prints `ready http://HOST:PORT signer ADDRESS` once it answers; stops on SIGINT or SIGTERM."""
    os.umask(0o077)
    signal.signal(signal.SIGTERM, _leave)
    settings = Settings.from_env(os.environ, data)
    logs.configure(settings.log, "serve")
    with ExitStack() as running:
        listener = running.enter_context(_listen(host, port))
        address = f"http://{host}:{listener.getsockname()[1]}"
        settings = replace(settings, origins=settings.origins or _origins(address))
        door, children = _start(settings, workers, running)
        running.enter_context(_Watch(children))
        running.enter_context(Sweeper(door.store, door.blobs, door.queue, door.clock, settings.orphan))
        config = uvicorn.Config(
            create_app(door),
            http=partial(PatientProtocol, head_seconds=settings.head),  # type: ignore[arg-type]
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(settings.proxies),
            forwarded_allow_ips=list(settings.proxies) or None,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        server = _Server(config, door, lambda: typer.echo(f"ready {address} signer {door.signer}"))
        try:
            server.run([listener])
        except KeyboardInterrupt:
            logs.say(log, "stopped")


@cli.command()
def openapi() -> None:
    """Print the OpenAPI document of this version."""
    typer.echo(json.dumps(create_app(None).openapi(), indent=1, sort_keys=True))


def _start(settings: Settings, workers: int, running: ExitStack) -> tuple[Door, list[Child]]:
    """Record, key, queue, other processes; each is stopped when `running` closes, in reverse."""
    database, blobs = Database(settings.database), Blobs(settings.data / "blobs")
    running.callback(database.close)
    database.check()
    signer = signer_from(settings)
    children, embedded = [], settings.redis is None
    if embedded:
        valkey = EmbeddedValkey(os.environ)
        running.callback(valkey.stop)
        valkey.start()
        children.append(valkey.child)
        settings = replace(settings, redis=valkey.url)
    environ = {**THREADS, **os.environ, "ASSAY_REDIS_URL": settings.redis or "", "ASSAY_DATA": str(settings.data)}
    roles: list[list[str]] = [[]] * workers + [["--deliveries"]] * (embedded and workers > 0)
    for role in roles:
        child = Child("assay", ["work", "--with-parent", *role], environ)
        running.callback(child.stop)
        child.ensure()
        children.append(child)
    queue, inspector = TaskQueue(settings.redis or ""), Inspector(settings.data / "blobs")
    running.callback(queue.close)
    running.callback(inspector.close)
    store = Store(database)
    library = Library(store, blobs)
    return Door(settings, store, blobs, library, queue, inspector, signer.address, time.time), children


def _origins(address: str) -> tuple[str, ...]:
    """What callers on this machine dial."""
    return tuple(dict.fromkeys((address, address.replace("127.0.0.1", "localhost"))))


def _listen(host: str, port: int) -> socket.socket:
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio does it for sockets of its own only
        return listener
    except OSError as error:
        raise Malformed(f"cannot listen on {host}:{port}: {error.strerror}") from error


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, door: Door, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._door, self._ready = door, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._door.listening.end()  # streams end first, or uvicorn would wait for them
        await super().shutdown(sockets)


class _Watch(Thread):
    """Keeps the children running."""

    def __init__(self, children: Sequence[Child]) -> None:
        super().__init__(daemon=True)
        self._children, self._done = children, Event()

    def run(self) -> None:
        while not self._done.wait(WATCH_SECONDS):
            for child in self._children:
                if child.ensure():
                    logs.say(log, "child.restarted", logging.WARNING, pid=child.pid)

    def __enter__(self) -> "_Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()


if __name__ == "__main__":
    cli()
