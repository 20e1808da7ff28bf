"""What is done again and again, so that nothing depends on a message that was lost. Any number of processes may."""

import logging
import time
from collections.abc import Callable
from threading import Event, Thread

from proof.errors import Unavailable
from verifier import idempotency, webhooks
from verifier.blobs import Blobs
from verifier.logs import say
from verifier.queue import DELIVER, JUDGE, TaskQueue
from verifier.store import Store

SWEEP_SECONDS = 1.0
COLLECT_SECONDS = 600.0
ADDRESSES = 500  # files that are looked up at once

log = logging.getLogger(__name__)


def sweep(store: Store, queue: TaskQueue, now: float) -> None:
    """Let tasks lapse that are late, and ask for what is due: a lost Redis or worker process loses nothing."""
    lapsed = store.lapse(now)
    if lapsed:
        say(log, "tasks.lapsed", count=lapsed)
    for model in store.due(now):
        queue.put(JUDGE, model)
    for delivery in webhooks.due(store.database, now):
        queue.put(DELIVER, delivery)


def collect(store: Store, blobs: Blobs, before: float) -> int:
    """Remove files last written before then that nothing on record points to; how many there were.

    A file is set aside first and looked up again: one that was just uploaded anew, or just recorded, goes back.
    """
    removed = 0
    for addresses in blobs.older(before, ADDRESSES):
        for address in store.unreferenced(addresses):
            with blobs.aside(address, before) as gone:
                if gone and store.unreferenced([address]):
                    gone.unlink(missing_ok=True)
                    removed += 1
    if removed:
        say(log, "blobs.collected", count=removed)
    return removed


class Sweeper(Thread):
    """Sweeps while it is entered."""

    def __init__(self, store: Store, blobs: Blobs, queue: TaskQueue, clock: Callable[[], float], orphan: float) -> None:
        super().__init__(daemon=True)
        self._store, self._blobs, self._queue, self._clock, self._orphan = store, blobs, queue, clock, orphan
        self._done = Event()

    def run(self) -> None:
        collected = time.monotonic() - COLLECT_SECONDS
        while not self._done.wait(SWEEP_SECONDS):
            try:
                now = self._clock()
                sweep(self._store, self._queue, now)
                if time.monotonic() - collected >= min(COLLECT_SECONDS, self._orphan):
                    collected = time.monotonic()
                    idempotency.forget(self._store.database, now)
                    self._blobs.clear(now - self._orphan)
                    collect(self._store, self._blobs, now - self._orphan)
            except Unavailable as failure:
                say(log, "sweep.failed", logging.WARNING, reason=str(failure))

    def __enter__(self) -> "Sweeper":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()
