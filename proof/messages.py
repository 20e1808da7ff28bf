"""The messages of the protocol as values, and their JSON: bytes and limits are in README.md.

`from_json` takes parsed JSON and accepts only what `to_json` makes; anything else is Malformed and names the
field. A digest is over the canonical form (RFC 8785), so spelling and order of the received text do not matter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self

from proof import merkle
from proof.digest import DIGEST_BYTES, Tag, digest_json
from proof.encoding import address, array, decimal, fields, integer, name, octets, shape, text
from proof.errors import Malformed, Reason
from proof.graph import DTYPES
from proof.policy import POLICIES

MAX_TENSORS = 100_000
MAX_MESSAGE_BYTES = 16 * 2**20
MAX_MISSES = 64
MAX_FAMILIES = 64
SIGNATURE_BYTES = 65

Json = dict[str, Any]


@dataclass(frozen=True)
class TensorClaim:
    """A tensor and the root over its rows."""

    name: str
    dtype: str  # as safetensors writes it
    shape: tuple[int, ...]
    root: bytes

    def digest(self) -> bytes:
        return digest_json(Tag.TENSOR, self.to_json())

    def to_json(self) -> Json:
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "root": self.root.hex(),
        }

    @classmethod
    def from_json(cls, value: object, at: str = "tensor") -> Self:
        label, dtype, axes, root = fields(value, at, ("name", "dtype", "shape", "root"))
        if dtype not in tuple(DTYPES):
            raise Malformed(f"{at}.dtype: not one of {', '.join(DTYPES)}")
        return cls(
            name=name(label, f"{at}.name"),
            dtype=str(dtype),
            shape=shape(axes, f"{at}.shape"),
            root=octets(root, f"{at}.root", DIGEST_BYTES),
        )


@dataclass(frozen=True)
class Reward:
    """What is paid and where: `contract` on `chain_id` releases `amount` of `token`."""

    chain_id: int
    contract: str
    token: str
    amount: int  # in the token's smallest unit, below 2^256

    def to_json(self) -> Json:
        return {
            "chain_id": self.chain_id,
            "contract": self.contract,
            "token": self.token,
            "amount": str(self.amount),
        }

    @classmethod
    def from_json(cls, value: object, at: str = "reward") -> Self:
        chain_id, contract, token, amount = fields(value, at, ("chain_id", "contract", "token", "amount"))
        return cls(
            chain_id=integer(chain_id, f"{at}.chain_id"),
            contract=address(contract, f"{at}.contract"),
            token=address(token, f"{at}.token"),
            amount=decimal(amount, f"{at}.amount", 256),
        )


@dataclass(frozen=True)
class Task:
    """What a protocol asks for and pays."""

    model: bytes
    inputs: tuple[TensorClaim, ...]  # in the order of the graph's inputs
    policy: str
    reward: Reward
    payer: str
    deadline: int  # Unix seconds
    nonce: bytes

    def id(self) -> bytes:
        return digest_json(Tag.TASK, self.to_json())

    def to_json(self) -> Json:
        return {
            "model": self.model.hex(),
            "inputs": [claim.to_json() for claim in self.inputs],
            "policy": self.policy,
            "reward": self.reward.to_json(),
            "payer": self.payer,
            "deadline": self.deadline,
            "nonce": self.nonce.hex(),
        }

    @classmethod
    def from_json(cls, value: object, at: str = "task") -> Self:
        model, inputs, policy_name, reward, payer, deadline, nonce = fields(
            value, at, ("model", "inputs", "policy", "reward", "payer", "deadline", "nonce")
        )
        return cls(
            model=octets(model, f"{at}.model", DIGEST_BYTES),
            inputs=_claims(inputs, f"{at}.inputs"),
            policy=_policy(policy_name, f"{at}.policy"),
            reward=Reward.from_json(reward, f"{at}.reward"),
            payer=address(payer, f"{at}.payer"),
            deadline=integer(deadline, f"{at}.deadline"),
            nonce=octets(nonce, f"{at}.nonce", DIGEST_BYTES),
        )


@dataclass(frozen=True)
class Commitment:
    """The trace of one run, bound before anything is drawn.

    Offline it answers no task and nobody signs it: `task`, `worker` and `signature` are None together.
    """

    model: bytes
    task: bytes | None
    tensors: tuple[TensorClaim, ...]  # in the order of the graph
    worker: str | None = None
    signature: bytes | None = None  # EIP-712 WorkCommitment, attestation.py

    def root(self) -> bytes:
        """The root of the tree whose leaf hashes are the digests of the tensors."""
        return self._root

    @cached_property
    def _root(self) -> bytes:
        digests = [claim.digest() for claim in self.tensors]
        return merkle.root_hash(merkle.build(merkle.BLAKE3, digests))

    def digest(self) -> bytes:
        task = self.task and self.task.hex()
        bound = {"model": self.model.hex(), "task": task, "root": self.root().hex()}
        return digest_json(Tag.COMMITMENT, bound)

    def signed(self, worker: str, signature: bytes) -> Self:
        return replace(self, worker=worker, signature=signature)

    def to_json(self) -> Json:
        return {
            "model": self.model.hex(),
            "task": self.task and self.task.hex(),
            "tensors": [claim.to_json() for claim in self.tensors],
            "worker": self.worker,
            "signature": self.signature and self.signature.hex(),
        }

    @classmethod
    def from_json(cls, value: object, at: str = "commitment") -> Self:
        model, task, tensors, worker, signature = fields(value, at, ("model", "task", "tensors", "worker", "signature"))
        if len({entry is None for entry in (task, worker, signature)}) > 1:
            raise Malformed(f"{at}: task, worker and signature go together")
        return cls(
            model=octets(model, f"{at}.model", DIGEST_BYTES),
            task=None if task is None else octets(task, f"{at}.task", DIGEST_BYTES),
            tensors=_claims(tensors, f"{at}.tensors"),
            worker=None if worker is None else address(worker, f"{at}.worker"),
            signature=None if signature is None else octets(signature, f"{at}.signature", SIGNATURE_BYTES),
        )


@dataclass(frozen=True)
class Challenge:
    """Verifier randomness drawn after the commitment: its seed selects the rows to open."""

    commitment: bytes
    policy: str
    seed: bytes

    def digest(self) -> bytes:
        return digest_json(Tag.CHALLENGE, self.to_json())

    def to_json(self) -> Json:
        return {
            "commitment": self.commitment.hex(),
            "policy": self.policy,
            "seed": self.seed.hex(),
        }

    @classmethod
    def from_json(cls, value: object, at: str = "challenge") -> Self:
        commitment, policy_name, seed = fields(value, at, ("commitment", "policy", "seed"))
        return cls(
            commitment=octets(commitment, f"{at}.commitment", DIGEST_BYTES),
            policy=_policy(policy_name, f"{at}.policy"),
            seed=octets(seed, f"{at}.seed", DIGEST_BYTES),
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Accepted, or rejected for one reason; with what was covered and what such a proof misses.

    A verdict that accepts has checked every node of the graph.
    """

    verdict: Literal["accepted", "rejected"]
    reason: Reason | None = None
    detail: str = ""
    node: str | None = None
    nodes_total: int
    nodes_checked: int
    rows: int | None  # opened of each tensor; None: all
    heads: int | None = None  # of K and V, checked in each attention node with a head a row; None: all
    policy: str
    misses: Mapping[str, float]  # fraction of wrong rows -> probability that none is opened
    entries: Mapping[str, int] = field(default_factory=dict)  # op family -> entries of node outputs that were checked
    determined: Mapping[str, int] = field(default_factory=dict)  # those that a rounding profile left no choice
    largest: Mapping[str, float] = field(default_factory=dict)  # op family -> largest |claimed - exact| / radius
    ambiguous: int = 0  # tokens of an answer that another one could replace
    keyed: bytes | None = None  # id of the secret key that stood for the weights; None: the weights were at hand
    task: bytes | None
    commitment: bytes
    check_seed: bytes

    def digest(self) -> bytes:
        return digest_json(Tag.VERDICT, self.to_json())

    def to_json(self) -> Json:
        return {
            "verdict": self.verdict,
            "reason": self.reason and str(self.reason),
            "detail": self.detail,
            "node": self.node,
            "nodes_total": self.nodes_total,
            "nodes_checked": self.nodes_checked,
            "rows": self.rows,
            "policy": self.policy,
            "misses": dict(self.misses),
            "heads": self.heads,
            "entries": dict(self.entries),
            "determined": dict(self.determined),
            "largest": dict(self.largest),
            "ambiguous": self.ambiguous,
            "keyed": self.keyed and self.keyed.hex(),
            "task": self.task and self.task.hex(),
            "commitment": self.commitment.hex(),
            "check_seed": self.check_seed.hex(),
        }

    @classmethod
    def from_json(cls, value: object, at: str = "verdict") -> Self:
        names = tuple(cls.__dataclass_fields__)
        member = dict(zip(names, fields(value, at, names), strict=True))
        reason, node, rows, keyed, task = (member[key] for key in ("reason", "node", "rows", "keyed", "task"))
        result = cls(
            verdict=_verdict(member["verdict"], f"{at}.verdict"),
            reason=None if reason is None else _reason(reason, f"{at}.reason"),
            detail=text(member["detail"], f"{at}.detail"),
            node=None if node is None else name(node, f"{at}.node"),
            nodes_total=integer(member["nodes_total"], f"{at}.nodes_total"),
            nodes_checked=integer(member["nodes_checked"], f"{at}.nodes_checked"),
            rows=None if rows is None else integer(rows, f"{at}.rows"),
            policy=_policy(member["policy"], f"{at}.policy"),
            misses=_misses(member["misses"], f"{at}.misses"),
            heads=None if member["heads"] is None else integer(member["heads"], f"{at}.heads"),
            entries=_entries(member["entries"], f"{at}.entries"),
            determined=_entries(member["determined"], f"{at}.determined"),
            largest=_largest(member["largest"], f"{at}.largest"),
            ambiguous=integer(member["ambiguous"], f"{at}.ambiguous"),
            keyed=None if keyed is None else octets(keyed, f"{at}.keyed", DIGEST_BYTES),
            task=None if task is None else octets(task, f"{at}.task", DIGEST_BYTES),
            commitment=octets(member["commitment"], f"{at}.commitment", DIGEST_BYTES),
            check_seed=octets(member["check_seed"], f"{at}.check_seed", DIGEST_BYTES),
        )
        if (result.verdict == "accepted") != (result.reason is None):
            raise Malformed(f"{at}.reason: a reason belongs to a rejection, and only to one")
        if result.verdict == "accepted" and result.nodes_checked != result.nodes_total:
            raise Malformed(f"{at}.nodes_checked: accepted with nodes unchecked")
        return result


