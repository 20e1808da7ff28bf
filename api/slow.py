"""Connections that take their time: a head that does not come, a body that pauses or crawls."""

import asyncio
import time
from asyncio import TimerHandle, Transport
from collections import Counter
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from api import problems

GRACE_SECONDS = 30.0  # before a body's speed is looked at
MIN_BODY_RATE = 10_000.0  # bytes a second, on average after that
MAX_UPLOADS, MAX_UPLOADS_EACH = 64, 32  # bodies that come in at the same time, in one process and from one address


class PatientProtocol(H11Protocol):
    """uvicorn's own, but a connection must have sent the whole head of a request within `head_seconds`."""

    def __init__(self, *arguments: Any, head_seconds: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_seconds, self._timer = head_seconds, None

    _timer: TimerHandle | None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        if self._timer is None and self._between_requests():
            self._wait_for_head()
        super().data_received(data)
        if not self._between_requests():
            self._done()

    def connection_lost(self, exc: Exception | None) -> None:
        self._done()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._done()
        super().on_response_complete()

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait_for_head(self) -> None:
        self._timer = self.loop.call_later(self._head_seconds, self._give_up)

    def _give_up(self) -> None:
        if self._between_requests() and not self.transport.is_closing():
            self.transport.close()

    def _done(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class SteadyBody:
    """ASGI middleware: a body that pauses for `stall` seconds, or crawls, is answered 408 and its connection closed."""

    def __init__(self, app: ASGIApp, stall: float, grace: float = GRACE_SECONDS, rate: float = MIN_BODY_RATE) -> None:
        self._app, self._stall, self._grace, self._rate = app, stall, grace, rate
        self._uploads: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        address = scope["client"][0] if scope.get("client") else ""
        if self._uploads.total() >= MAX_UPLOADS or self._uploads[address] >= MAX_UPLOADS_EACH:
            busy = f"{self._uploads.total()} bodies come in, {self._uploads[address]} from {address}"
            await problems.answer(problems.Code.UNAVAILABLE, busy, _CLOSE)(scope, receive, send)
            return
        self._uploads[address] += 1
        coming = True

        def came() -> None:
            nonlocal coming
            self._uploads[address] -= coming
            coming = False
            if not self._uploads[address]:
                del self._uploads[address]

        try:
            await self._app(scope, self._steady(receive, came), send)
        finally:
            came()

    def _steady(self, receive: Receive, came: Callable[[], None]) -> Receive:
        """`came` is called once the whole body is there: what is made of it takes no place."""
        began, seen, whole = time.monotonic(), 0, False

        async def steady() -> Message:
            nonlocal seen, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._stall)
            except TimeoutError:
                raise HTTPException(408, f"nothing came for {self._stall:.0f} s", _CLOSE) from None
            seen += len(message.get("body", b""))
            lasted = time.monotonic() - began
            if not message.get("more_body", False):
                whole = True
                came()
            elif lasted > self._grace and seen < self._rate * lasted:
                raise HTTPException(408, f"{seen} bytes in {lasted:.0f} s", _CLOSE)
            return message

        return steady


_CLOSE = {"Connection": "close"}


def _has_body(scope: MutableMapping[str, Any]) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])
