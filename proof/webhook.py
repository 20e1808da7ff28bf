"""Signatures on webhook deliveries, for senders and receivers: Standard Webhooks, symmetric scheme v1.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md: HMAC-SHA256 over
`id.timestamp.body`, so that neither body nor moment can be changed, and a delivery cannot be played again later.
"""

import base64
import binascii
import hmac
import re
import secrets
from collections.abc import Mapping
from hashlib import sha256

from proof.errors import Malformed, Reason, Rejected

ID, TIMESTAMP, SIGNATURE = "webhook-id", "webhook-timestamp", "webhook-signature"  # the headers
PREFIX = "whsec_"
SECRET_BYTES = 32  # of those made here
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64
TOLERANCE = 300.0  # seconds that the clocks of sender and receiver may be apart, and a delivery on its way
MAX_SIGNATURES = 16  # in one header: a sender that changes its secret signs with both

_ID = re.compile(r"[\x21-\x2d\x2f-\x7e]{1,256}")  # printable, and no dot: that separates what is signed
_TIMESTAMP = re.compile(r"0|[1-9][0-9]{0,15}")


def new_secret() -> str:
    return PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def sign(secret: str, id_: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of a delivery at a time in Unix seconds. Raises Malformed for an odd secret or id."""
    if not _ID.fullmatch(id_):
        raise Malformed(f"{ID}: printable ASCII without dots, of 1 to 256 characters")
    signature = base64.b64encode(_mac(_key(secret), id_, str(timestamp), body)).decode()
    return {ID: id_, TIMESTAMP: str(timestamp), SIGNATURE: f"v1,{signature}"}


def verify(secret: str, headers: Mapping[str, str], body: bytes, now: float, tolerance: float = TOLERANCE) -> None:
    """Check that who knows the secret sent this body, at most `tolerance` seconds before or after `now`.

    `body` is what was received, to the byte; header names may be written in any case. Raises Malformed when the headers
    do not read, Rejected when they are false.
    """
    key = _key(secret)
    given = {name.lower(): value for name, value in headers.items()}
    missing = [name for name in (ID, TIMESTAMP, SIGNATURE) if name not in given]
    if missing:
        raise Malformed(f"{missing[0]}: the header is missing")
    id_, timestamp, signatures = given[ID], given[TIMESTAMP], given[SIGNATURE].split(" ")
    if not _ID.fullmatch(id_):
        raise Malformed(f"{ID}: printable ASCII without dots, of 1 to 256 characters")
    if not _TIMESTAMP.fullmatch(timestamp):
        raise Malformed(f"{TIMESTAMP}: not Unix seconds")
    if len(signatures) > MAX_SIGNATURES:
        raise Malformed(f"{SIGNATURE}: more than {MAX_SIGNATURES} signatures")
    if not abs(now - int(timestamp)) <= tolerance:
        raise Rejected(Reason.SIGNATURE, f"sent at {timestamp}, more than {tolerance:.0f} s from now")
    expected = _mac(key, id_, timestamp, body)
    matches = [hmac.compare_digest(expected, _signature(entry)) for entry in signatures]
    if not any(matches):
        raise Rejected(Reason.SIGNATURE, "no signature of the delivery is made with this secret")


def _mac(key: bytes, id_: str, timestamp: str, body: bytes) -> bytes:
    return hmac.digest(key, b".".join((id_.encode(), timestamp.encode(), body)), sha256)


def _key(secret: str) -> bytes:
    try:
        key = binascii.a2b_base64(secret.removeprefix(PREFIX).encode(), strict_mode=True)
    except ValueError as error:
        raise Malformed("webhook secret: not base64") from error
    if not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
        raise Malformed(f"webhook secret: {len(key)} bytes, not {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES}")
    return key


def _signature(entry: str) -> bytes:
    """The bytes of one signature; of another scheme, or unreadable, none: that one is no match, and others may be."""
    scheme, _, text = entry.partition(",")
    if scheme != "v1":
        return b""
    try:
        return binascii.a2b_base64(text.encode(), strict_mode=True)
    except ValueError:
        return b""
