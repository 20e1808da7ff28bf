"""create_app: the routes, the problems, and the limits in front of them."""

from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from api import attestations, health, models, problems, schemas, tasks, weights
from api.door import Door, Here
from api.limits import BodyLimit

DESCRIPTION = """
Assay proves that a worker really ran the model it is paid for, and signs the payment only then.

Register a model, post a task; a worker commits, is challenged, and uploads a proof; the verdict is signed.
Repeating any call is safe. Errors are RFC 9457 problems with a stable `code`.
"""


def create_app(door: Door) -> FastAPI:
    app = FastAPI(title="Assay", version=_version(), description=DESCRIPTION, responses=schemas.PROBLEM)
    app.state.door = door
    app.add_middleware(BodyLimit)
    problems.install(app)
    for resource in (weights, models, tasks, attestations, health):
        app.include_router(resource.router)

    @app.get("/", response_model=schemas.Index, tags=["health"])
    def index(door: Here) -> JSONResponse:
        return JSONResponse({"name": "Assay", "docs": "/docs", "openapi": "/openapi.json", "signer": door.signer})

    return app


def _version() -> str:
    try:
        return version("assay")
    except PackageNotFoundError:  # run from a checkout
        return "0"
