"""What stands behind the routes, and how a route reaches it."""

import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Path, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry

from api import limits
from api.caller import Caller, Keyring, may_see
from api.listening import Listening
from api.problems import Code, Problem
from api.rates import Rates
from api.schemas import HEX64
from proof.encoding import parse
from proof.errors import Unavailable
from verifier.blobs import Blobs, Upload
from verifier.inspector import Inspector
from verifier.library import Library
from verifier.lifecycle import TRANSITIONS, Event
from verifier.logs import say
from verifier.queue import JUDGE, TaskQueue
from verifier.settings import Settings
from verifier.store import Store
from verifier.summaries import Summary

BELIEVED = 0.5  # seconds that a count of tasks in work is believed
BUSY_SECONDS = 5  # that a caller is asked to wait when there are too many

log = logging.getLogger(__name__)


@dataclass
class Door:
    settings: Settings
    store: Store
    blobs: Blobs
    library: Library
    queue: TaskQueue
    inspector: Inspector
    signer: str | None  # address of the attester, where this process knows it
    clock: Callable[[], float]
    listening: Listening = field(init=False)
    keyring: Keyring = field(init=False)
    rates: Rates = field(init=False)
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)  # what this process counts itself
    _backlog: tuple[float, int] = (0.0, 0)  # how many tasks were in work, and until when that is believed

    def __post_init__(self) -> None:
        self.listening = Listening(self.store.database)
        self.keyring = Keyring(self.store.database)
        self.rates = Rates(self.settings)

    def task(self, task: str) -> Summary:
        """The task as it stands now, past its deadline lapsed. Raises Problem if there is none."""
        found = self.store.task(task)
        if found is None:
            raise Problem(Code.TASK_UNKNOWN, f"no task {task}")
        now = self.clock()
        if found.task.stage in TRANSITIONS[Event.LAPSE].sources and found.task.deadline < now:
            self.store.lapse(now)
            return self.task(task)
        return found

    def seen(self, task: str, caller: Caller) -> Summary:
        """The task, if this caller may see it; for others there is none."""
        found = self.task(task)
        may_see(caller, found)
        return found

    def admit(self) -> None:
        """Raise Problem while more tasks are in work than are to be."""
        now = self.clock()
        if not self._backlog[0] - BELIEVED <= now < self._backlog[0]:
            self._backlog = (now + BELIEVED, self.store.backlog())
        if self._backlog[1] >= self.settings.backlog:
            wait = {"Retry-After": str(BUSY_SECONDS)}
            raise Problem(Code.QUEUE_FULL, f"{self._backlog[1]} tasks are being checked", wait)

    def ask(self, model: str) -> None:
        """Have a model's tasks judged. If the queue is away the sweep asks again: the record is what counts."""
        try:
            self.queue.put(JUDGE, model)
        except Unavailable as failure:
            say(log, "queue.away", logging.WARNING, model=model, reason=str(failure))


def _door(request: Request) -> Door:
    door: Door = request.app.state.door
    return door


class BoundedRequest(Request):
    async def json(self) -> object:
        """The body, its nesting bounded before Python's parser recurses into it."""
        return parse(await self.body(), "body", limits.MAX_JSON_BYTES)


class BoundedRoute(APIRoute):
    """A route that parses JSON as our own decoders do."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handle(BoundedRequest(request.scope, request.receive))

        return bounded


Here = Annotated[Door, Depends(_door)]
TaskId = Annotated[str, Path(pattern=HEX64, description="Digest of the task.")]


async def receive(request: Request, upload: Upload) -> None:
    """Stream a request's body to disk."""
    async for chunk in request.stream():
        upload.write(chunk)
