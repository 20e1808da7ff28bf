"""API keys: who may call, for which tenant, and what for. The secret is shown once and known by its digest.

A key is `assay_<id>_<secret>`. The secret has 256 random bits, so that its SHA-256 needs no salt and no slow hash:
there is nothing to guess.
"""

import base64
import hmac
import re
import secrets
from collections.abc import Iterable
from hashlib import sha256

from sqlalchemy import select

from proof.errors import Conflict, Malformed, Reason, Rejected
from verifier.database import Database
from verifier.tables import ApiKeyRow

TASKS, MODELS, METRICS, ADMIN = "tasks", "models", "metrics", "admin"
SCOPES = (TASKS, MODELS, METRICS, ADMIN)  # admin implies the others, for every tenant
ID_BYTES, SECRET_BYTES = 8, 32

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_TOKEN = re.compile(r"assay_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")


def create(
    database: Database, tenant: str, name: str, scopes: Iterable[str], now: float, expires: float | None
) -> tuple[ApiKeyRow, str]:
    """A new key and its token, which nobody can show again. Raises Malformed for odd names and scopes."""
    chosen = sorted(set(scopes))
    if not chosen or not set(chosen) <= set(SCOPES):
        raise Malformed(f"scopes {chosen}: give at least one of {', '.join(SCOPES)}")
    for label, text in (("tenant", tenant), ("name", name)):
        if not _NAME.fullmatch(text):
            raise Malformed(f"{label} {text!r}: lowercase letters, digits, dot, dash and underscore, 63 at most")
    if expires is not None and expires <= now:
        raise Malformed("the key would have expired already")
    id_ = secrets.token_hex(ID_BYTES)
    secret = base64.urlsafe_b64encode(secrets.token_bytes(SECRET_BYTES)).decode().rstrip("=")
    row = ApiKeyRow(
        id=id_, tenant=tenant, name=name, scopes=chosen, digest=_digest(secret), created=now, expires=expires
    )
    with database.write() as session:
        session.add(row)
    return row, f"assay_{id_}_{secret}"


def find(database: Database, token: str, now: float) -> ApiKeyRow:
    """The key of a token. Raises Rejected for one that is unknown, expired or revoked, without saying which."""
    given = _TOKEN.fullmatch(token)
    if given is None:
        raise Rejected(Reason.SIGNATURE, "not an API key of this service")
    with database.read() as session:
        row = session.get(ApiKeyRow, given[1])
    known = row.digest if row else _digest("")  # as much work for an unknown id
    matches = hmac.compare_digest(known, _digest(given[2]))
    if row is None or not matches or row.revoked is not None or (row.expires is not None and row.expires <= now):
        raise Rejected(Reason.SIGNATURE, "not an API key of this service, or no longer one")
    return row


def listed(database: Database) -> list[ApiKeyRow]:
    with database.read() as session:
        return list(session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.tenant, ApiKeyRow.created)))


def revoke(database: Database, id_: str, now: float) -> None:
    """End a key; again is the same. Raises Conflict when there is none."""
    with database.write() as session:
        row = session.get(ApiKeyRow, id_)
        if row is None:
            raise Conflict(f"there is no API key {id_}: see `assay key api list`")
        row.revoked = row.revoked or now


def _digest(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()
