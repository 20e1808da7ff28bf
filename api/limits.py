"""How large a body may be, counted while it comes in and before anything is made of it."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import problems
from proof.graph import MAX_MODEL_BYTES

MAX_JSON_BYTES = 64 * 2**20
MAX_PROOF_BYTES = 64 * 2**30
MAX_WEIGHTS_BYTES = 64 * 2**30  # of one file; a larger model has several
MAX_LISTED = 500  # tasks in one answer


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
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > limit:
            refusal = problems.answer(problems.Code.TOO_LARGE, f"more than {limit} bytes", {"Connection": "close"})
            await refusal(scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise HTTPException(413, f"more than {limit} bytes", {"Connection": "close"})
            return message

        await self._app(scope, counted, send)
