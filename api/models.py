"""Models: registered once, by content; refused when a node of them could not be checked."""

from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from api import schemas
from api.caller import Reader, Registrar
from api.door import Door, Here, receive
from api.limits import limit_of
from api.problems import Code, Problem
from proof.errors import Malformed
from verifier.blobs import Upload
from verifier.tables import ModelRow

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.post(
    "",
    response_model=schemas.ModelState,
    status_code=201,
    responses={200: {"model": schemas.ModelState, "description": "It was registered before"}},
    openapi_extra=schemas.upload(
        "The ONNX file, its weights inside, or in uploaded files: then a location is the digest of one."
    ),
)
async def register(request: Request, door: Here, _: Registrar) -> JSONResponse:
    """Register a model. Its id binds graph and weights; the same model again answers 200 with the same id."""
    with door.blobs.upload(limit_of("POST", "/v1/models")) as upload:
        await receive(request, upload)
        return await run_in_threadpool(_register, door, upload)


@router.get("/{model}", response_model=schemas.ModelState)
def show(model: Annotated[str, Path(pattern=schemas.HEX64)], door: Here, _: Reader) -> JSONResponse:
    """What there is to check in a model, by op and family, and what it takes and gives."""
    row = door.store.model(model)
    if row is None:
        raise Problem(Code.MODEL_UNKNOWN, f"no model {model}")
    return JSONResponse(_state(row))


def _register(door: Door, upload: Upload) -> JSONResponse:
    address = upload.close()
    try:
        seen = door.inspector.report(upload.path)
    except Malformed as error:
        raise Problem(Code.MODEL_UNVERIFIABLE, str(error)) from error
    known = door.store.model(seen.id)
    if known:
        return JSONResponse(_state(known))
    row = ModelRow(
        id=seen.id,
        blob=door.blobs.place(upload, address),
        size=upload.size,
        report=seen.report,
        created=door.clock(),
    )
    state = _state(row)
    new = door.store.add_model(row, seen.files)
    return JSONResponse(state, 201 if new else 200, {"Location": f"/v1/models/{state['model']}"})


def _state(row: ModelRow) -> dict[str, object]:
    return {**row.report, "file_bytes": row.size, "created": row.created}
