"""How large a body may be, counted while it comes in and before anything is made of it."""

from collections.abc import Iterable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import problems
from api.problems import Code
from proof.graph import MAX_MODEL_BYTES

MAX_JSON_BYTES = 64 * 2**20
MAX_PROOF_BYTES = 64 * 2**30
MAX_WEIGHTS_BYTES = 64 * 2**30  # of one file; a larger model has several
MAX_LISTED = 500  # tasks in one answer
MAX_HEADERS, MAX_HEADER_BYTES = 100, 64 * 2**10  # of one request


def limit_of(method: str, path: str) -> int:
    if (method, path) == ("POST", "/v1/models"):
        return MAX_MODEL_BYTES
    if method == "PUT" and path.endswith("/proof"):
        return MAX_PROOF_BYTES
    if method == "PUT" and path.startswith("/v1/weights/"):
        return MAX_WEIGHTS_BYTES
    return MAX_JSON_BYTES


class BodyLimit:
    """ASGI middleware: a declared length over the limit is answered at once, an undeclared one when it is passed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit, seen = limit_of(scope["method"], scope["path"]), 0
        refusal = _refusal(scope["headers"], limit)
        if refusal:
            await problems.answer(*refusal, {"Connection": "close"})(scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise HTTPException(413, f"more than {limit} bytes", {"Connection": "close"})
            return message

        await self._app(scope, counted, send)


def _refusal(headers: Iterable[tuple[bytes, bytes]], limit: int) -> tuple[Code, str] | None:
    """What is wrong with a request that nothing more of is read."""
    headers = list(headers)
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        return Code.TOO_LARGE, f"more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them"
    named = dict(headers)
    if named.get(b"content-encoding", b"identity").lower() != b"identity":
        return Code.ENCODING_REFUSED, "Content-Encoding: send the body as it is"
    declared = named.get(b"content-length", b"0")
    if not declared.isdigit() or int(declared) > limit:
        return Code.TOO_LARGE, f"more than {limit} bytes"
    return None
