"""Tasks: posted, committed to, proven, judged. Every call may be repeated."""

import binascii
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Body, Header, Query, Request
from fastapi.responses import FileResponse, JSONResponse
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from api import schemas
from api.door import BoundedRoute, Door, Here, TaskId, receive
from api.limits import MAX_LISTED, limit_of
from api.problems import Code, Problem
from gpu import hashing
from gpu.boundary import committed
from proof import bundle, encoding, messages
from proof.attestation import recover_upload, verify_commitment_signature
from proof.errors import Conflict, Malformed, Reason, Rejected
from proof.graph import DTYPES, Array
from proof.messages import SIGNATURE_BYTES, TensorClaim, Verdict
from proof.policy import policy
from verifier.blobs import Upload
from verifier.lifecycle import Stage
from verifier.store import Summary

router = APIRouter(prefix="/v1/tasks", tags=["tasks"], route_class=BoundedRoute)

SAFETENSORS = "application/octet-stream"


@router.post(
    "",
    response_model=schemas.TaskState,
    status_code=201,
    responses={200: {"model": schemas.TaskState, "description": "It was posted before"}},
)
def post(body: schemas.NewTask, door: Here) -> JSONResponse:
    """Post a task with its inputs. Its id is the digest of what is asked and paid."""
    row = door.store.model(body.model)
    if row is None:
        raise Problem(Code.MODEL_UNREGISTERED, f"no model {body.model}")
    arrays = _inputs(body, [entry["name"] for entry in row.report["inputs"]])
    task = messages.Task.from_json(_message(body, arrays))
    known = door.store.task(task.id().hex())
    if known:
        return JSONResponse(_state(known))
    _fits(door, task, arrays, row.report)
    now = door.clock()
    if task.deadline < now:
        raise Problem(Code.TASK_DEADLINE, f"the deadline {task.deadline} is before {int(now)}")
    path = door.blobs.scratch()
    bundle.write(path, arrays.items(), {"task": task.id().hex()})
    new = door.store.add_task(task, door.blobs.adopt(path), now)
    state = _state(door.task(task.id().hex()))
    return JSONResponse(state, 201 if new else 200, {"Location": f"/v1/tasks/{state['id']}"})


