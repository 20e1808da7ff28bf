"""create_app: the routes, the problems, and the limits in front of them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from api import (
    attestations,
    events,
    health,
    limits,
    metrics,
    models,
    pages,
    problems,
    schemas,
    tasks,
    webhooks,
    weights,
)
from api.caller import KnownCaller
from api.door import Door, Here
from api.rates import RateLimit
from api.slow import SteadyBody
from proof.graph import MAX_MODEL_BYTES

DESCRIPTION = """
Assay proves that a worker really ran the model it is paid for, and signs the payment only then.

Register a model, post a task; a worker commits, is challenged, and uploads a proof; the verdict is signed.
Protocols call with an API key, workers sign their requests. Repeating any call is safe. Errors are RFC 9457 problems
with a stable `code`.
"""


def create_app(door: Door | None) -> FastAPI:
    """The service behind a door. Without one it answers nothing: its OpenAPI document is all there is to it."""

    @asynccontextmanager
    async def listening(_: FastAPI) -> AsyncIterator[None]:
        if door is None:
            raise RuntimeError("there is no door to serve")
        async with door.listening:
            yield

    app = FastAPI(
        title="Assay", version=_version(), description=DESCRIPTION, responses=schemas.PROBLEM, lifespan=listening
    )
    app.state.door = door
    if door:
        app.add_middleware(SteadyBody, stall=door.settings.body_stall)
        app.add_middleware(KnownCaller, door=door)
    app.add_middleware(limits.BodyLimit)
    if door:
        app.add_middleware(RateLimit, rates=door.rates)
        app.add_middleware(metrics.Requests, registry=door.registry)
    problems.install(app)
    for router in (weights, models, tasks, attestations, events, webhooks, health, metrics, pages):
        app.include_router(router.router)
    app.include_router(tasks.batch)

    @app.get("/.well-known/assay.json", response_model=schemas.About, tags=["health"])
    def about(door: Here) -> JSONResponse:
        """Who signs here, and what a caller must keep to."""
        told = {
            "name": "Assay",
            "version": app.version,
            "signer": door.signer,
            "origins": list(door.settings.origins),
            "openapi": "/openapi.json",
            "limits": {
                "json_bytes": limits.MAX_JSON_BYTES,
                "model_bytes": MAX_MODEL_BYTES,
                "proof_bytes": limits.MAX_PROOF_BYTES,
                "weights_bytes": limits.MAX_WEIGHTS_BYTES,
                "batch_tasks": schemas.MAX_BATCH,
                "task_inputs": schemas.MAX_INPUTS,
            },
        }
        return JSONResponse(told)

    return app


def _version() -> str:
    try:
        return version("assay")
    except PackageNotFoundError:  # run from a checkout
        return "0"
