"""Signs verdicts. The only file that touches the attestation key.

Order, each step durable before the next: verdict, protection row, signature, attestation. A crash between any two
runs the same path again and signs the same bytes.
"""

import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Protocol

from proof import attestation, eip712, merkle
from proof.attestation import EXPIRED, FAIL, PASS, PaymentAttestation, SignedAttestation
from proof.digest import DIGEST_BYTES, canonical
from proof.errors import Conflict, Malformed
from proof.messages import Challenge, Commitment, Task, Verdict
from proof.policy import policy
from verifier import keystore
from verifier.keystore import Exists
from verifier.remote_signer import RemoteSigner
from verifier.settings import Settings
from verifier.store import Outcome, Store

FULL_SCORE = 100
EPOCH = 0
NOBODY = "0x" + "00" * 20  # the payee of a task that no worker committed to
NOTHING = bytes(DIGEST_BYTES)


class Signer(Protocol):
    """Signs as one address; a committee of one."""

    @property
    def address(self) -> str: ...

    def sign(self, preimage: bytes) -> bytes:
        """The signature of keccak256(preimage). Raises Unavailable when it cannot be had just now."""


@dataclass(frozen=True)
class LocalSigner:
    """A key in this process."""

    address: str
    _key: bytes = field(repr=False)

    def sign(self, preimage: bytes) -> bytes:
        return eip712.sign(eip712.keccak(preimage), self._key)


def signer_from(settings: Settings) -> Signer:
    """What signs here, by the settings: a remote signer, or a file with the key. Raises Malformed saying what to do."""
    if settings.signer_url:
        return RemoteSigner(settings.signer_url, (settings.signer_address or "").lower(), settings.signer_token)
    path = settings.key or settings.default_key
    if keystore.read_private(path).lstrip()[:1] != b"{":
        key = attestation.read_key(path)
    else:
        key = keystore.open_key(path, _password(settings))
    return LocalSigner(keystore.address(key), key)


def create(settings: Settings) -> None:
    """Make the default key unless it is there; of two that start together the first wins."""
    with suppress(Exists):
        new_key(settings)


def new_key(settings: Settings, key: bytes | None = None) -> str:
    """Encrypt a key, a fresh one if none is given, as the default key; returns its address.

    Its password is the one that the settings name, or a random one, which is written beside it. Raises Exists when
    there is a default key, and makes no password for it then.
    """
    if settings.default_key.exists():
        raise Exists(f"{settings.default_key} exists: a key is never overwritten")
    if settings.key_password is None:
        with suppress(FileExistsError):
            keystore.write_private(settings.default_password, secrets.token_hex(keystore.PASSWORD_BYTES).encode())
    return keystore.create(settings.default_key, _password(settings), key)


def committee(signer: Signer) -> bytes:
    return attestation.committee_id([signer.address], threshold=1, epoch=EPOCH)


def attest(
    store: Store, signer: Signer, tasks: Sequence[str], validity: int, now: float
) -> Mapping[str, SignedAttestation | Conflict]:
    """Sign what became of tasks that are judged or lapsed, `validity` seconds long.

    For a task of which something else was signed before, nothing is signed: its Conflict is returned. Raises
    Unavailable when a store or the signer does not answer; the next attempt signs what is protected by then.
    """
    outcomes = store.outcomes(tasks)
    statements = {task: statement(outcomes[task], signer, validity) for task in tasks}
    protected = store.protect(list(statements.values()), now)
    signed = {
        task: said if isinstance(said, Conflict) else _signed(said, wanted, signer)
        for (task, wanted), said in zip(statements.items(), protected, strict=True)
    }
    store.attest([one for one in signed.values() if isinstance(one, SignedAttestation)], now)
    return signed


def _signed(protected: PaymentAttestation, wanted: PaymentAttestation, signer: Signer) -> SignedAttestation | Conflict:
    """Sign what is protected, which may be older than what is wanted, or from another record, and say no more."""
    times = {name: getattr(protected, name) for name in ("issued_at", "not_before", "expires_at")}
    if replace(wanted, **times) != protected:
        return Conflict(f"task {wanted.task_id.hex()}: what is protected says something else than the record")
    return SignedAttestation(protected, signer.address, signer.sign(protected.preimage()))


def statement(outcome: Outcome, signer: Signer, validity: int) -> PaymentAttestation:
    """What an outcome is worth: the reward to its worker, or nothing. A function of the record alone."""
    task, verdict, bound = outcome.task, outcome.verdict, outcome.commitment
    accepted = verdict is not None and verdict.verdict == "accepted"
    rules, issued = policy(task.policy), int(outcome.at)
    return PaymentAttestation(
        chain_id=task.reward.chain_id,
        contract=task.reward.contract,
        task_id=task.id(),
        nonce=task.nonce,
        evidence_hash=evidence_hash(task, bound, outcome.challenge, verdict),
        output_root=output_root(bound, outcome.outputs) if verdict and bound else NOTHING,
        model_id=task.model,
        policy_hash=rules.hash(),
        committee_id=committee(signer),
        ref_uid=NOTHING,
        payer=task.payer,
        payee=bound.worker if bound and bound.worker else NOBODY,
        token=task.reward.token,
        amount=task.reward.amount if accepted else 0,
        verdict=PASS if accepted else FAIL if verdict else EXPIRED,
        score=FULL_SCORE if accepted else 0,
        soundness_bits=rules.soundness_bits if accepted else 0,
        issued_at=issued,
        not_before=issued,
        expires_at=issued + validity,
    )


def evidence_hash(
    task: Task, commitment: Commitment | None, challenge: Challenge | None, verdict: Verdict | None
) -> bytes:
    """SHA-256 of the canonical JSON of everything that led to the verdict; a bundle holds all of it."""
    evidence = {
        "task": task.to_json(),
        "commitment": commitment and commitment.digest().hex(),
        "challenge": challenge and challenge.to_json(),
        "verdict": verdict and verdict.to_json(),
    }
    return sha256(canonical(evidence)).digest()


def output_root(commitment: Commitment, outputs: tuple[str, ...]) -> bytes:
    """The root over the claims of the graph outputs, in the order of the graph."""
    claims = {claim.name: claim for claim in commitment.tensors}
    digests = [claims[name].digest() for name in outputs if name in claims]
    return merkle.root_hash(merkle.build(merkle.BLAKE3, digests))


def _password(settings: Settings) -> bytes:
    path = settings.key_password or settings.default_password
    found = keystore.read_private(path).rstrip(b"\r\n")
    if not found:
        raise Malformed(f"{path}: it holds no password")
    return found
