"""The pages for people: tasks and verdicts as they come, what each check saw, and the record of every worker.

They are whole without JavaScript; static/live.js asks for the same page again and shows what has changed. A cookie
that only these pages read holds an API key.
"""

import re
from collections.abc import Callable, Coroutine
from math import isfinite
from typing import Annotated, Any
from urllib.parse import parse_qs

from blake3 import blake3
from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.routing import APIRoute

from api import pictures, typesetting
from api.caller import COOKIE, Tenant, scope_of
from api.door import Door, Here, TaskId
from api.problems import KINDS, Code, Problem, code_of
from proof.errors import Failure, Malformed
from verifier import nodes
from verifier.board import LATEST, board, timeline
from verifier.lifecycle import FINAL, Stage
from verifier.nodes import NodeRecord
from verifier.summaries import Filter, Place, Summary
from verifier.tables import VerdictRow
from verifier.tenants import TASKS
from verifier.trail import unpacked

MAX_FORM_BYTES = 4096
LISTED, LISTED_NODES, RECENT = 25, 50, 25  # on a page
ANY_ADDRESS = "^0x[0-9a-f]{40}$"
POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
GUARDS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with none, browsers name no origin in forms either
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LASTING = "private, max-age=31536000, immutable"  # the address of a static file changes with the file

_PLACE = re.compile(r"(\d{1,12}(?:\.\d{1,20})?)_([0-9a-f]{64})")


