"""The signed payment attestation, and the worker's signatures on commitments and uploads (EIP-712, eip712.py).

Nothing here reads a clock. An address that somebody names may be in any case.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from proof import eip712, encoding
from proof.digest import DIGEST_BYTES
from proof.eip712 import DOMAIN, KEY_BYTES, keccak
from proof.errors import Malformed, Reason, Rejected
from proof.messages import SIGNATURE_BYTES, Commitment, Json, Reward

PASS, FAIL, EXPIRED = 1, 2, 3  # 0 is unset: never signed, never decoded
MAX_SCORE = 100
PAYMENT_ATTESTATION = (
    "PaymentAttestation(bytes32 taskId,bytes32 nonce,bytes32 evidenceHash,bytes32 outputRoot,bytes32 modelId,"
    "bytes32 policyHash,bytes32 committeeId,bytes32 refUID,address payer,address payee,address token,uint256 amount,"
    "uint8 verdict,uint8 score,uint16 soundnessBits,uint64 issuedAt,uint64 notBefore,uint64 expiresAt)"
)
WORK_COMMITMENT = "WorkCommitment(bytes32 taskId,bytes32 modelId,bytes32 root)"

_ARRAY_OFFSET = 96  # where abi.encode puts an array behind two static values and itself
_KEY = re.compile(r"(?:0x)?([0-9a-fA-F]{64})\s*")


@dataclass(frozen=True, kw_only=True)
class PaymentAttestation:
    """That a task was checked, and what may be paid for it; two fields of the domain, then the struct in its order."""

    chain_id: int
    contract: str
    task_id: bytes
    nonce: bytes
    evidence_hash: bytes
    output_root: bytes
    model_id: bytes
    policy_hash: bytes
    committee_id: bytes
    ref_uid: bytes
    payer: str
    payee: str
    token: str
    amount: int
    verdict: int  # PASS, FAIL, or EXPIRED: the deadline passed, and nothing was checked
    score: int  # 0 to 100
    soundness_bits: int
    issued_at: int  # Unix seconds, like the next two
    not_before: int
    expires_at: int

    def struct_hash(self) -> bytes:
        return eip712.struct_hash(PAYMENT_ATTESTATION, list(asdict(self).values())[2:])

    def digest(self) -> bytes:
        """What is signed; also the attestation's uid."""
        return eip712.keccak(self.preimage())

    def preimage(self) -> bytes:
        """What a signer hashes itself with Keccak-256."""
        return eip712.preimage(self.struct_hash(), self.chain_id, self.contract)

    def to_json(self) -> Json:
        """Domain and message as tools for EIP-712 take them."""
        values = list(asdict(self).values())[2:]
        members = zip(eip712.members(PAYMENT_ATTESTATION), values, strict=True)
        return {
            "domain": {**DOMAIN, "chainId": self.chain_id, "verifyingContract": self.contract},
            "message": {member: _wire(kind, value) for (kind, member), value in members},
        }

    @classmethod
    def from_json(cls, value: object, at: str = "attestation") -> Self:
        domain, message = encoding.fields(value, at, ("domain", "message"))
        *named, chain_id, contract = encoding.fields(domain, f"{at}.domain", (*DOMAIN, "chainId", "verifyingContract"))
        if named != list(DOMAIN.values()):
            raise Malformed(f"{at}.domain: not {DOMAIN}")
        members = eip712.members(PAYMENT_ATTESTATION)
        given = encoding.fields(message, f"{at}.message", [member for _, member in members])
        values: list[Any] = [
            encoding.integer(chain_id, f"{at}.domain.chainId"),
            encoding.address(contract, f"{at}.domain.verifyingContract"),
        ]
        for (kind, member), item in zip(members, given, strict=True):
            values.append(_value(kind, item, f"{at}.message.{member}"))
        result = cls(**dict(zip((entry.name for entry in fields(cls)), values, strict=True)))
        if result.verdict not in (PASS, FAIL, EXPIRED):
            raise Malformed(f"{at}.message.verdict: none of {PASS}, {FAIL} and {EXPIRED}")
        if result.score > MAX_SCORE:
            raise Malformed(f"{at}.message.score: more than {MAX_SCORE}")
        return result


