"""Attestations by uid, the EIP-712 digest that was signed."""

from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse

from api import schemas
from api.caller import Poster
from api.door import Here
from api.problems import Code, Problem

router = APIRouter(prefix="/v1/attestations", tags=["attestations"])


@router.get("/{uid}", response_model=schemas.Attestation)
def show(uid: Annotated[str, Path(pattern="^(0x)?[0-9a-f]{64}$")], door: Here, tenant: Poster) -> JSONResponse:
    """The signed verdict on a task of the caller's."""
    found = door.store.attestation(uid.removeprefix("0x"))
    if found is None:
        raise Problem(Code.ATTESTATION_UNKNOWN, f"no attestation {uid}")
    door.seen(found.task, tenant)
    return JSONResponse(found.document)
