"""Bodies of requests and answers, as OpenAPI shows them; proof/messages.py decodes the messages of the protocol."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from proof.policy import POLICIES

HEX64 = "^[0-9a-f]{64}$"
ADDRESS_PATTERN = "^0x[0-9a-f]{40}$"

Digest = Annotated[str, Field(pattern=HEX64, examples=["5f" * 32])]
Address = Annotated[str, Field(pattern=ADDRESS_PATTERN, examples=["0x" + "9a" * 20])]
Bytes32 = Annotated[str, Field(pattern="^0x[0-9a-f]{64}$", examples=["0x" + "5f" * 32])]
Dtype = Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"]
Decimal = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,77})$", examples=["1000000000000000000"])]
Shape = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=16, examples=[[1, 4]])]
PolicyName = Annotated[str, Field(pattern=f"^({'|'.join(map(re.escape, POLICIES))})$", examples=["standard"])]
StageName = Literal[
    "posted", "challenged", "checking", "accepted", "rejected", "attested", "lapsed", "expired", "stalled"
]
MAX_INPUTS = 256
MAX_BATCH = 100


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Reward(Body):
    """What is paid and where: `contract` on `chain_id` releases `amount` of `token`."""

    chain_id: Annotated[int, Field(ge=0, lt=2**53, examples=[31337])]
    contract: Address
    token: Address
    amount: Decimal


class Tensor(Body):
    """Elements in C order, little-endian, as base64; a truth value is one byte, 0 or 1."""

    dtype: Dtype
    shape: Shape
    data: Annotated[str, Field(examples=["AAAAAAAAgD8AAABAAABAQA=="])]


class NewTask(Body):
    """What a protocol posts. The same body again is the same task."""

    model: Digest
    policy: PolicyName
    reward: Reward
    payer: Address
    deadline: Annotated[int, Field(ge=0, lt=2**53, description="Unix seconds.", examples=[1800000000])]
    nonce: Digest
    worker: Annotated[Address | None, Field(description="Who alone may do it; none: whoever commits first.")] = None
    inputs: Annotated[
        dict[str, Tensor],
        Field(
            max_length=MAX_INPUTS,
            examples=[{"x": {"dtype": "F32", "shape": [1, 4], "data": "AAAAAAAAgD8AAABAAABAQA=="}}],
        ),
    ]


class NewTasks(Body):
    """Tasks posted together; each is answered by itself."""

    tasks: Annotated[list[NewTask], Field(min_length=1, max_length=MAX_BATCH)]


class Claim(Body):
    name: Annotated[str, Field(examples=["x"])]
    dtype: Dtype
    shape: Shape
    root: Digest


class Task(Body):
    """The task as everybody hashes it: inputs by their roots, in the order of the graph."""

    model: Digest
    inputs: list[Claim]
    policy: PolicyName
    reward: Reward
    payer: Address
    deadline: Annotated[int, Field(examples=[1800000000])]
    nonce: Digest


class TaskState(Body):
    id: Digest
    stage: StageName
    detail: Annotated[str | None, Field(description="Why there is no verdict yet, if something went wrong.")]
    created: Annotated[float, Field(examples=[1790000000.25])]
    changed: Annotated[float, Field(description="When it came to its stage.", examples=[1790000003.5])]
    tenant: Annotated[str, Field(description="Whose API key posted it.", examples=["acme"])]
    assigned: Annotated[Address | None, Field(description="Who alone may do it.")]
    task: Task
    commitment: Digest | None
    worker: Address | None
    proof: Annotated[Digest | None, Field(description="Digest of the proof file, as the worker signed it.")]
    proof_bytes: int | None
    verdict: Literal["accepted", "rejected"] | None
    reason: str | None
    check_seconds: Annotated[float | None, Field(description="Time that the check took.")]
    attestation: Annotated[Digest | None, Field(description="uid of the attestation.")]


class TaskList(Body):
    tasks: list[TaskState]
    next: Annotated[str | None, Field(description="The cursor of the next page; null: this is the last one.")]


class Posted(Body):
    """What became of one of several tasks: its state, or the problem with it."""

    status: int
    task: TaskState | None
    problem: "Problem | None"


class PostedList(Body):
    results: list[Posted]


class Commitment(Body):
    """The worker's signed commitment to a trace: a claim for every tensor, in graph order."""

    model: Digest
    task: Digest
    tensors: list[Claim]
    worker: Address
    signature: Annotated[str, Field(pattern="^[0-9a-f]{130}$", examples=["1b" * 65])]


