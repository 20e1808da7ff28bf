"""Failures as RFC 9457 problems: one table of codes, one place that turns what is raised into an answer.

A code is part of the interface: it is never renamed. The table is documented in README.md.
"""

import logging
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from proof.errors import Conflict, Failure, Malformed, Reason, Rejected
from verifier.blobs import TooLarge
from verifier.lifecycle import Expired

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 1
MAX_DETAIL = 2000  # characters
SHOWN_ERRORS = 5  # of a body with many

log = logging.getLogger(__name__)


class Code(StrEnum):
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    BAD_REQUEST = "bad_request"
    TOO_SLOW = "too_slow"
    ENCODING_REFUSED = "encoding.refused"
    CALLER_UNKNOWN = "caller.unknown"
    SCOPE_MISSING = "scope.missing"
    REQUEST_EXPIRED = "request.expired"
    RATE_LIMITED = "rate.limited"
    QUEUE_FULL = "queue.full"
    ROUTE_UNKNOWN = "route.unknown"
    METHOD_REFUSED = "method.refused"
    WEIGHTS_UNKNOWN = "weights.unknown"
    MODEL_UNKNOWN = "model.unknown"
    MODEL_UNREGISTERED = "model.unregistered"
    MODEL_UNVERIFIABLE = "model.unverifiable"
    TASK_UNKNOWN = "task.unknown"
    TASK_INPUTS = "task.inputs"
    TASK_DEADLINE = "task.deadline"
    TASK_EXPIRED = "task.expired"
    COMMITMENT_BINDING = "commitment.binding"
    SIGNATURE = "signature"
    PROOF_SIGNATURE = "proof.signature"
    CONFLICT = "conflict"
    VERDICT_PENDING = "verdict.pending"
    ATTESTATION_PENDING = "attestation.pending"
    ATTESTATION_UNKNOWN = "attestation.unknown"
    OUTPUTS_REFUSED = "outputs.refused"
    WEBHOOK_UNKNOWN = "webhook.unknown"
    WEBHOOK_REFUSED = "webhook.refused"
    WEBHOOK_MANY = "webhook.many"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"


class Kind(NamedTuple):
    status: int
    title: str
    retryable: bool = False


KINDS = {
    Code.MALFORMED: Kind(422, "The message does not decode; the detail names the field"),
    Code.TOO_LARGE: Kind(413, "The body is larger than this service takes"),
    Code.BAD_REQUEST: Kind(400, "The request is not well-formed HTTP or JSON"),
    Code.TOO_SLOW: Kind(408, "The body came too slowly", retryable=True),
    Code.ENCODING_REFUSED: Kind(415, "Send the body as it is: nothing is decompressed here"),
    Code.CALLER_UNKNOWN: Kind(401, "Send an API key (Authorization: Bearer …), or sign the request as a worker"),
    Code.SCOPE_MISSING: Kind(403, "The API key does not have the scope for this"),
    Code.REQUEST_EXPIRED: Kind(403, "The worker's signed request has expired, or is valid for too long: sign it again"),
    Code.RATE_LIMITED: Kind(429, "Too many requests; wait as long as Retry-After says", retryable=True),
    Code.QUEUE_FULL: Kind(429, "Too many tasks wait to be checked; post later", retryable=True),
    Code.ROUTE_UNKNOWN: Kind(404, "There is no such path; see /openapi.json"),
    Code.METHOD_REFUSED: Kind(405, "The path does not take this method"),
    Code.WEIGHTS_UNKNOWN: Kind(404, "No file of weights with this digest was uploaded"),
    Code.MODEL_UNKNOWN: Kind(404, "No model of this id is registered"),
    Code.MODEL_UNREGISTERED: Kind(422, "Register the task's model first: POST /v1/models"),
    Code.MODEL_UNVERIFIABLE: Kind(422, "The model cannot be checked at every node; the detail names the op and node"),
    Code.TASK_UNKNOWN: Kind(404, "There is no task of this id"),
    Code.TASK_INPUTS: Kind(422, "The inputs are not what the model takes"),
    Code.TASK_DEADLINE: Kind(422, "The deadline has passed: post a task with a later one"),
    Code.TASK_EXPIRED: Kind(410, "The task's deadline passed before its proof came"),
    Code.COMMITMENT_BINDING: Kind(422, "The commitment is for another task or model"),
    Code.SIGNATURE: Kind(403, "The signature is not the one of the address that it names"),
    Code.PROOF_SIGNATURE: Kind(403, "A proof is taken from the committed worker only: sign the file's digest"),
    Code.CONFLICT: Kind(409, "The task is at another stage, or has another message here; look at its stage"),
    Code.VERDICT_PENDING: Kind(404, "There is no verdict yet; ask again", retryable=True),
    Code.ATTESTATION_PENDING: Kind(404, "There is no attestation yet; ask again", retryable=True),
    Code.ATTESTATION_UNKNOWN: Kind(404, "There is no attestation of this uid"),
    Code.OUTPUTS_REFUSED: Kind(409, "The proof was rejected: its outputs are worth nothing"),
    Code.WEBHOOK_UNKNOWN: Kind(404, "There is no webhook, or no delivery, of this id"),
    Code.WEBHOOK_REFUSED: Kind(422, "A webhook leads to a public https address; the detail says what is wrong"),
    Code.WEBHOOK_MANY: Kind(409, "There are as many webhooks as a tenant may have: remove one first"),
    Code.UNAVAILABLE: Kind(503, "We cannot tell just now; the same request may be repeated", retryable=True),
    Code.INTERNAL: Kind(500, "A fault of ours, which has been logged"),
}


