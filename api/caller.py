"""Who calls: a tenant by its API key, or a worker by its signature on this very request."""

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from fastapi import Depends, Header, Request
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from api import problems
from api.problems import Code, Problem
from api.schemas import HEX64
from proof import encoding
from proof.digest import DIGEST_BYTES
from proof.errors import Failure, Malformed, Rejected
from proof.messages import SIGNATURE_BYTES, Task
from proof.requests import LEEWAY_SECONDS, MAX_REQUEST_SECONDS, NOTHING, Action, WorkerRequest, verify_request
from verifier import tenants
from verifier.database import Database
from verifier.summaries import Summary

if TYPE_CHECKING:
    from api.door import Door

BELIEVED_SECONDS = 60.0  # that a key which was found is not looked up again
KNOWN_KEYS = 4096
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="assay"'}
WORKER_HEADERS = ("Assay-Worker", "Assay-Expires", "Assay-Signature")
COOKIE = "assay_key"  # the same key, for the pages alone


@dataclass(frozen=True)
class Tenant:
    name: str
    key: str  # id of the API key
    scopes: tuple[str, ...]

    @property
    def admin(self) -> bool:
        return tenants.ADMIN in self.scopes


@dataclass(frozen=True)
class Worker:
    address: str


Caller = Tenant | Worker


class Keyring:
    """Keys that were found lately, by the digest of their token, so that a request does not cost a query."""

    def __init__(self, database: Database) -> None:
        self._database, self._lock = database, Lock()
        self._known: OrderedDict[bytes, tuple[float, Tenant]] = OrderedDict()

    def tenant(self, token: str, now: float) -> Tenant:
        """Raises Problem for what is no key."""
        digest = sha256(token.encode(errors="replace")).digest()
        with self._lock:
            until, tenant = self._known.get(digest, (0.0, None))
        if tenant and now < until <= now + BELIEVED_SECONDS:
            return tenant
        try:
            row = tenants.find(self._database, token, now)
        except Rejected as rejection:
            raise Problem(Code.CALLER_UNKNOWN, rejection.detail, CHALLENGE) from rejection
        tenant = Tenant(row.tenant, row.id, tuple(row.scopes))
        until = min(now + BELIEVED_SECONDS, row.expires or now + BELIEVED_SECONDS)
        with self._lock:
            self._known[digest] = until, tenant
            while len(self._known) > KNOWN_KEYS:
                self._known.popitem(last=False)
        return tenant


def tenant_with(scope: str) -> Callable[[Request], Tenant]:
    """A dependency that gives the tenant of an API key with this scope."""

    def tenant(request: Request) -> Tenant:
        found = _tenant(request)
        if scope not in found.scopes and not found.admin:
            raise Problem(Code.SCOPE_MISSING, f"the API key has the scopes {', '.join(found.scopes)}, not {scope}")
        return found

    return tenant


def signed_by(request: Request, door: "Door", action: Action, task: Task | bytes) -> tuple[str, bytes]:
    """The worker who signed this request for this action, and the digest of what it says it sends.

    A task gives the domain; an id alone is to be read. Raises Problem; the Host header is not believed, the origins are
    the settings'.
    """
    head = _head(request, door)
    id_, reward = (task.id(), task.reward) if isinstance(task, Task) else (task, None)
    for origin in door.settings.origins:
        try:
            asked = WorkerRequest(origin, action, id_, head.content, head.expires)
            verify_request(asked, reward, head.signature, head.worker)
        except Rejected:
            continue
        door.rates.spend("key", head.worker)
        return head.worker, head.content
    what = f"{action} of task {id_.hex()} at {' or '.join(door.settings.origins)}"
    raise Problem(Code.SIGNATURE, f"the request is not signed by {head.worker} for {what}")


class _Head(NamedTuple):
    worker: str
    expires: int
    content: bytes
    signature: bytes