class Challenge(Body):
    commitment: Digest
    policy: PolicyName
    seed: Digest


class Verdict(Body):
    verdict: Literal["accepted", "rejected"]
    reason: Annotated[str | None, Field(examples=[None])]
    detail: str
    node: str | None
    nodes_total: int
    nodes_checked: int
    rows: Annotated[int | None, Field(description="Opened of each tensor; null: all.")]
    heads: Annotated[int | None, Field(description="Of K and V, checked in each attention node; null: all.")]
    policy: PolicyName
    entries: Annotated[dict[str, int], Field(description="Op family -> entries of node outputs that were checked.")]
    determined: Annotated[dict[str, int], Field(description="Those that a rounding profile left no choice.")]
    largest: Annotated[dict[str, float], Field(description="Op family -> largest |claimed - exact| / radius.")]
    ambiguous: Annotated[int, Field(description="Tokens of an answer that another one could replace.")]
    keyed: Annotated[Digest | None, Field(description="The secret key that stood for the weights, if one did.")]
    misses: Annotated[dict[str, float], Field(description="Fraction of wrong rows -> probability that none is opened.")]
    task: Digest | None
    commitment: Digest
    check_seed: Digest


class Domain(Body):
    name: str
    version: str
    chainId: int  # noqa: N815  # EIP-712 writes it so
    verifyingContract: Address  # noqa: N815


class Attestation(Body):
    """An EIP-712 PaymentAttestation, as tools for EIP-712 take it, with its signature."""

    domain: Domain
    message: Annotated[dict[str, Any], Field(examples=[{"taskId": "0x" + "5f" * 32, "verdict": 1, "amount": "1000"}])]
    signer: Address
    signature: Annotated[str, Field(pattern="^0x[0-9a-f]{130}$", examples=["0x" + "1b" * 65])]


class Weights(Body):
    """A file of weights: as external data of a model its location is its digest."""

    weights: Digest
    file_bytes: int


class ModelState(Body):
    model_config = ConfigDict(extra="allow")

    model: Digest
    nodes: int
    folded: int
    families: Annotated[dict[str, int], Field(examples=[{"contraction": 2, "pointwise": 1}])]
    inputs: list[dict[str, Any]]
    answers: Annotated[list[dict[str, Any]], Field(description="Graph inputs that the worker gives, not the task.")]
    outputs: list[str]
    verifiable: bool
    refusal: Annotated[str | None, Field(description="Why the model cannot be verified; null here.")]
    file_bytes: int
    created: float


class Accepted(Body):
    """The proof is stored; the verdict follows."""

    task: Digest
    proof: Digest
    stage: StageName


class Check(Body):
    name: str
    ok: bool
    reason: str


class Readiness(Body):
    ready: bool
    checks: list[Check]


class Liveness(Body):
    live: bool


class About(Body):
    """What a caller needs to know of this service before it trusts it."""

    name: str
    version: str
    signer: Annotated[Address | None, Field(description="Address that signs attestations here.")]
    origins: Annotated[list[str], Field(description="What a worker's signed request may name as the service.")]
    openapi: str
    limits: Annotated[dict[str, int], Field(examples=[{"proof_bytes": 68719476736}])]


class Problem(Body):
    """RFC 9457 problem details; `code` is stable, `retryable` says whether the same request may succeed later."""

    type: Annotated[str, Field(examples=["urn:assay:problem:task.unknown"])]
    title: str
    status: Annotated[int, Field(examples=[404])]
    detail: str
    code: Annotated[str, Field(examples=["task.unknown"])]
    retryable: bool


PROBLEM: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "A problem (RFC 9457)",
        "content": {"application/problem+json": {"schema": Problem.model_json_schema()}},
    }
}


def file(media_type: str, description: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": description, "content": {media_type: {"schema": _BINARY}}}}


def upload(description: str) -> dict[str, Any]:
    content = {"application/octet-stream": {"schema": _BINARY}}
    return {"requestBody": {"required": True, "description": description, "content": content}}


_BINARY = {"type": "string", "format": "binary"}