class PageRoute(APIRoute):
    """What a browser may do with a page, and failures in words; whoever is not known is asked to sign in."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def paged(request: Request) -> Response:
            try:
                response = await handle(request)
            except RequestValidationError:
                response = _failed(Code.ROUTE_UNKNOWN, "There is no such page.")
            except (Problem, Failure) as failure:
                response = _failed(code_of(failure), str(failure))
            for name, value in GUARDS.items():
                response.headers.setdefault(name, value)
            return response

        return paged


router = APIRouter(route_class=PageRoute, include_in_schema=False)


def _visitor(request: Request, door: Here) -> Tenant:
    """Whose API key the cookie holds."""
    return _tenant(door, request.cookies.get(COOKIE, ""))


def _tenant(door: Door, token: str) -> Tenant:
    found = door.keyring.tenant(token, door.clock())
    door.rates.spend("key", found.key)
    if TASKS not in found.scopes and not found.admin:
        raise Problem(Code.SCOPE_MISSING, f"This API key does not have the scope {TASKS}: it may not see tasks.")
    return found


Visitor = Annotated[Tenant, Depends(_visitor)]
Address = Annotated[str, Path(pattern=ANY_ADDRESS)]


@router.get("/login")
def sign_in(request: Request) -> Response:
    return _sheet(request, "login.html", wrong=False)


@router.post("/login")
async def signed_in(request: Request, door: Here) -> Response:
    _own_form(request, door)
    form = bytearray()
    async for chunk in request.stream():
        form += chunk
        if len(form) > MAX_FORM_BYTES:
            raise Problem(Code.TOO_LARGE, f"The form has more than {MAX_FORM_BYTES} bytes.")
    token = parse_qs(form.decode("latin-1")).get("key", [""])[0].strip()
    try:
        _tenant(door, token)
    except Problem as problem:
        if problem.code is not Code.CALLER_UNKNOWN:
            raise
        return HTMLResponse(typesetting.page("login.html", wrong=True, visitor=None), 401)
    answer = RedirectResponse("/", 303)
    secure = request.url.scheme == "https"
    answer.set_cookie(COOKIE, token, path="/", httponly=True, samesite="strict", secure=secure)
    return answer


@router.post("/logout")
def sign_out(request: Request, door: Here) -> Response:
    _own_form(request, door)
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return answer


@router.get("/")
def tasks(
    request: Request,
    door: Here,
    visitor: Visitor,
    stage: Stage | None = None,
    before: Annotated[str | None, Query(max_length=100)] = None,
) -> Response:
    """How many tasks are where, what became of them, and the latest."""
    wanted = Filter(**scope_of(visitor), stage=stage, after=_place(before) if before else None, newest=True)
    found = door.store.tasks(LISTED + 1, wanted)
    older = _cursor(found[LISTED - 1]) if len(found) > LISTED else None
    return _sheet(
        request,
        "tasks.html",
        visitor=visitor,
        now=door.clock(),
        board=board(door.store.database, wanted.tenant),
        latest=LATEST,
        tasks=found[:LISTED],
        stage=stage,
        older=older,
        paged=before is not None,
    )


@router.get("/tasks/{task}")
def task(task: TaskId, request: Request, door: Here, visitor: Visitor) -> Response:
    """One task: what was asked, what happened when, and what its check saw."""
    summary = door.seen(task, visitor)
    store = door.store
    attestation = store.attestation_of(task)
    return _sheet(
        request,
        "task.html",
        visitor=visitor,
        now=door.clock(),
        task=summary,
        asked=summary.task.document,
        past=_past(timeline(store.database, task)),
        commitment=store.commitment(task),
        attestation=attestation and attestation.document,
        final=summary.task.stage in FINAL,
        **_check(store.verdict(task)),
    )


@router.get("/nodes")
def workers(
    request: Request, door: Here, visitor: Visitor, after: Annotated[str, Query(pattern=f"^$|{ANY_ADDRESS}")] = ""
) -> Response:
    """The record of every worker."""
    found = nodes.records(door.store.database, LISTED_NODES + 1, after)
    more = found[LISTED_NODES - 1].worker if len(found) > LISTED_NODES else None
    return _sheet(
        request,
        "nodes.html",
        visitor=visitor,
        now=door.clock(),
        nodes=found[:LISTED_NODES],
        more=more,
        paged=bool(after),
    )


@router.get("/nodes/{address}")
def worker(address: Address, request: Request, door: Here, visitor: Visitor) -> Response:
    """The record of one worker, and of its tasks those that the visitor may see."""
    database = door.store.database
    recent = nodes.recent(database, address, scope_of(visitor).get("tenant"), RECENT)
    record = nodes.record(database, address)
    if record is None and not recent:
        raise Problem(Code.ROUTE_UNKNOWN, f"There is no record of {address}.")
    return _sheet(
        request,
        "node.html",
        visitor=visitor,
        now=door.clock(),
        node=record or NodeRecord(address),
        tasks=recent,
    )


@router.get("/static/{name}")
def static(name: str) -> Response:
    if name not in typesetting.STATIC:
        raise Problem(Code.ROUTE_UNKNOWN, "There is no such file.")
    kind = typesetting.MEDIA_TYPES[name.rpartition(".")[2]]
    return Response(typesetting.STATIC[name], media_type=kind, headers={"Cache-Control": LASTING})


def _sheet(request: Request, template: str, **values: Any) -> Response:
    """A page, or that it is still the same."""
    text = typesetting.page(template, **({"visitor": None} | values)).encode()
    tag = f'"{blake3(text).hexdigest(16)}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={"ETag": tag})
    return HTMLResponse(text, headers={"ETag": tag})


def _failed(code: Code, detail: str) -> Response:
    if code is Code.CALLER_UNKNOWN:
        return RedirectResponse("/login", 303)
    kind = KINDS[code]
    return HTMLResponse(typesetting.page("problem.html", visitor=None, kind=kind, detail=detail), kind.status)


def _own_form(request: Request, door: Door) -> None:
    """Raises Problem for a form that another site sent."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    here = {*door.settings.origins, f"{request.url.scheme}://{request.url.netloc}"}
    if site not in (None, "same-origin", "none") or (site is None and origin is not None and origin not in here):
        raise Problem(Code.SCOPE_MISSING, "The form was sent from another site.")


def _check(row: VerdictRow | None) -> dict[str, Any]:
    """What a task's page shows of its check."""
    if row is None:
        return {"verdict": None, "trail": None, "picture": None, "largest": [], "strips": [], "families": []}
    trail = unpacked(row.trail) if row.trail else None
    seen = trail["nodes"] if trail else []
    return {
        "verdict": row.document,
        "seconds": row.seconds,
        "trail": trail,
        "picture": pictures.picture(seen) if seen else None,
        "largest": pictures.largest(seen),
        "strips": pictures.strips(trail["draws"]) if trail else [],
        "families": pictures.families(seen, row.document, trail["seconds"] if trail else {}),
    }


def _past(events: list[tuple[Stage, float]]) -> list[tuple[Stage, float, float | None]]:
    """Stages, when they were reached, and seconds since the one before."""
    earlier = [None, *(created for _, created in events)]
    return [
        (stage, created, None if start is None else created - start)
        for (stage, created), start in zip(events, earlier, strict=False)
    ]


def _cursor(summary: Summary) -> str:
    created, task = summary.place
    return f"{created!r}_{task}"


def _place(cursor: str) -> Place:
    found = _PLACE.fullmatch(cursor)
    if not found or not isfinite(float(found[1])):
        raise Malformed("before: not what a page of tasks leads on to")
    return float(found[1]), found[2]
