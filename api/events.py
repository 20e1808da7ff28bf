"""Events as they happen, over server-sent events: every stage of the tenant's tasks, from any number on."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from api.caller import Poster
from api.door import Here
from api.schemas import HEX64
from verifier.events import Told

router = APIRouter(tags=["events"])

MEDIA_TYPE = "text/event-stream"
RETRY_MILLISECONDS = 1000  # after which a browser comes back
STREAM_SECONDS = 900.0  # after which a caller has to come back, and to be who it was
STALLED_SECONDS = 30.0  # that a stream may last longer, because its reader does not read
NUMBER = "^[0-9]{1,18}$"
EXAMPLE = 'id: 7\nevent: task.posted\ndata: {"event": 7, "task": "' + "5f" * 32 + '", "stage": "posted", …}\n\n'


class EventStream(StreamingResponse):
    """Sends events until they end, or the reader is gone or stands still."""

    media_type = MEDIA_TYPE

    def __init__(self, told: AsyncGenerator[Told | None, None]) -> None:
        self._lines = _lines(told)
        super().__init__(self._lines, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._lines):
            with suppress(TimeoutError):
                async with asyncio.timeout(STREAM_SECONDS + STALLED_SECONDS):
                    await super().__call__(scope, receive, send)


async def _seat(door: Here, tenant: Poster) -> AsyncIterator[None]:
    with door.listening.seat(tenant.name):
        yield


@router.get(
    "/v1/events",
    status_code=200,
    response_class=EventStream,
    responses={
        200: {"description": "Events", "content": {MEDIA_TYPE: {"schema": {"type": "string"}, "example": EXAMPLE}}}
    },
    dependencies=[Depends(_seat)],
)
async def listen(
    door: Here,
    tenant: Poster,
    task: Annotated[str | None, Query(pattern=HEX64, description="Only events of this task.")] = None,
    after: Annotated[
        str | None, Query(pattern=NUMBER, description="Begin after the event of this number; without: with the next.")
    ] = None,
    last_event_id: Annotated[
        str | None, Header(pattern=NUMBER, description="As `after`, which it overrides: sent by who comes back.")
    ] = None,
) -> EventStream:
    """Server-sent events: `id` is the event's number, `event` is `task.<stage>`, `data` is JSON.

    A comment every 15 s shows that the stream is alive. It ends after a quarter of an hour, when the service stops, and
    for who reads too slowly: come back with Last-Event-ID, and nothing is missed.
    """
    if task is not None:
        await run_in_threadpool(door.seen, task, tenant)
    start = last_event_id or after
    scope = None if tenant.admin else tenant.name
    return EventStream(door.listening.events(scope, int(start) if start else None, task))


async def _lines(told: AsyncGenerator[Told | None, None]) -> AsyncGenerator[bytes, None]:
    until = asyncio.get_running_loop().time() + STREAM_SECONDS
    yield f"retry: {RETRY_MILLISECONDS}\n\n".encode()
    async with aclosing(told):
        async for event in told:
            yield _line(event) if event else b":\n\n"
            if asyncio.get_running_loop().time() > until:
                return


def _line(event: Told) -> bytes:
    return f"id: {event.number}\nevent: {event.kind}\ndata: {json.dumps(event.to_json())}\n\n".encode()
