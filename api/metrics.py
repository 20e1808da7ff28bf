"""Figures for Prometheus: the record's, read when they are asked for, and this process's own requests."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.caller import Scraper
from api.door import Door, Here
from proof.errors import Unavailable
from verifier.figures import Figures
from verifier.queue import DELIVERIES, TASKS

router = APIRouter(tags=["health"])

STREAM = "/v1/events"  # lasts as long as somebody listens
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds


class Told(NamedTuple):
    """A metric as the README lists it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


TOLD = (
    Told("assay_tasks", "gauge", ("stage",), "Tasks by stage."),
    Told("assay_verdicts_total", "counter", ("verdict", "reason"), "Verdicts."),
    Told("assay_check_seconds_total", "counter", ("family",), "Seconds of checking, by family of ops."),
    Told("assay_queue_age_seconds", "gauge", (), "How long the task has waited that waits longest for us."),
    Told("assay_queue_jobs", "gauge", ("queue",), "Jobs in Redis; absent while it is away."),
    Told("assay_workers", "gauge", ("queue",), "Worker processes that have shown life; absent while Redis is away."),
    Told("assay_proofs_total", "counter", (), "Proofs taken."),
    Told("assay_proof_bytes_total", "counter", (), "Their bytes."),
    Told("assay_lease_losses_total", "counter", (), "Tasks taken over from a worker process that fell silent."),
    Told(
        "assay_attested_amount",
        "gauge",
        ("chain_id", "token"),
        "Amount attested, in the token's smallest unit; rounded to a float, exact in `assay status`.",
    ),
    Told("assay_deliveries", "gauge", ("stage",), "Deliveries to webhooks by stage."),
    Told(
        "assay_request_seconds",
        "histogram",
        ("method", "route", "status"),
        "Requests that this API process answered, streams left out.",
    ),
)
_BY_NAME = {told.name: told for told in TOLD}


class Requests:
    """ASGI middleware: times requests by the template of their route, so that ids make no series."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        told = _BY_NAME["assay_request_seconds"]
        self._app = app
        self._seconds = Histogram(told.name, told.text, told.labels, buckets=BUCKETS, registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def seen(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, seen)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            if route != STREAM:
                self._seconds.labels(scope["method"], route, str(status)).observe(time.perf_counter() - started)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(door: Here, _: Scraper) -> Response:
    """Prometheus text format."""
    registry = CollectorRegistry()
    registry.register(_Record(door))
    content = generate_latest(registry) + generate_latest(door.registry)
    return Response(content, media_type=CONTENT_TYPE_LATEST)


class _Record(Collector):
    def __init__(self, door: Door) -> None:
        self._door, self._figures = door, Figures(door.store.database)

    def describe(self) -> list[Metric]:
        return []  # asked for at each scrape only

    def collect(self) -> Iterator[Metric]:
        figures, totals = self._figures, self._figures.totals()
        yield _metric("assay_tasks", [((stage,), number) for stage, number in figures.stages().items()])
        yield _metric("assay_verdicts_total", [((v, reason), n) for v, reason, n in figures.verdicts()])
        seconds = [((label,), value) for (name, label), value in totals.items() if name == "check_seconds"]
        yield _metric("assay_check_seconds_total", seconds)
        since = figures.waiting_since()
        yield _metric("assay_queue_age_seconds", [((), 0.0 if since is None else self._door.clock() - since)])
        yield _metric("assay_queue_jobs", self._queues(self._door.queue.length))
        yield _metric("assay_workers", self._queues(self._door.queue.workers))
        for name, total in (("proofs", "assay_proofs_total"), ("proof_bytes", "assay_proof_bytes_total")):
            yield _metric(total, [((), totals.get((name, ""), 0.0))])
        yield _metric("assay_lease_losses_total", [((), totals.get(("lease_losses", ""), 0.0))])
        attested = [((str(chain), token), float(sum_)) for (chain, token), sum_ in figures.attested().items()]
        yield _metric("assay_attested_amount", attested)
        yield _metric("assay_deliveries", [((stage,), number) for stage, number in figures.deliveries().items()])

    def _queues(self, read: Callable[[str], int]) -> list[tuple[tuple[str, ...], float]]:
        try:
            return [((queue,), read(queue)) for queue in (TASKS, DELIVERIES)]
        except Unavailable:
            return []


def _metric(name: str, samples: Sequence[tuple[Sequence[str], float]]) -> Metric:
    told = _BY_NAME[name]
    made: Any = CounterMetricFamily if told.kind == "counter" else GaugeMetricFamily
    family: Metric = made(name.removesuffix("_total"), told.text, labels=told.labels)
    for labels, value in samples:
        family.add_metric(list(labels), value)  # type: ignore[attr-defined]
    return family


def table() -> str:
    """All metrics as the README shows them."""
    rows = [f"| `{t.name}` | {t.kind} | {', '.join(t.labels)} | {t.text} |" for t in TOLD]
    return "\n".join(["| metric | kind | labels | |", "|---|---|---|---|", *rows])
