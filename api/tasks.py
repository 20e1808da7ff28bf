"""Tasks: posted, committed to, proven, judged. Every call may be repeated."""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Body, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from api import problems, schemas
from api.answers import IdempotencyKey, IfNoneMatch, Prefer, awaited, repeated, tagged
from api.caller import Poster, Reader, Signing, Tenant, scope_of, signed_by
from api.door import BoundedRoute, Door, Here, TaskId, receive
from api.limits import MAX_LISTED, limit_of
from api.problems import Code, Problem
from gpu import hashing
from proof import bundle, encoding, messages
from proof.attestation import verify_commitment_signature
from proof.errors import Failure, Malformed
from proof.graph import DTYPES, Array
from proof.messages import TensorClaim, Verdict
from proof.requests import Action
from verifier.blobs import Upload
from verifier.lifecycle import Stage
from verifier.summaries import Filter, Place, Summary
from verifier.tables import ModelRow

router = APIRouter(prefix="/v1/tasks", tags=["tasks"], route_class=BoundedRoute)
batch = APIRouter(tags=["tasks"], route_class=BoundedRoute)

SAFETENSORS = "application/octet-stream"


@router.post(
    "",
    response_model=schemas.TaskState,
    status_code=201,
    responses={200: {"model": schemas.TaskState, "description": "It was posted before"}},
)
def post(
    body: schemas.NewTask, request: Request, door: Here, tenant: Poster, idempotency_key: IdempotencyKey = None
) -> Response:
    """Post a task with its inputs. Its id is the digest of what is asked and paid."""

    def carry_out() -> JSONResponse:
        new, state = _post(door, body, tenant)
        return JSONResponse(state, 201 if new else 200, {"Location": f"/v1/tasks/{state['id']}"})

    return repeated(door, tenant.name, idempotency_key, request, body, carry_out)


@batch.post("/v1/tasks:batch", response_model=schemas.PostedList)
def post_many(
    body: schemas.NewTasks, request: Request, door: Here, tenant: Poster, idempotency_key: IdempotencyKey = None
) -> Response:
    """Post several tasks. Each is answered by itself, in their order: 201, 200, or the problem with it."""

    def carry_out() -> JSONResponse:
        return JSONResponse({"results": [_posted(door, task, tenant) for task in body.tasks]})

    return repeated(door, tenant.name, idempotency_key, request, body, carry_out)