def _head(request: Request, door: "Door") -> _Head:
    """Raises Problem when a worker's request lacks its headers, or is not of this time."""
    given = {name: request.headers.get(name) for name in WORKER_HEADERS}
    if None in given.values():
        raise Problem(Code.CALLER_UNKNOWN, f"send {', '.join(WORKER_HEADERS)}", CHALLENGE)
    worker, expiry, signature = given.values()
    try:
        head = _Head(
            encoding.address(worker, "Assay-Worker"),
            encoding.decimal(expiry, "Assay-Expires", 53),
            encoding.prefixed(
                request.headers.get("Assay-Content", "0x" + NOTHING.hex()), "Assay-Content", DIGEST_BYTES
            ),
            encoding.prefixed(signature, "Assay-Signature", SIGNATURE_BYTES),
        )
    except Malformed as error:
        raise Problem(Code.SIGNATURE, str(error)) from error
    left = head.expires - door.clock()
    if not -LEEWAY_SECONDS <= left <= MAX_REQUEST_SECONDS + LEEWAY_SECONDS:
        raise Problem(Code.REQUEST_EXPIRED, f"it expires in {left:.0f} s by our clock; at most {MAX_REQUEST_SECONDS}")
    return head


class KnownCaller:
    """ASGI middleware: a request under /v1 that nobody can have meant is refused before its body is read.

    An API key must be one; a worker's signature is verified by the route, which knows what was to be signed.
    """

    def __init__(self, app: ASGIApp, door: "Door") -> None:
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            request = Request(scope)
            try:
                if "Assay-Worker" in request.headers:
                    _head(request, self._door)
                else:
                    await run_in_threadpool(_tenant_of, request, self._door)
            except (Problem, Failure) as failure:
                headers = {"Connection": "close", **(getattr(failure, "headers", None) or {})}
                told = problems.answer(problems.code_of(failure), problems.detail_of(failure), headers)
                await told(scope, receive, send)
                return
        await self._app(scope, receive, send)


def may_see(caller: Caller, found: Summary) -> None:
    """Raises Problem as if there were no such task."""
    row = found.task
    if isinstance(caller, Tenant):
        visible = caller.admin or row.tenant == caller.name
    else:
        free = row.worker is None and row.stage == "posted"
        visible = free or caller.address in (row.worker, found.worker)
    if not visible:
        raise Problem(Code.TASK_UNKNOWN, f"no task {row.id}")


def scope_of(caller: Caller) -> dict[str, Any]:
    """The members of a Filter that leave what the caller may see."""
    if isinstance(caller, Worker):
        return {"worker": caller.address}
    return {} if caller.admin else {"tenant": caller.name}


def _tenant(request: Request) -> Tenant:
    door = request.app.state.door
    tenant = _tenant_of(request, door)
    door.rates.spend("key", tenant.key)
    return tenant


def _tenant_of(request: Request, door: "Door") -> Tenant:
    kind, _, token = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() != "bearer":
        raise Problem(Code.CALLER_UNKNOWN, "send an API key: Authorization: Bearer assay_…", CHALLENGE)
    return door.keyring.tenant(token.strip(), door.clock())


def _anybody(request: Request) -> Caller:
    """A tenant that may read tasks, or the worker who signed to read this one, or to list."""
    if "Assay-Worker" not in request.headers:
        return tenant_with(tenants.TASKS)(request)
    task = str(request.path_params.get("task", ""))
    action, id_ = (Action.READ, bytes.fromhex(task)) if re.fullmatch(HEX64, task) else (Action.LIST, NOTHING)
    return Worker(signed_by(request, request.app.state.door, action, id_)[0])


def _signing(
    assay_worker: Annotated[
        str | None, Header(description="The worker's address.", examples=["0x" + "9a" * 20])
    ] = None,
    assay_expires: Annotated[str | None, Header(description="Unix seconds.", examples=["1790000300"])] = None,
    assay_content: Annotated[
        str | None, Header(description="Digest of the commitment or proof file.", examples=["0x" + "5f" * 32])
    ] = None,
    assay_signature: Annotated[
        str | None, Header(description="EIP-712 WorkerRequest of this request.", examples=["0x" + "1b" * 65])
    ] = None,
) -> None:
    """Shows the headers in the document; `signed_by` reads them."""


Signing = Annotated[None, Depends(_signing)]
Reader = Annotated[Caller, Depends(_anybody)]
Poster = Annotated[Tenant, Depends(tenant_with(tenants.TASKS))]
Registrar = Annotated[Tenant, Depends(tenant_with(tenants.MODELS))]
Scraper = Annotated[Tenant, Depends(tenant_with(tenants.METRICS))]
