"""Webhooks on record: where a tenant has the stages of its tasks told to, and what was delivered."""

import secrets
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import func, select, text, tuple_, update
from sqlalchemy.orm import Session

from proof import webhook
from proof.errors import Conflict
from verifier.database import Database
from verifier.lifecycle import Stage
from verifier.outbox import WAITING
from verifier.tables import DeliveryRow, EventRow, WebhookRow

DELIVERED, FAILED = "delivered", "failed"  # the other stages of a delivery
MAX_WEBHOOKS = 20  # of a tenant
MOST_DUE = 2000  # deliveries that are asked for at once
MOST_DUE_EACH = 200  # of one webhook: one that is slow must not keep the others waiting
WEBHOOKS_LOCK = 0x574542484F4F4B  # of PostgreSQL's advisory locks, the name in ASCII


class TooMany(Conflict):
    """The tenant has as many webhooks as it may have."""


class Sent(NamedTuple):
    """A delivery, and what it tells."""

    delivery: DeliveryRow
    event: EventRow


def add(database: Database, tenant: str, url: str, stages: Sequence[Stage], now: float) -> WebhookRow:
    """A webhook with a fresh secret; no stages: all. Raises TooMany."""
    row = WebhookRow(
        id=secrets.token_hex(16),
        tenant=tenant,
        url=url,
        secret=webhook.new_secret(),
        stages=sorted(set(stages)),
        created=now,
    )
    with database.write() as session:
        if session.get_bind().dialect.name == "postgresql":
            session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": WEBHOOKS_LOCK})
        known = select(func.count()).where(WebhookRow.tenant == tenant, WebhookRow.removed.is_(None))
        if (session.scalar(known) or 0) >= MAX_WEBHOOKS:
            raise TooMany(f"{tenant} has {MAX_WEBHOOKS} webhooks")
        session.add(row)
    return row


def listed(database: Database, tenant: str) -> list[WebhookRow]:
    """The oldest first."""
    wanted = select(WebhookRow).where(WebhookRow.tenant == tenant, WebhookRow.removed.is_(None))
    with database.read() as session:
        return list(session.scalars(wanted.order_by(WebhookRow.created, WebhookRow.id)))


def find(database: Database, tenant: str, webhook: str) -> WebhookRow | None:
    with database.read() as session:
        return _own(session, tenant, webhook)


def remove(database: Database, tenant: str, webhook: str, now: float) -> WebhookRow | None:
    """End a webhook: what waits for it fails. None if the tenant has none of this id."""
    with database.write() as session:
        row = _own(session, tenant, webhook)
        if row:
            end(session, row, "the webhook was removed", now)
        return row


def end(session: Session, row: WebhookRow, why: str, now: float) -> None:
    row.removed = now
    waiting = update(DeliveryRow).where(DeliveryRow.webhook == row.id, DeliveryRow.stage == WAITING)
    session.execute(waiting.values(stage=FAILED, detail=why))


def deliveries(database: Database, webhook: str, limit: int, before: tuple[int, str] | None = None) -> list[Sent]:
    """Deliveries to a webhook, of the newest event first; `before` is the event and id of the last one known."""
    wanted = select(DeliveryRow, EventRow).join(EventRow, EventRow.id == DeliveryRow.event)
    wanted = wanted.where(DeliveryRow.webhook == webhook)
    if before is not None:
        wanted = wanted.where(tuple_(DeliveryRow.event, DeliveryRow.id) < tuple_(*before))
    with database.read() as session:
        rows = session.execute(wanted.order_by(DeliveryRow.event.desc(), DeliveryRow.id.desc()).limit(limit))
        return [Sent(*row) for row in rows]


def replay(database: Database, webhook: str, delivery: str, now: float) -> Sent | None:
    """Have an event delivered once more, by a delivery of its own. None if the webhook has no such delivery."""
    with database.write() as session:
        known = session.get(DeliveryRow, delivery)
        if known is None or known.webhook != webhook:
            return None
        again = DeliveryRow(
            id=secrets.token_hex(32), webhook=webhook, event=known.event, stage=WAITING, due=now, created=now
        )
        session.add(again)
        return Sent(again, session.get_one(EventRow, known.event))


def due(database: Database, now: float) -> list[str]:
    """Deliveries that are to be tried, the longest due first, and not too many of any one webhook."""
    place = func.row_number().over(partition_by=DeliveryRow.webhook, order_by=(DeliveryRow.due, DeliveryRow.id))
    waiting = (
        select(DeliveryRow.id, DeliveryRow.due, place.label("place"))
        .where(DeliveryRow.stage == WAITING, DeliveryRow.due <= now)
        .subquery()
    )
    wanted = select(waiting.c.id).where(waiting.c.place <= MOST_DUE_EACH).order_by(waiting.c.due).limit(MOST_DUE)
    with database.read() as session:
        return list(session.scalars(wanted))


def _own(session: Session, tenant: str, webhook: str) -> WebhookRow | None:
    row = session.get(WebhookRow, webhook)
    return row if row and row.tenant == tenant and row.removed is None else None
