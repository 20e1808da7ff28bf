"""What was signed, to take along: the protection table as JSON, in the spirit of EIP-3076.

Who moves an attestation key to another record takes this file with it, so that the other one cannot sign anything else
for the same task and nonce. Importing is all or nothing: a row that contradicts one on record refuses the file.
"""

import json
from collections.abc import Iterator
from typing import IO

from sqlalchemy import select, tuple_
from sqlalchemy.orm import Session

from proof.attestation import PaymentAttestation
from proof.encoding import array, fields, parse
from proof.errors import Conflict, Malformed
from proof.messages import Json
from verifier.database import Database
from verifier.store import protection_row
from verifier.tables import ProtectionRow

FORMAT = "assay-verdict-interchange/1"
MAX_FILE_BYTES = 2**30
MAX_ROWS = 1_000_000
PAGE = 1000  # rows that are read at once


def export(database: Database, file: IO[str]) -> int:
    """Write all rows, one a line, as they come; how many there were."""
    written = 0
    file.write(f'{{"format":{json.dumps(FORMAT)},"rows":[')
    for row in _rows(database):
        file.write(("," if written else "") + "\n" + json.dumps(_shown(row), sort_keys=True))
        written += 1
    file.write("\n]}\n")
    return written


def import_(database: Database, content: bytes) -> int:
    """Take over the rows of a file; how many were new. Raises Malformed, or Conflict naming the task."""
    format_, rows = fields(parse(content, "protection", MAX_FILE_BYTES), "protection", ("format", "rows"))
    if format_ != FORMAT:
        raise Malformed(f"protection.format: not {FORMAT}")
    read = [_read(row, f"protection.rows[{i}]") for i, row in enumerate(array(rows, "protection.rows", MAX_ROWS))]
    with database.write() as session:
        return sum(_take(session, attestation, created) for attestation, created in read)


def _take(session: Session, attestation: PaymentAttestation, created: float) -> bool:
    new = protection_row(attestation, created)
    known = session.get(ProtectionRow, (new.committee, new.task, new.nonce))
    if known is None:
        session.add(new)
        session.flush()
        return True
    if known.uid != new.uid:
        raise Conflict(f"task {new.task}: the record has signed {known.uid}, the file says {new.uid}; nothing is taken")
    return False


def _read(value: object, at: str) -> tuple[PaymentAttestation, float]:
    uid, document, created = fields(value, at, ("uid", "attestation", "created"))
    attestation = PaymentAttestation.from_json(document, f"{at}.attestation")
    if uid != attestation.digest().hex():
        raise Malformed(f"{at}.uid: not the digest of the attestation")
    if not isinstance(created, int | float) or isinstance(created, bool) or not 0 <= created < 2**53:
        raise Malformed(f"{at}.created: not Unix seconds")
    return attestation, float(created)


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
