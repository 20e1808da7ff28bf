"""What is asked from outside: alive, ready and why not, and the figures."""

import os
from collections.abc import Callable, Iterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api import schemas
from api.door import Door, Here
from proof.errors import Unavailable
from verifier.lifecycle import Stage

router = APIRouter(tags=["health"])


@router.get("/livez", response_model=schemas.Liveness)
async def live() -> JSONResponse:
    return JSONResponse({"live": True})


@router.get("/readyz", response_model=schemas.Readiness, responses={503: {"model": schemas.Readiness}})
def ready(door: Here) -> JSONResponse:
    """200 when a task posted now would be judged; otherwise 503, and which check fails and why."""
    checks = [
        _check("database", door.store.ping),
        _check("queue", door.queue.length),
        _check("workers", lambda: _workers(door)),
        _check("blobs", lambda: _writable(door)),
    ]
    good = all(check["ok"] for check in checks)
    return JSONResponse({"ready": good, "checks": checks}, 200 if good else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(door: Here) -> Response:
    """Prometheus text format; every figure is read from the record when it is asked for."""
    registry = CollectorRegistry()
    registry.register(Figures(door))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class Figures(Collector):
    def __init__(self, door: Door) -> None:
        self._door = door

    def describe(self) -> list[Metric]:
        return []  # asked for at each scrape only

    def collect(self) -> Iterator[Metric]:
        stages = self._door.store.stages()
        tasks = GaugeMetricFamily("assay_tasks", "Tasks by stage.", labels=["stage"])
        for stage in Stage:
            tasks.add_metric([stage], stages.get(stage, 0))
        verdicts = CounterMetricFamily("assay_verdicts", "Verdicts by reason.", labels=["verdict", "reason"])
        seconds = CounterMetricFamily("assay_check_seconds", "Time spent checking.", labels=["verdict", "reason"])
        for verdict, reason, count, total in self._door.store.verdicts():
            verdicts.add_metric([verdict, reason], count)
            seconds.add_metric([verdict, reason], total)
        yield from (tasks, verdicts, seconds)
        yield _gauge("assay_queue_jobs", "Jobs that wait in the queue.", self._door.queue.length)
        yield _gauge("assay_workers", "Worker processes that have shown life.", self._door.queue.workers)


def _gauge(name: str, text: str, read: Callable[[], int]) -> Metric:
    """Without a value while the queue is away."""
    gauge = GaugeMetricFamily(name, text)
    try:
        gauge.add_metric([], read())
    except Unavailable:
        return gauge
    return gauge


def _check(name: str, probe: Callable[[], Any]) -> dict[str, Any]:
    try:
        probe()
    except Unavailable as failure:
        return {"name": name, "ok": False, "reason": str(failure)}
    return {"name": name, "ok": True, "reason": ""}


def _workers(door: Door) -> None:
    if not door.queue.workers():
        raise Unavailable("no worker process is running: start `assay work`")


def _writable(door: Door) -> None:
    if not os.access(door.blobs.root, os.W_OK):
        raise Unavailable("the blob directory cannot be written")