class Problem(Exception):
    """An answer other than success, by its code."""

    def __init__(self, code: Code, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.code, self.detail, self.headers = code, detail, headers


def answer(code: Code, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    kind = KINDS[code]
    retry = {"Retry-After": str(RETRY_SECONDS)} if kind.retryable else {}
    return JSONResponse(document(code, detail), kind.status, {**retry, **(headers or {})}, MEDIA_TYPE)


def document(code: Code, detail: str) -> dict[str, Any]:
    kind = KINDS[code]
    return {
        "type": f"urn:assay:problem:{code}",
        "title": kind.title,
        "status": kind.status,
        "detail": detail[:MAX_DETAIL],
        "code": str(code),
        "retryable": kind.retryable,
    }


def code_of(failure: Problem | Failure) -> Code:
    """The code of what was raised on purpose."""
    match failure:
        case Problem():
            return failure.code
        case TooLarge():
            return Code.TOO_LARGE
        case Malformed():
            return Code.MALFORMED
        case Rejected():
            return Code.SIGNATURE if failure.reason is Reason.SIGNATURE else Code.COMMITMENT_BINDING
        case Expired():
            return Code.TASK_EXPIRED
        case Conflict():
            return Code.CONFLICT
        case _:
            return Code.UNAVAILABLE


def detail_of(failure: Problem | Failure) -> str:
    return failure.detail if isinstance(failure, Problem | Rejected) else str(failure)


def _told(_: Request, failure: Problem | Failure) -> JSONResponse:
    code = code_of(failure)
    if code is Code.UNAVAILABLE:
        log.warning("unavailable: %s", failure)
    return answer(code, detail_of(failure), failure.headers if isinstance(failure, Problem) else None)


def _invalid(request: Request, failure: RequestValidationError) -> JSONResponse:
    """Names the fields and never repeats what they held."""
    if failure.body is not None and not request.headers.get("content-type", "").startswith("application/json"):
        return answer(Code.MALFORMED, "send the body with Content-Type: application/json")
    errors = [f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in failure.errors()[:SHOWN_ERRORS]]
    return answer(Code.MALFORMED, "; ".join(errors))


def _http(_: Request, failure: HTTPException) -> JSONResponse:
    codes = {404: Code.ROUTE_UNKNOWN, 405: Code.METHOD_REFUSED, 413: Code.TOO_LARGE, 408: Code.TOO_SLOW}
    return answer(codes.get(failure.status_code, Code.BAD_REQUEST), str(failure.detail), failure.headers)


def _bug(request: Request, failure: Exception) -> JSONResponse:
    log.error("bug at %s %s", request.method, request.url.path, exc_info=failure)
    return answer(Code.INTERNAL, "repeat the request later, and report it if it fails again")


def install(app: FastAPI) -> None:
    handlers: dict[type[Exception], Any] = {
        Problem: _told,
        Failure: _told,
        RequestValidationError: _invalid,
        HTTPException: _http,
        Exception: _bug,
    }
    for failure, handler in handlers.items():
        app.add_exception_handler(failure, handler)
