"""What answers have in common: entity tags, waiting for a change, and the answer that a repeated request gets again."""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Annotated, Any

from blake3 import blake3
from fastapi import Header, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from api.door import Door
from verifier import idempotency
from verifier.lifecycle import FINAL
from verifier.summaries import Summary

MAX_WAIT = 60  # seconds that a request may ask to wait
MAX_KEY = 255  # characters of an Idempotency-Key
LOOK_SECONDS = 1.0  # after which a waiting request looks again, whatever it was told

Prefer = Annotated[
    str | None,
    Header(description=f"`wait=N`: answer when the task has come to its end, or after N seconds, {MAX_WAIT} at most."),
]
IfNoneMatch = Annotated[str | None, Header(description="Answer 304 if the ETag is still this one.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=MAX_KEY,
        pattern="^[\\x21-\\x7e]+$",
        description="The same key and body within a day gets the same answer.",
        examples=["8e03978e-40d5-43dd-bc93-6894a57f9324"],
    ),
]

_WAIT = re.compile(r"(?:^|[,;\s])wait=(\d{1,6})(?:$|[,;\s])")


def tagged(request: Request, body: object) -> Response:
    """JSON under its ETag; 304 where the caller has it already."""
    answer = JSONResponse(body)
    tag = f'"{blake3(answer.body).hexdigest()[:32]}"'
    answer.headers["ETag"] = tag
    known = [entry.strip().removeprefix("W/") for entry in request.headers.get("if-none-match", "").split(",")]
    if tag in known or "*" in known:
        return Response(status_code=304, headers={"ETag": tag})
    return answer


async def awaited(door: Door, prefer: str | None, look: Callable[[], Summary]) -> Summary:
    """A task once it has come to its end, or as it stands when the time that `Prefer: wait` gives is over."""
    asked = _WAIT.search(prefer or "")
    until = asyncio.get_running_loop().time() + (min(int(asked[1]), MAX_WAIT) if asked else 0)
    while True:
        found = await run_in_threadpool(look)
        left = until - asyncio.get_running_loop().time()
        if found.task.stage in FINAL or left <= 0 or door.listening.ended:
            return found
        await door.listening.changed(found.task.id, min(left, LOOK_SECONDS))


def repeated(
    door: Door, tenant: str, key: str | None, request: Request, body: BaseModel, carry_out: Callable[[], JSONResponse]
) -> Response:
    """The answer to a request, kept under its Idempotency-Key if it has one. One that fails is not kept."""
    if key is None:
        return carry_out()
    asked = json.dumps([request.method, request.url.path, body.model_dump(mode="json")], sort_keys=True)
    database, digest = door.store.database, blake3(asked.encode()).hexdigest()
    known = idempotency.begin(database, tenant, key, digest, door.clock())
    if known:
        again: dict[str, Any] = known.headers | {"Idempotent-Replayed": "true"}
        return Response(known.body, known.status, again, "application/json")
    try:
        answer = carry_out()
    except BaseException:
        idempotency.give_up(database, tenant, key)
        raise
    kept = {name: answer.headers[name] for name in ("location",) if name in answer.headers}
    idempotency.finish(database, tenant, key, idempotency.Answer(answer.status_code, kept, bytes(answer.body).decode()))
    return answer
