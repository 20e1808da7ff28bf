"""What stands behind the routes, and how a route reaches it."""

import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Path, Request, Response
from fastapi.routing import APIRoute

from api import limits
from api.problems import Code, Problem
from api.schemas import HEX64
from proof.encoding import parse
from proof.errors import Unavailable
from verifier.blobs import Blobs, Upload
from verifier.library import Library
from verifier.lifecycle import TRANSITIONS, Event
from verifier.queue import TaskQueue
from verifier.store import Store, Summary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Door:
    store: Store
    blobs: Blobs
    library: Library
    queue: TaskQueue
    signer: str | None  # address of the attester, where this process knows it
    clock: Callable[[], float]

    def task(self, task: str) -> Summary:
        """The task as it stands now, past its deadline expired. Raises Problem if there is none."""
        found = self.store.task(task)
        if found is None:
            raise Problem(Code.TASK_UNKNOWN, f"no task {task}")
        now = self.clock()
        if found.task.stage in TRANSITIONS[Event.EXPIRE].sources and found.task.deadline < now:
            self.store.expire(now)
            return self.task(task)
        return found

    def ask(self, task: str, attempt: int) -> None:
        """Have a task judged. If the queue is away the sweep asks again: the record is what counts."""
        try:
            self.queue.put(task, attempt)
        except Unavailable as failure:
            log.warning("not enqueued task=%s: %s", task, failure)


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