@dataclass(frozen=True)
class SignedAttestation:
    attestation: PaymentAttestation
    signer: str
    signature: bytes

    def to_json(self) -> Json:
        signature = "0x" + self.signature.hex()
        return {**self.attestation.to_json(), "signer": self.signer, "signature": signature}

    @classmethod
    def from_json(cls, value: object, at: str = "attestation") -> Self:
        domain, message, signer, signature = encoding.fields(value, at, ("domain", "message", "signer", "signature"))
        return cls(
            attestation=PaymentAttestation.from_json({"domain": domain, "message": message}, at),
            signer=encoding.address(signer, f"{at}.signer"),
            signature=encoding.prefixed(signature, f"{at}.signature", SIGNATURE_BYTES),
        )


def read_key(path: Path) -> bytes:
    """A private key from a file of 64 hex digits. Raises Malformed, which does not show them."""
    with path.open("rb") as file:
        found = _KEY.fullmatch(file.read(2 * KEY_BYTES + 16).decode("latin-1"))
    if not found:
        raise Malformed(f"{path}: not a private key of {2 * KEY_BYTES} hex digits")
    return bytes.fromhex(found[1])


def key_address(private_key: bytes) -> str:
    return eip712.address_of(private_key)


def sign(attestation: PaymentAttestation, private_key: bytes) -> SignedAttestation:
    signature = eip712.sign(attestation.digest(), private_key)
    return SignedAttestation(attestation, key_address(private_key), signature)


def verify(signed: SignedAttestation, signer: str) -> None:
    """Check that `signer` signed. Raises Rejected; dates and amounts are for the caller to compare."""
    _match(signed.attestation.digest(), signed.signature, signer)
    if signed.signer != signer.lower():
        raise Rejected(Reason.SIGNATURE, f"names {signed.signer}, signed by {signer.lower()}")


def sign_commitment(commitment: Commitment, reward: Reward, private_key: bytes) -> Commitment:
    """The commitment with its worker and the worker's signature, in the domain of the task's reward."""
    signature = eip712.sign(_work(commitment, reward), private_key)
    return commitment.signed(key_address(private_key), signature)


def verify_commitment_signature(commitment: Commitment, reward: Reward) -> None:
    """Check that the worker it names signed. Raises Rejected."""
    if commitment.task is None or commitment.worker is None or commitment.signature is None:
        raise Rejected(Reason.SIGNATURE, "the commitment is not signed for a task")
    _match(_work(commitment, reward), commitment.signature, commitment.worker)


def committee_id(addresses: Iterable[str], threshold: int, epoch: int) -> bytes:
    """keccak256(abi.encode(uint64 epoch, uint16 threshold, address[] members)), members ascending."""
    listed = sorted(address.lower() for address in addresses)
    if not 0 < threshold <= len(set(listed)) == len(listed):
        raise ValueError(f"a threshold of {threshold} among {len(set(listed))} distinct members")
    head = [("uint64", epoch), ("uint16", threshold), ("uint256", _ARRAY_OFFSET), ("uint256", len(listed))]
    return keccak(b"".join(eip712.word(kind, value) for kind, value in head + [("address", at) for at in listed]))


def _work(commitment: Commitment, reward: Reward) -> bytes:
    if commitment.task is None:
        raise ValueError("a commitment to no task is not signed")
    values = (commitment.task, commitment.model, commitment.root())
    return eip712.digest(eip712.struct_hash(WORK_COMMITMENT, values), reward.chain_id, reward.contract)


def _match(digest: bytes, signature: bytes, signer: str) -> None:
    recovered = eip712.recover(digest, signature)
    if recovered != signer.lower():
        raise Rejected(Reason.SIGNATURE, f"signed by {recovered}, not {signer.lower()}")


def _wire(kind: str, value: Any) -> Any:
    if kind == "bytes32":
        return "0x" + value.hex()
    return str(value) if kind == "uint256" else value


def _value(kind: str, value: object, at: str) -> Any:
    if kind == "bytes32":
        return encoding.prefixed(value, at, DIGEST_BYTES)
    if kind == "address":
        return encoding.address(value, at)
    if kind == "uint256":
        return encoding.decimal(value, at, 256)
    return encoding.integer(value, at, min(2 ** int(kind.removeprefix("uint")) - 1, encoding.MAX_INTEGER))
