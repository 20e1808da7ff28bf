"""Files of weights that models refer to, by content; the bytes are judged when a model is registered."""

from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from api import schemas
from api.caller import Registrar
from api.door import Door, Here, receive
from api.limits import limit_of
from api.problems import Code, Problem
from proof.errors import Malformed
from verifier.blobs import Upload

router = APIRouter(prefix="/v1/weights", tags=["models"])

Digest = Annotated[str, Path(pattern=schemas.HEX64, description="BLAKE3 of the bytes, as b3sum prints it.")]


@router.put(
    "/{digest}",
    response_model=schemas.Weights,
    status_code=201,
    responses={200: {"model": schemas.Weights, "description": "It was there before"}},
    openapi_extra=schemas.upload("A file of weights, in any format that external data of ONNX can point into."),
)
async def put(digest: Digest, request: Request, door: Here, _: Registrar) -> JSONResponse:
    """Upload weights. A model registered afterwards points to them by this digest."""
    with door.blobs.upload(limit_of("PUT", f"/v1/weights/{digest}")) as upload:
        await receive(request, upload)
        return await run_in_threadpool(_keep, door, upload, digest)


@router.get("/{digest}", response_model=schemas.Weights)
def show(digest: Digest, door: Here, _: Registrar) -> JSONResponse:
    """Whether this file was uploaded. It stays for an hour at least; registering a model that names it keeps it."""
    path = door.blobs.find(digest) if door.blobs.touch(digest) else None
    if path is None:
        raise Problem(Code.WEIGHTS_UNKNOWN, f"no weights {digest}")
    return JSONResponse(_state(digest, path.stat().st_size))


def _keep(door: Door, upload: Upload, digest: str) -> JSONResponse:
    address = upload.close()
    if address != digest:
        raise Malformed(f"these bytes have the digest {address}, not {digest}")
    known = door.blobs.touch(digest)
    if not known:
        door.blobs.place(upload, address)
    return JSONResponse(_state(digest, upload.size), 200 if known else 201)


def _state(digest: str, size: int) -> dict[str, object]:
    return {"weights": digest, "file_bytes": size}
