"""What a worker process does with a delivery: post the event to the webhook, signed, again and again until it is taken.

A delivery is leased in the record before it is tried: whoever dies leaves it to another process, and an attempt more is
counted. So an event arrives at least once; `webhook-id` is the same each time.
"""

import json
import logging
import random
import ssl
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from threading import BoundedSemaphore, Lock
from typing import NamedTuple

import httpx
from sqlalchemy import update

from proof import webhook
from proof.errors import Unavailable
from verifier import events, webhooks
from verifier.database import Database
from verifier.destinations import Destinations, Refused, Resolve, resolved
from verifier.dialling import TOTAL_SECONDS, Undelivered, post
from verifier.events import Told
from verifier.logs import say
from verifier.outbox import WAITING
from verifier.settings import Settings
from verifier.tables import DeliveryRow, WebhookRow
from verifier.webhooks import DELIVERED, FAILED

LEASE_SECONDS = 120.0  # longer than any attempt, with the time that a name server takes
PAUSES = (5.0, 30.0, 120.0, 600.0, 3600.0, 5 * 3600.0, 10 * 3600.0, 24 * 3600.0)  # seconds between attempts
MOST_ATTEMPTS = len(PAUSES) + 1
JITTER = 0.2  # a pause is longer by up to this fraction, so that what failed together is not repeated together
THREADS = 16  # deliveries at once in one process
THREADS_EACH = 4  # of them to one webhook: one that is slow must not keep the others waiting

log = logging.getLogger(__name__)


class Parcel(NamedTuple):
    """A delivery that this process alone tries until `due`."""

    delivery: str
    due: float
    attempt: int
    webhook: WebhookRow
    told: Told


class Outcome(NamedTuple):
    status: int | None  # of the answer, if there was one
    detail: str | None  # why it failed; None: delivered


class Courier:
    """What a delivering process keeps between jobs."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        clock: Callable[[], float],
        resolve: Resolve = resolved,
        tls: ssl.SSLContext | None = None,
        seconds: float = TOTAL_SECONDS,
    ) -> None:
        self._database, self._clock, self._seconds = database, clock, seconds
        self._destinations = Destinations(settings.webhook_networks, resolve)
        self._tls = tls or httpx.create_ssl_context(trust_env=False)
        self._threads, self._free = ThreadPoolExecutor(THREADS, "courier"), BoundedSemaphore(THREADS)
        self._lock, self._busy = Lock(), Counter[str]()  # threads at work for a webhook

    def deliver(self, delivery: str) -> None:
        """Have a delivery tried, in a thread of its own; returns as soon as one is free to do it."""
        self._free.acquire()
        self._threads.submit(self.attempt, delivery).add_done_callback(self._done)

    def close(self) -> None:
        """Finish what is at hand."""
        self._threads.shutdown()

    def attempt(self, delivery: str) -> None:
        """Try a delivery once, if it is due; what has too many threads already is left for later."""
        with self._database.read() as session:
            row = session.get(DeliveryRow, delivery)
        if row is None or not self._enter(row.webhook):
            return
        try:
            parcel = self._take(delivery)
            if parcel:
                self._record(parcel, self._post(parcel))
        finally:
            self._leave(row.webhook)

    def _take(self, delivery: str) -> Parcel | None:
        """Lease a delivery. None: it is not due, or somebody else has it."""
        now = self._clock()
        until = now + LEASE_SECONDS
        free = (DeliveryRow.id == delivery, DeliveryRow.stage == WAITING, DeliveryRow.due <= now)
        with self._database.write() as session:
            lease = update(DeliveryRow).where(*free).values(due=until, attempts=DeliveryRow.attempts + 1)
            if session.scalar(lease.returning(DeliveryRow.id)) is None:
                return None
            row = session.get_one(DeliveryRow, delivery)
            hook = session.get_one(WebhookRow, row.webhook)
            if hook.removed is not None:
                row.stage, row.detail = FAILED, "the webhook was removed"
                return None
            if row.attempts > MOST_ATTEMPTS:
                row.stage, row.detail = FAILED, row.detail or "processes died that tried it"
                return None
            return Parcel(delivery, until, row.attempts, hook, events.one(session, row.event))

    def _post(self, parcel: Parcel) -> Outcome:
        body = content(parcel.told)
        signed = webhook.sign(parcel.webhook.secret, f"event_{parcel.told.number}", int(self._clock()), body)
        headers = {"Content-Type": "application/json", "User-Agent": "assay"} | signed
        try:
            status = post(parcel.webhook.url, headers, body, self._destinations, self._tls, self._seconds)
        except (Undelivered, Refused) as failure:
            return Outcome(None, str(failure))
        return Outcome(status, None if 200 <= status < 300 else f"answered {status}")

    def _record(self, parcel: Parcel, outcome: Outcome) -> None:
        """Write what came of an attempt, unless the lease was lost meanwhile."""
        now = self._clock()
        stage, due = _after(parcel.attempt, outcome, now)
        mine = (DeliveryRow.id == parcel.delivery, DeliveryRow.stage == WAITING, DeliveryRow.due == parcel.due)
        with self._database.write() as session:
            session.execute(
                update(DeliveryRow)
                .where(*mine)
                .values(stage=stage, due=due, status=outcome.status, detail=outcome.detail)
            )
            if outcome.status == httpx.codes.GONE:
                hook = session.get_one(WebhookRow, parcel.webhook.id)
                if hook.removed is None:
                    webhooks.end(session, hook, "the webhook answered 410 and was removed", now)
        say(
            log,
            f"delivery.{'retried' if stage == WAITING else stage}",
            logging.INFO if stage == DELIVERED else logging.WARNING,
            delivery=parcel.delivery,
            webhook=parcel.webhook.id,
            attempt=parcel.attempt,
            reason=outcome.detail,
        )

    def _enter(self, hook: str) -> bool:
        """Whether one thread more may work for a webhook."""
        with self._lock:
            if self._busy[hook] >= THREADS_EACH:
                return False
            self._busy[hook] += 1
            return True

    def _leave(self, hook: str) -> None:
        with self._lock:
            self._busy[hook] -= 1
            if not self._busy[hook]:
                del self._busy[hook]

    def _done(self, attempt: Future[None]) -> None:
        self._free.release()
        failure = attempt.exception()
        if isinstance(failure, Unavailable):
            say(log, "delivery.late", logging.WARNING, reason=str(failure))
        elif failure:
            log.error("bug in a delivery", exc_info=failure)


def content(told: Told) -> bytes:
    """The body of a delivery: the same however often it is sent."""
    moment = datetime.fromtimestamp(told.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"type": told.kind, "timestamp": moment, "data": told.to_json()}).encode()


def _after(attempt: int, outcome: Outcome, now: float) -> tuple[str, float]:
    """The stage after an attempt, counted from 1, and when the next one is due."""
    if outcome.detail is None:
        return DELIVERED, now
    if outcome.status == httpx.codes.GONE or attempt >= MOST_ATTEMPTS:
        return FAILED, now
    return WAITING, now + PAUSES[attempt - 1] * random.uniform(1, 1 + JITTER)