@router.get("", response_model=schemas.TaskList)
def listed(
    door: Here,
    stage: Annotated[Stage | None, Query(description="Only tasks at this stage.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 100,
) -> JSONResponse:
    """Tasks, the oldest first: a worker looks here for those that are posted."""
    door.store.expire(door.clock())
    return JSONResponse({"tasks": [_state(entry) for entry in door.store.tasks(stage, limit)]})


@router.get("/{task}", response_model=schemas.TaskState)
def show(task: TaskId, door: Here) -> JSONResponse:
    return JSONResponse(_state(door.task(task)))


@router.get("/{task}/inputs", response_class=FileResponse, responses=schemas.file(SAFETENSORS, "safetensors"))
def inputs(task: TaskId, door: Here) -> FileResponse:
    """The task's input tensors, as a safetensors file."""
    return _file(door.blobs.path(door.task(task).task.inputs), f"{task}.inputs.safetensors")


@router.post("/{task}/commitment", response_model=schemas.Challenge)
def commit(task: TaskId, door: Here, body: Annotated[schemas.Commitment, Body()]) -> JSONResponse:
    """Commit to a run, and be challenged. The first worker who commits has the task; there is no second roll."""
    asked = messages.Task.from_json(door.task(task).task.document)
    commitment = messages.Commitment.from_json(body.model_dump())
    if (commitment.task, commitment.model) != (asked.id(), asked.model):
        raise Problem(Code.COMMITMENT_BINDING, f"the commitment is not for task {task} and its model")
    verify_commitment_signature(commitment, asked.reward)
    return JSONResponse(door.store.commit(commitment, door.clock()).to_json())


@router.put(
    "/{task}/proof",
    response_model=schemas.Accepted,
    status_code=202,
    openapi_extra=schemas.upload("The proof file (proof/README.md)."),
)
async def prove(
    task: TaskId,
    request: Request,
    door: Here,
    assay_signature: Annotated[
        str,
        Header(description="EIP-712 ProofUpload signature of the committed worker.", examples=["0x" + "1b" * 65]),
    ] = "",
) -> JSONResponse:
    """Upload the proof. Only the committed worker can: otherwise anybody could have a task rejected."""
    summary = await run_in_threadpool(_open_for_proof, door, task)
    try:
        signature = encoding.prefixed(assay_signature, "Assay-Signature", SIGNATURE_BYTES)
    except Malformed as error:
        raise Problem(Code.PROOF_SIGNATURE, str(error)) from error
    with door.blobs.upload(limit_of("PUT", f"/v1/tasks/{task}/proof")) as upload:
        await receive(request, upload)
        return await run_in_threadpool(_prove, door, summary, upload, signature)


@router.get("/{task}/verdict", response_model=schemas.Verdict)
def verdict(task: TaskId, door: Here) -> JSONResponse:
    """The verdict, exactly as the attestation's evidence hash covers it."""
    return JSONResponse(_verdict(door, task).to_json())


@router.get("/{task}/attestation", response_model=schemas.Attestation)
def attestation(task: TaskId, door: Here) -> JSONResponse:
    """The signed verdict: a payment, or a rejection with amount 0."""
    door.task(task)
    found = door.store.attestation_of(task)
    if found is None:
        raise Problem(Code.ATTESTATION_PENDING, f"task {task} is not attested")
    return JSONResponse(found.document)


@router.get("/{task}/outputs", response_class=FileResponse, responses=schemas.file(SAFETENSORS, "safetensors"))
def outputs(task: TaskId, door: Here) -> FileResponse:
    """The graph outputs that were paid for, as a safetensors file; only of an accepted proof."""
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
    path = door.blobs.scratch()
    bundle.write(path, arrays.items(), {"task": task})
    return _file(path, f"{task}.outputs.safetensors", scratch=True)


@router.get("/{task}/bundle", response_class=FileResponse, responses=schemas.file(SAFETENSORS, "an audit bundle"))
def audit_bundle(task: TaskId, door: Here) -> FileResponse:
    """Proof, verdict and attestation in one file: enough to check everything again offline."""
    judged = _verdict(door, task)
    found = door.store.attestation_of(task)
    if found is None:
        raise Problem(Code.ATTESTATION_PENDING, f"task {task} is not attested")
    path = door.blobs.scratch()
    bundle.write_bundle(_proof_path(door, task), path, judged, found.document)
    return _file(path, f"{task}.bundle.safetensors", scratch=True)


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
    return {**body.model_dump(exclude={"inputs"}), "inputs": claims}


def _fits(door: Door, task: messages.Task, arrays: Mapping[str, Array], report: Mapping[str, Any]) -> None:
    """Raises Problem when the inputs' dtypes or shapes, or the policy, are not for the model: nobody could do the task.

    What the worker gives is taken at its shortest.
    """
    for claim, entry in zip(task.inputs, report["inputs"], strict=True):
        if claim.dtype != entry["dtype"]:
            raise Problem(Code.TASK_INPUTS, f"input {claim.name!r} is {claim.dtype}; the model takes {entry['dtype']}")
    try:
        shortest = {entry["name"]: (1,) * len(entry["shape"]) for entry in report["answers"]}
        plan = door.library.plan(task.model, {name: array.shape for name, array in arrays.items()} | shortest)
        committed(plan, policy(task.policy))
    except Malformed as error:
        raise Problem(Code.TASK_INPUTS, str(error)) from error


def _open_for_proof(door: Door, task: str) -> Summary:
    """Refuse before the upload what could not be taken after it."""
    summary = door.task(task)
    if summary.proof is None:
        door.store.check_proof(task, b"")
    return summary


def _prove(door: Door, summary: Summary, upload: Upload, signature: bytes) -> JSONResponse:
    """Signature, form, file, record, queue: each durable before the next."""
    task, address = summary.task.id, upload.close()
    digest = bundle.file_digest(upload.path)
    _from_worker(summary, digest, signature)
    door.store.check_proof(task, digest)
    bundle.read_proof(upload.path)
    door.blobs.place(upload, address)
    try:
        door.store.prove(task, digest, address, upload.size, door.clock())
    except Conflict:
        if not door.store.proof_is_kept(address):
            door.blobs.drop(address)
        raise
    now = door.task(task)
    if now.verdict is None:
        door.ask(task, now.task.attempts)
    return JSONResponse({"task": task, "proof": digest.hex(), "stage": now.task.stage}, 202)


def _from_worker(summary: Summary, digest: bytes, signature: bytes) -> None:
    asked = messages.Task.from_json(summary.task.document)
    bound = bytes.fromhex(summary.commitment or "")
    try:
        uploader = recover_upload(asked.id(), bound, digest, asked.reward, signature)
        if uploader != summary.worker:
            raise Rejected(Reason.SIGNATURE, f"signed by {uploader}; the task's worker is {summary.worker}")
    except Rejected as rejection:
        raise Problem(Code.PROOF_SIGNATURE, rejection.detail) from rejection


def _verdict(door: Door, task: str) -> Verdict:
    summary = door.task(task)
    found = door.store.verdict(task)
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
