"""Webhooks: where a tenant has the stages of its tasks told to, what was sent there, and sending it again."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from api.answers import IdempotencyKey, repeated
from api.caller import Poster, Tenant
from api.door import BoundedRoute, Door, Here
from api.limits import MAX_LISTED
from api.problems import Code, Problem
from api.schemas import HEX64, Body, Digest, StageName
from verifier import webhooks
from verifier.destinations import MAX_URL_BYTES, Destinations, Refused
from verifier.lifecycle import Stage
from verifier.outbox import WAITING
from verifier.tables import WebhookRow
from verifier.webhooks import Sent, TooMany

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], route_class=BoundedRoute)

CURSOR = "^[0-9]{1,18}\\.[0-9a-f]{64}$"

Stages = Annotated[
    list[StageName],
    Field(max_length=len(Stage), description="That are told; none: all.", examples=[["attested", "expired"]]),
]
Url = Annotated[str, Field(max_length=MAX_URL_BYTES, examples=["https://example.com/assay"])]
Id = Annotated[str, Field(pattern="^[0-9a-f]{32}$", examples=["3c" * 16])]
WebhookId = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]
DeliveryId = Annotated[str, Path(pattern=HEX64)]


class NewWebhook(Body):
    url: Url
    stages: Stages = []


class Webhook(Body):
    id: Id
    url: Url
    stages: Stages
    created: float


class WebhookList(Body):
    webhooks: list[Webhook]


class WebhookSecret(Webhook):
    secret: Annotated[
        str,
        Field(
            description="Signs deliveries, as Standard Webhooks has it. It is not shown again.",
            examples=["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
        ),
    ]


class Delivery(Body):
    """One event on its way to one webhook."""

    id: Digest
    event: int
    task: Digest
    told: Annotated[StageName, Field(description="The stage of the task that is told.")]
    stage: Annotated[Literal["waiting", "delivered", "failed"], Field(description="Of the delivery.")]
    attempts: int
    due: Annotated[float | None, Field(description="When it is tried next, while it waits.")]
    status: Annotated[int | None, Field(description="Of the last answer.", examples=[204])]
    detail: Annotated[str | None, Field(description="Why the last attempt failed.")]
    created: float


class DeliveryList(Body):
    deliveries: list[Delivery]
    next: Annotated[str | None, Field(description="The cursor of the next page; null: this is the last one.")]


@router.post("", response_model=WebhookSecret, status_code=201)
def add(
    body: NewWebhook, request: Request, door: Here, tenant: Poster, idempotency_key: IdempotencyKey = None
) -> Response:
    """Have stages told to a URL by signed POST requests. The answer alone shows the secret that signs them."""
    return repeated(door, tenant.name, idempotency_key, request, body, lambda: _add(body, door, tenant))


@router.get("", response_model=WebhookList)
def listed(door: Here, tenant: Poster) -> JSONResponse:
    """The tenant's webhooks, the oldest first."""
    return JSONResponse({"webhooks": [_shown(row) for row in webhooks.listed(door.store.database, tenant.name)]})


@router.delete("/{webhook}", status_code=204)
def remove(webhook: WebhookId, door: Here, tenant: Poster) -> Response:
    """Remove a webhook: what waits for it is not sent any more."""
    if webhooks.remove(door.store.database, tenant.name, webhook, door.clock()) is None:
        raise _unknown(webhook)
    return Response(status_code=204)


@router.get("/{webhook}/deliveries", response_model=DeliveryList)
def deliveries(
    webhook: WebhookId,
    door: Here,
    tenant: Poster,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 100,
    cursor: Annotated[str | None, Query(pattern=CURSOR, description="`next` of the page before.")] = None,
) -> JSONResponse:
    """What was sent to a webhook, or waits to be, of the newest event first."""
    _own(door, tenant, webhook)
    before = None
    if cursor is not None:
        event, id_ = cursor.split(".")
        before = int(event), id_
    found = webhooks.deliveries(door.store.database, webhook, limit + 1, before)
    last = found[limit - 1].delivery if len(found) > limit else None
    following = f"{last.event}.{last.id}" if last else None
    return JSONResponse({"deliveries": [_told(sent) for sent in found[:limit]], "next": following})


@router.post("/{webhook}/deliveries/{delivery}/replay", response_model=Delivery, status_code=202)
def replay(webhook: WebhookId, delivery: DeliveryId, door: Here, tenant: Poster) -> JSONResponse:
    """Send an event once more, by a delivery of its own, whatever became of this one."""
    _own(door, tenant, webhook)
    again = webhooks.replay(door.store.database, webhook, delivery, door.clock())
    if again is None:
        raise Problem(Code.WEBHOOK_UNKNOWN, f"no delivery {delivery} to webhook {webhook}")
    return JSONResponse(_told(again), 202)


def _add(body: NewWebhook, door: Door, tenant: Tenant) -> JSONResponse:
    try:
        url = str(Destinations(door.settings.webhook_networks).url(body.url))
        row = webhooks.add(door.store.database, tenant.name, url, [Stage(name) for name in body.stages], door.clock())
    except Refused as error:
        raise Problem(Code.WEBHOOK_REFUSED, str(error)) from error
    except TooMany as error:
        raise Problem(Code.WEBHOOK_MANY, str(error)) from error
    return JSONResponse(_shown(row) | {"secret": row.secret}, 201)


def _own(door: Door, tenant: Tenant, webhook: str) -> None:
    if webhooks.find(door.store.database, tenant.name, webhook) is None:
        raise _unknown(webhook)


def _unknown(webhook: str) -> Problem:
    return Problem(Code.WEBHOOK_UNKNOWN, f"no webhook {webhook}")


def _shown(row: WebhookRow) -> dict[str, object]:
    return {"id": row.id, "url": row.url, "stages": row.stages, "created": row.created}


def _told(sent: Sent) -> dict[str, object]:
    row = sent.delivery
    return {
        "id": row.id,
        "event": row.event,
        "task": sent.event.task,
        "told": sent.event.stage,
        "stage": row.stage,
        "attempts": row.attempts,
        "due": row.due if row.stage == WAITING else None,
        "status": row.status,
        "detail": row.detail,
        "created": row.created,
    }