def _claims(value: object, at: str) -> tuple[TensorClaim, ...]:
    items = enumerate(array(value, at, MAX_TENSORS))
    claims = tuple(TensorClaim.from_json(item, f"{at}[{i}]") for i, item in items)
    if len({claim.name for claim in claims}) != len(claims):
        raise Malformed(f"{at}: a tensor is named twice")
    return claims


def _policy(value: object, at: str) -> str:
    if value not in tuple(POLICIES):
        raise Malformed(f"{at}: not one of {', '.join(POLICIES)}")
    return str(value)


def _verdict(value: object, at: str) -> Literal["accepted", "rejected"]:
    if value == "accepted":
        return "accepted"
    if value == "rejected":
        return "rejected"
    raise Malformed(f"{at}: neither accepted nor rejected")


def _reason(value: object, at: str) -> Reason:
    if value not in tuple(Reason):
        raise Malformed(f"{at}: not one of {', '.join(Reason)}")
    return Reason(str(value))


def _misses(value: object, at: str) -> dict[str, float]:
    return _ratios(value, at, MAX_MISSES, "a probability")


def _largest(value: object, at: str) -> dict[str, float]:
    return _ratios(value, at, MAX_FAMILIES, "a ratio that passes")


def _ratios(value: object, at: str, limit: int, what: str) -> dict[str, float]:
    if not isinstance(value, dict) or len(value) > limit:
        raise Malformed(f"{at}: not an object of at most {limit} members")
    for key, ratio in value.items():
        name(key, at)
        if type(ratio) not in (int, float) or not 0 <= ratio <= 1:
            raise Malformed(f"{at}.{key}: not {what}")
    return {key: float(ratio) for key, ratio in value.items()}


def _entries(value: object, at: str) -> dict[str, int]:
    if not isinstance(value, dict) or len(value) > MAX_FAMILIES:
        raise Malformed(f"{at}: not an object of at most {MAX_FAMILIES} members")
    return {name(family, at): integer(count, f"{at}.{family}") for family, count in value.items()}