@router.get("", response_model=schemas.TaskList)
def listed(
    request: Request,
    door: Here,
    caller: Reader,
    stage: Annotated[Stage | None, Query(description="Only tasks at this stage.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 100,
    cursor: Annotated[str | None, Query(max_length=200, description="`next` of the page before.")] = None,
    _: IfNoneMatch = None,
) -> Response:
    """Tasks that the caller may see, the oldest first: a worker looks here for those that are posted."""
    door.store.lapse(door.clock())
    wanted = Filter(**scope_of(caller), stage=stage, after=_place(cursor) if cursor else None)
    found = door.store.tasks(limit + 1, wanted)
    more = _cursor(found[limit - 1]) if len(found) > limit else None
    return tagged(request, {"tasks": [_state(entry) for entry in found[:limit]], "next": more})


@router.get("/{task}", response_model=schemas.TaskState)
async def show(
    task: TaskId, request: Request, door: Here, caller: Reader, prefer: Prefer = None, _: IfNoneMatch = None
) -> Response:
    """The task as it stands; with `Prefer: wait=N`, once it has come to its end, or as it is after N seconds."""
    return tagged(request, _state(await awaited(door, prefer, lambda: door.seen(task, caller))))


@router.get("/{task}/inputs", response_class=FileResponse, responses=schemas.file(SAFETENSORS, "safetensors"))
def inputs(task: TaskId, door: Here, caller: Reader) -> FileResponse:
    """The task's input tensors, as a safetensors file."""
    return _file(door.blobs.path(door.seen(task, caller).task.inputs), f"{task}.inputs.safetensors")


@router.post("/{task}/commitment", response_model=schemas.Challenge)
def commit(
    task: TaskId, request: Request, door: Here, body: Annotated[schemas.Commitment, Body()], _: Signing = None
) -> JSONResponse:
    """Commit to a run, and be challenged. The first worker who commits has the task; there is no second roll."""
    found = door.task(task)
    asked = messages.Task.from_json(found.task.document)
    commitment = messages.Commitment.from_json(body.model_dump())
    if (commitment.task, commitment.model) != (asked.id(), asked.model):
        raise Problem(Code.COMMITMENT_BINDING, f"the commitment is not for task {task} and its model")
    worker, content = signed_by(request, door, Action.COMMIT, asked)
    if (worker, content) != (commitment.worker, commitment.digest()):
        raise Problem(Code.SIGNATURE, f"{worker} signed the request for another commitment, or for another's")
    if found.task.worker not in (None, worker):
        raise Problem(Code.TASK_UNKNOWN, f"no task {task} for {worker}")
    verify_commitment_signature(commitment, asked.reward)
    return JSONResponse(door.store.commit(commitment, door.clock()).to_json())


@router.put(
    "/{task}/proof",
    response_model=schemas.Accepted,
    status_code=202,
    openapi_extra=schemas.upload("The proof file (proof/README.md)."),
)
async def prove(task: TaskId, request: Request, door: Here, _: Signing = None) -> JSONResponse:
    """Upload the proof. Only the committed worker can: otherwise anybody could have a task rejected."""
    summary = await run_in_threadpool(_open_for_proof, door, task)
    digest = await run_in_threadpool(_from_worker, request, door, summary)
    with door.blobs.upload(limit_of("PUT", f"/v1/tasks/{task}/proof")) as upload:
        await receive(request, upload)
        return await run_in_threadpool(_prove, door, summary, upload, digest)


@router.get("/{task}/verdict", response_model=schemas.Verdict)
async def verdict(
    task: TaskId, request: Request, door: Here, caller: Reader, prefer: Prefer = None, _: IfNoneMatch = None
) -> Response:
    """The verdict, exactly as the attestation's evidence hash covers it."""
    await awaited(door, prefer, lambda: door.seen(task, caller))
    return tagged(request, (await run_in_threadpool(_verdict, door, task)).to_json())


@router.get("/{task}/attestation", response_model=schemas.Attestation)
async def attestation(
    task: TaskId, request: Request, door: Here, caller: Reader, prefer: Prefer = None, _: IfNoneMatch = None
) -> Response:
    """What is signed at a task's end: a payment, a rejection, or that its deadline passed (both with amount 0)."""
    await awaited(door, prefer, lambda: door.seen(task, caller))
    found = await run_in_threadpool(door.store.attestation_of, task)
    if found is None:
        raise Problem(Code.ATTESTATION_PENDING, f"task {task} is not attested")
    return tagged(request, found.document)


@router.get("/{task}/outputs", response_class=FileResponse, responses=schemas.file(SAFETENSORS, "safetensors"))
def outputs(task: TaskId, door: Here, caller: Reader) -> FileResponse:
    """The graph outputs that were paid for, as a safetensors file; only of an accepted proof."""
    door.seen(task, caller)
    judged = _verdict(door, task)
    if judged.verdict != "accepted":
        raise Problem(Code.OUTPUTS_REFUSED, f"task {task} was rejected: {judged.reason}")
    proof = bundle.read_proof(_proof_path(door, task))
    claims = {claim.name: claim for claim in proof.commitment.tensors}
    model = proof.commitment.model
    plan = door.library.plan(model, {i.name: claims[i.name].shape for i in door.library.model(model).graph.inputs})
    arrays = {
        name: proof.openings[name].rows.reshape(claims[name].shape) if name in proof.openings else plan.known[name]
        for name in plan.outputs
    }
    with door.blobs.making() as path:
        bundle.write(path, arrays.items(), {"task": task})
    return _file(path, f"{task}.outputs.safetensors", scratch=True)


@router.get("/{task}/bundle", response_class=FileResponse, responses=schemas.file(SAFETENSORS, "an audit bundle"))
def audit_bundle(task: TaskId, door: Here, caller: Reader) -> FileResponse:
    """Proof, verdict and attestation in one file: enough to check everything again offline."""
    door.seen(task, caller)
    judged = _verdict(door, task)
    found = door.store.attestation_of(task)
    if found is None:
        raise Problem(Code.ATTESTATION_PENDING, f"task {task} is not attested")
    with door.blobs.making() as path:
        bundle.write_bundle(_proof_path(door, task), path, judged, found.document)
    return _file(path, f"{task}.bundle.safetensors", scratch=True)


def _post(door: Door, body: schemas.NewTask, tenant: Tenant) -> tuple[bool, dict[str, Any]]:
    """Whether the task is new, and its state."""
    row = door.store.model(body.model)
    if row is None:
        raise Problem(Code.MODEL_UNREGISTERED, f"no model {body.model}")
    arrays = _inputs(body, [entry["name"] for entry in row.report["inputs"]])
    task = messages.Task.from_json(_message(body, arrays))
    known = door.store.same_task(task.id().hex(), tenant.name, body.worker)
    if known:
        return False, _state(known)
    door.admit()
    _fits(door, task, arrays, row)
    now = door.clock()
    if task.deadline < now:
        raise Problem(Code.TASK_DEADLINE, f"the deadline {task.deadline} is before {int(now)}")
    with door.blobs.making() as path:
        bundle.write(path, arrays.items(), {"task": task.id().hex()})
        kept = door.blobs.adopt(path)
    new = door.store.add_task(task, kept, now, tenant.name, body.worker)
    return new, _state(door.task(task.id().hex()))


def _posted(door: Door, body: schemas.NewTask, tenant: Tenant) -> dict[str, Any]:
    try:
        new, state = _post(door, body, tenant)
    except (Problem, Failure) as failure:
        problem = problems.document(problems.code_of(failure), problems.detail_of(failure))
        return {"status": problem["status"], "task": None, "problem": problem}
    return {"status": 201 if new else 200, "task": state, "problem": None}


def _cursor(last: Summary) -> str:
    return base64.urlsafe_b64encode(json.dumps(last.place).encode()).decode().rstrip("=")


def _place(cursor: str) -> Place:
    try:
        created, task = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        place = float(created), str(task)
    except (ValueError, TypeError) as error:
        raise Malformed("cursor: not one that this service gave") from error
    if not isfinite(place[0]) or not re.fullmatch(schemas.HEX64, place[1]):
        raise Malformed("cursor: not one that this service gave")
    return place


def _inputs(body: schemas.NewTask, names: list[str]) -> dict[str, Array]:
    """The task's arrays in the order of the graph. Raises Problem when they are not the model's by name."""
    if body.inputs.keys() != set(names):
        raise Problem(Code.TASK_INPUTS, f"inputs {sorted(body.inputs)} where the model takes {sorted(names)}")
    return {name: _array(body.inputs[name], f"inputs.{name}") for name in names}


def _array(tensor: schemas.Tensor, at: str) -> Array:
    dtype, shape = DTYPES[tensor.dtype], encoding.shape(tensor.shape, f"{at}.shape")
    try:
        data = binascii.a2b_base64(tensor.data, strict_mode=True)
    except ValueError as error:
        raise Malformed(f"{at}.data: not base64") from error
    wanted = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if len(data) != wanted:
        raise Malformed(f"{at}.data: {len(data)} bytes for {tensor.dtype} {list(shape)}, which has {wanted}")
    flat = np.frombuffer(data, dtype)
    if dtype == np.bool_ and flat.view(np.uint8).max(initial=0) > 1:
        raise Malformed(f"{at}.data: a truth value that is neither 0 nor 1")
    return flat.reshape(shape)


def _message(body: schemas.NewTask, arrays: Mapping[str, Array]) -> dict[str, Any]:
    claims = [
        TensorClaim(name, body.inputs[name].dtype, array.shape, hashing.root(hashing.tensor_levels(array))).to_json()
        for name, array in arrays.items()
    ]
    return {**body.model_dump(exclude={"inputs", "worker"}), "inputs": claims}


def _fits(door: Door, task: messages.Task, arrays: Mapping[str, Array], row: ModelRow) -> None:
    """Raises Problem when the inputs' dtypes or shapes, or the policy, are not for the model: nobody could do the task.

    What the worker gives is taken at its shortest.
    """
    for claim, entry in zip(task.inputs, row.report["inputs"], strict=True):
        if claim.dtype != entry["dtype"]:
            raise Problem(Code.TASK_INPUTS, f"input {claim.name!r} is {claim.dtype}; the model takes {entry['dtype']}")
    shortest = {entry["name"]: (1,) * len(entry["shape"]) for entry in row.report["answers"]}
    try:
        door.inspector.plan(
            door.blobs.path(row.blob), {name: array.shape for name, array in arrays.items()} | shortest, task.policy
        )
    except Malformed as error:
        raise Problem(Code.TASK_INPUTS, str(error)) from error


def _open_for_proof(door: Door, task: str) -> Summary:
    """Refuse before the upload what could not be taken after it."""
    summary = door.task(task)
    if summary.proof is None and summary.task.stage in (Stage.LAPSED, Stage.EXPIRED):
        raise Problem(Code.TASK_EXPIRED, f"task {task} expired at {summary.task.deadline}")
    if summary.task.stage == Stage.POSTED:
        raise Problem(Code.CONFLICT, f"task {task} has no commitment yet")
    return summary


def _from_worker(request: Request, door: Door, summary: Summary) -> bytes:
    """The digest of the file that the committed worker is about to send. Raises Problem for anybody else."""
    asked = messages.Task.from_json(summary.task.document)
    worker, digest = signed_by(request, door, Action.PROVE, asked)
    if worker != summary.worker:
        raise Problem(Code.PROOF_SIGNATURE, f"signed by {worker}, not by the committed worker {summary.worker}")
    return digest


def _prove(door: Door, summary: Summary, upload: Upload, digest: bytes) -> JSONResponse:
    """Digest, form, file, record, queue: each durable before the next. What is not recorded is collected."""
    task, address = summary.task.id, upload.close()
    found = bundle.file_digest(upload.path)
    if found != digest:
        raise Problem(Code.PROOF_SIGNATURE, f"the file has the digest {found.hex()}, {digest.hex()} was signed")
    door.store.check_proof(task, digest)
    bundle.read_proof(upload.path)
    door.blobs.place(upload, address)
    door.store.prove(task, digest, address, upload.size, door.clock())
    now = door.task(task)
    if now.verdict is None:
        door.ask(now.task.model)
    return JSONResponse({"task": task, "proof": digest.hex(), "stage": now.task.stage}, 202)


def _verdict(door: Door, task: str) -> Verdict:
    summary = door.task(task)
    found = door.store.verdict(task)
    if found is None and summary.task.stage in (Stage.LAPSED, Stage.EXPIRED):
        raise Problem(Code.TASK_EXPIRED, f"task {task} expired at {summary.task.deadline}: there is nothing to judge")
    if found is None:
        raise Problem(Code.VERDICT_PENDING, f"task {task} is {summary.task.stage}")
    return Verdict.from_json(found.document)


def _proof_path(door: Door, task: str) -> Any:
    found = door.store.proof(task)
    if found is None:
        raise Problem(Code.VERDICT_PENDING, f"task {task} has no proof")
    return door.blobs.path(found.blob)


def _file(path: Any, name: str, *, scratch: bool = False) -> FileResponse:
    gone = BackgroundTask(path.unlink, missing_ok=True) if scratch else None
    return FileResponse(path, media_type=SAFETENSORS, filename=name, background=gone)


def _state(summary: Summary) -> dict[str, Any]:
    row = summary.task
    return {
        "id": row.id,
        "stage": row.stage,
        "detail": row.detail,
        "created": row.created,
        "changed": row.changed,
        "tenant": row.tenant,
        "assigned": row.worker,
        "task": row.document,
        "commitment": summary.commitment,
        "worker": summary.worker,
        "proof": summary.proof,
        "proof_bytes": summary.proof_size,
        "verdict": summary.verdict,
        "reason": summary.reason,
        "check_seconds": summary.seconds,
        "attestation": summary.uid,
    }
