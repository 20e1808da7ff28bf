"""What is asked from outside: alive, and ready or why not."""

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from api import schemas
from api.door import Door, Here
from proof.errors import Malformed, Unavailable
from verifier.figures import Figures
from verifier.queue import TASKS

router = APIRouter(tags=["health"])

MIN_FREE_BYTES = 2**30  # under the blobs
MAX_SKEW_SECONDS = 5.0  # between the database's clock and ours: leases and deadlines are compared
MAX_WAIT_SECONDS = 900.0  # of the task that waits longest


@router.get("/livez", response_model=schemas.Liveness)
async def live() -> JSONResponse:
    return JSONResponse({"live": True})


@router.get("/readyz", response_model=schemas.Readiness, responses={503: {"model": schemas.Readiness}})
def ready(door: Here) -> JSONResponse:
    """200 when a task posted now would be judged; otherwise 503, and which check fails, why, and what to do."""
    checks = [_check(name, partial(probe, door)) for name, probe in PROBES.items()]
    good = all(check["ok"] for check in checks)
    return JSONResponse({"ready": good, "checks": checks}, 200 if good else 503)


def _check(name: str, probe: Callable[[], Any]) -> dict[str, Any]:
    try:
        probe()
    except (Unavailable, Malformed) as failure:
        return {"name": name, "ok": False, "reason": str(failure)}
    return {"name": name, "ok": True, "reason": ""}


def _clock(door: Door) -> None:
    skew = abs(door.store.database.clock() - time.time())
    if skew > MAX_SKEW_SECONDS:
        raise Unavailable(f"the database's clock is {skew:.0f} s away from ours: keep both machines on NTP")


def _workers(door: Door) -> None:
    if not door.queue.workers(TASKS):
        raise Unavailable("no worker process is running: start `assay work`")


def _blobs(door: Door) -> None:
    if not os.access(door.blobs.root, os.W_OK):
        raise Unavailable(f"{door.blobs.root} cannot be written")
    free = shutil.disk_usage(door.blobs.root).free
    if free < MIN_FREE_BYTES:
        raise Unavailable(f"{free >> 20} MiB are left for blobs: make room for {MIN_FREE_BYTES >> 20} MiB")


def _backlog(door: Door) -> None:
    since = Figures(door.store.database).waiting_since()
    waited = 0.0 if since is None else door.clock() - since
    if waited > MAX_WAIT_SECONDS:
        raise Unavailable(f"a task has waited for {waited:.0f} s: start more `assay work`, or see `assay status`")


PROBES: dict[str, Callable[[Door], Any]] = {
    "database": lambda door: door.store.database.ping(),
    "migrations": lambda door: door.store.database.check(),
    "clock": _clock,
    "queue": lambda door: door.queue.length(TASKS),
    "workers": _workers,
    "blobs": _blobs,
    "backlog": _backlog,
}
