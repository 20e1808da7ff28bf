"""Tells what happened, in the transaction in which it happens: an event a stage, a delivery a webhook that asked."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from verifier.lifecycle import Stage
from verifier.tables import DeliveryRow, EventRow, WebhookRow

EVENTS_LOCK = 0x4556454E54  # of PostgreSQL's advisory locks, the name in ASCII
WAITING = "waiting"  # the stage of a delivery that is to be tried


@dataclass(frozen=True)
class Moved:
    """A task that came to a stage."""

    task: str
    tenant: str
    stage: Stage


def announce(session: Session, moved: Sequence[Moved], now: float) -> None:
    """Write events and deliveries; the last thing that a transaction does.

    Readers follow events by number, so these must become visible in order: PostgreSQL's writers wait for each other.
    """
    if not moved:
        return
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": EVENTS_LOCK})
    events = [EventRow(task=one.task, tenant=one.tenant, stage=one.stage, created=now) for one in moved]
    session.add_all(events)
    tenants = {one.tenant for one in moved}
    wanted = select(WebhookRow).where(WebhookRow.tenant.in_(tenants), WebhookRow.removed.is_(None))
    webhooks = session.scalars(wanted).all()
    if webhooks:
        session.flush()  # gives the events their numbers
    for event in events:
        for webhook in webhooks:
            if webhook.tenant == event.tenant and (not webhook.stages or event.stage in webhook.stages):
                session.add(
                    DeliveryRow(
                        id=secrets.token_hex(32),
                        webhook=webhook.id,
                        event=event.id,
                        stage=WAITING,
                        due=now,
                        created=now,
                    )
                )
