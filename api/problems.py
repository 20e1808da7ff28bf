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

from proof.errors import Conflict, Malformed, Reason, Rejected, Unavailable
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
    Code.UNAVAILABLE: Kind(503, "We cannot tell just now; the same request may be repeated", retryable=True),
    Code.INTERNAL: Kind(500, "A fault of ours, which has been logged"),
}


class Problem(Exception):
    """An answer other than success, by its code."""

    def __init__(self, code: Code, detail: str) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail


def answer(code: Code, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    kind = KINDS[code]
    retry = {"Retry-After": str(RETRY_SECONDS)} if kind.retryable else {}
    body = {
        "type": f"urn:assay:problem:{code}",
        "title": kind.title,
        "status": kind.status,
        "detail": detail[:MAX_DETAIL],
        "code": str(code),
        "retryable": kind.retryable,
    }
    return JSONResponse(body, kind.status, {**retry, **(headers or {})}, MEDIA_TYPE)


def _problem(_: Request, problem: Problem) -> JSONResponse:
    return answer(problem.code, problem.detail)


def _malformed(_: Request, failure: Malformed) -> JSONResponse:
    return answer(Code.TOO_LARGE if isinstance(failure, TooLarge) else Code.MALFORMED, str(failure))


def _rejected(_: Request, failure: Rejected) -> JSONResponse:
    code = Code.SIGNATURE if failure.reason is Reason.SIGNATURE else Code.COMMITMENT_BINDING
    return answer(code, failure.detail)


def _conflict(_: Request, failure: Conflict) -> JSONResponse:
    return answer(Code.TASK_EXPIRED if isinstance(failure, Expired) else Code.CONFLICT, str(failure))


def _unavailable(_: Request, failure: Unavailable) -> JSONResponse:
    log.warning("unavailable: %s", failure)
    return answer(Code.UNAVAILABLE, str(failure))


def _invalid(request: Request, failure: RequestValidationError) -> JSONResponse:
    """Names the fields and never repeats what they held."""
    if failure.body is not None and not request.headers.get("content-type", "").startswith("application/json"):
        return answer(Code.MALFORMED, "send the body with Content-Type: application/json")
    errors = [f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in failure.errors()[:SHOWN_ERRORS]]
    return answer(Code.MALFORMED, "; ".join(errors))


def _http(_: Request, failure: HTTPException) -> JSONResponse:
    codes = {404: Code.ROUTE_UNKNOWN, 405: Code.METHOD_REFUSED, 413: Code.TOO_LARGE}
    return answer(codes.get(failure.status_code, Code.BAD_REQUEST), str(failure.detail), failure.headers)


def _bug(request: Request, failure: Exception) -> JSONResponse:
    log.error("bug at %s %s", request.method, request.url.path, exc_info=failure)
    return answer(Code.INTERNAL, "repeat the request later, and report it if it fails again")


def install(app: FastAPI) -> None:
    handlers: dict[type[Exception], Any] = {
        Problem: _problem,
        Malformed: _malformed,
        Rejected: _rejected,
        Conflict: _conflict,
        Unavailable: _unavailable,
        RequestValidationError: _invalid,
        HTTPException: _http,
        Exception: _bug,
    }
    for failure, handler in handlers.items():
        app.add_exception_handler(failure, handler)
