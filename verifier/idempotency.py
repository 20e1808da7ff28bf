"""Idempotency keys: the answer to a tenant's request, kept for a day, for whoever repeats it under the same key.

Every call here may be repeated anyway, since tasks and proofs are known by their content. A key adds that the very same
answer comes back, and that a key is not used for two requests.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, update
from sqlalchemy.exc import IntegrityError

from proof.errors import Conflict, Malformed
from verifier.database import Database
from verifier.tables import IdempotencyRow

KEPT_SECONDS = 86_400.0
WORK_SECONDS = 60.0  # after which a request without an answer is taken to have died


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, Any]
    body: str


def begin(database: Database, tenant: str, key: str, request: str, now: float) -> Answer | None:
    """The kept answer, or None: then the request is to be carried out and `finish` called.

    Raises Malformed when the key was used for another request, Conflict while the same one is at work.
    """
    row = IdempotencyRow(tenant=tenant, key=key, request=request, created=now)
    try:
        with database.write() as session:
            known = session.get(IdempotencyRow, (tenant, key), with_for_update=True)
            if known is None or known.created < now - KEPT_SECONDS:
                session.merge(row)
                return None
            if known.request != request:
                raise Malformed("Idempotency-Key: it was used for another request; take a new one")
            if known.status is not None:
                return Answer(known.status, known.headers or {}, known.body or "")
            if known.created >= now - WORK_SECONDS:
                raise Conflict("a request with this Idempotency-Key is at work: repeat it later")
            known.created = now
            return None
    except IntegrityError:
        raise Conflict("a request with this Idempotency-Key is at work: repeat it later") from None


def finish(database: Database, tenant: str, key: str, answer: Answer) -> None:
    with database.write() as session:
        mine = update(IdempotencyRow).where(IdempotencyRow.tenant == tenant, IdempotencyRow.key == key)
        session.execute(mine.values(status=answer.status, headers=answer.headers, body=answer.body))


def give_up(database: Database, tenant: str, key: str) -> None:
    """The request failed in a way that repeating may cure: the key is free again."""
    with database.write() as session:
        session.execute(delete(IdempotencyRow).where(IdempotencyRow.tenant == tenant, IdempotencyRow.key == key))


def forget(database: Database, now: float) -> None:
    with database.write() as session:
        session.execute(delete(IdempotencyRow).where(IdempotencyRow.created < now - KEPT_SECONDS))
