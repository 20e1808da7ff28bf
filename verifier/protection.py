"""What was signed, to take along: the protection table as JSON, in the spirit of EIP-3076.

Who moves an attestation key to another record takes this file with it, so that the other one cannot sign anything else
for the same task and nonce. Importing is all or nothing: a row that contradicts one on record refuses the file. It is
one JSON document with a row on each line, so that neither side ever holds more than a page of it.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import IO

from sqlalchemy import select, tuple_
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from proof.attestation import PaymentAttestation
from proof.encoding import fields, parse
from proof.errors import Conflict, Malformed, Unavailable
from proof.messages import Json
from verifier.database import Database
from verifier.store import protection_row
from verifier.tables import ProtectionRow

FORMAT = "assay-verdict-interchange/1"
MAX_PROTECTION_BYTES = 2**34
MAX_ROW_BYTES = 8192
PAGE = 500  # rows that are read or looked up at once

FIRST_ROW = 2  # a line

_HEAD, _TAIL = f'{{"format":"{FORMAT}","rows":[\n'.encode(), b"]}\n"


def export(database: Database, file: IO[bytes]) -> int:
    """Write all rows as they come; how many there were."""
    written = 0
    file.write(_HEAD)
    for written, row in enumerate(_rows(database), 1):
        line = json.dumps(_shown(row), sort_keys=True, separators=(",", ":"))
        file.write((b"," if written > 1 else b"") + line.encode() + b"\n")
    file.write(_TAIL)
    return written


def import_(database: Database, file: IO[bytes]) -> int:
    """Take over the rows of a file that `export` wrote, in one transaction; how many were new.

    Raises Malformed, or Conflict naming the task; nothing is stored then.
    """
    rows = _read(file)
    try:
        with database.write() as session:
            new = 0
            while page := list(islice(rows, PAGE)):
                new += _take(session, page)
            return new
    except IntegrityError as error:
        raise Unavailable("the record signs just now: stop the service, then import") from error


def _take(session: Session, page: Sequence[ProtectionRow]) -> int:
    tasks = {row.task for row in page}
    found = session.scalars(select(ProtectionRow).where(ProtectionRow.task.in_(tasks)))
    known = {(row.committee, row.task, row.nonce): row.uid for row in found}
    new = 0
    for row in page:
        key = (row.committee, row.task, row.nonce)
        if key not in known:
            known[key] = row.uid
            session.add(row)
            new += 1
        elif known[key] != row.uid:
            raise Conflict(f"task {row.task}: {known[key]} is protected, the file says {row.uid}; nothing is taken")
    session.flush()
    session.expunge_all()
    return new


def _read(file: IO[bytes]) -> Iterator[ProtectionRow]:
    """The rows, each on a line as `export` writes it. Raises Malformed naming the line."""
    size = len(_HEAD)
    if file.readline(size) != _HEAD:
        raise Malformed(f"protection: not a file that `assay protection export` wrote ({FORMAT})")
    for number, line in enumerate(iter(partial(file.readline, MAX_ROW_BYTES), _TAIL), FIRST_ROW):
        at, size = f"protection: line {number}", size + len(line)
        if size > MAX_PROTECTION_BYTES:
            raise Malformed(f"protection: more than {MAX_PROTECTION_BYTES} bytes")
        comma = b"" if number == FIRST_ROW else b","
        if not line.startswith(comma + b"{") or not line.endswith(b"\n"):
            raise Malformed(f"{at}: cut off, too long, or not a row")
        yield _row(line.removeprefix(comma), at)
    if file.read(1):
        raise Malformed("protection: it goes on after its end")


def _row(line: bytes, at: str) -> ProtectionRow:
    value = parse(line, at, MAX_ROW_BYTES)
    uid, document, created = fields(value, at, ("uid", "attestation", "created"))
    row = protection_row(PaymentAttestation.from_json(document, f"{at}.attestation"), 0.0)
    if uid != row.uid:
        raise Malformed(f"{at}.uid: not the digest of the attestation")
    if not isinstance(created, int | float) or isinstance(created, bool) or not 0 <= created < 2**53:
        raise Malformed(f"{at}.created: not Unix seconds")
    row.created = float(created)
    return row


def _shown(row: ProtectionRow) -> Json:
    return {"uid": row.uid, "attestation": row.document, "created": row.created}


def _rows(database: Database) -> Iterator[ProtectionRow]:
    after = ("", "", "")
    key = ProtectionRow.committee, ProtectionRow.task, ProtectionRow.nonce
    while True:
        asked = select(ProtectionRow).where(tuple_(*key) > after).order_by(*key).limit(PAGE)
        with database.read() as session:
            page = session.scalars(asked).all()
        yield from page
        if len(page) < PAGE:
            return
        after = (page[-1].committee, page[-1].task, page[-1].nonce)
