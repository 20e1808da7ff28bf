"""Signs verdicts. The only file that touches the attestation key.

Order, each step durable before the next: verdict, protection row, signature, attestation. A crash between any two
runs the same path again and signs the same bytes.
"""

import os
import secrets
import stat
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from proof import attestation, merkle
from proof.attestation import FAIL, PASS, PaymentAttestation, SignedAttestation
from proof.digest import canonical
from proof.eip712 import KEY_BYTES
from proof.errors import Malformed
from proof.messages import Challenge, Commitment, Task, Verdict
from proof.policy import policy
from verifier.store import Judged, Store

FULL_SCORE = 100
EPOCH = 0


@dataclass(frozen=True)
class Signer:
    """A committee of one."""

    address: str
    _key: bytes = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> "Signer":
        """Raises Malformed for a file that others can read, or that holds no key."""
        if not path.is_file():
            raise Malformed(f"{path}: there is no attestation key; name its file in ASSAY_KEY_FILE")
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise Malformed(f"{path}: others can read the key; set its mode to 0600")
        key = attestation.read_key(path)
        return cls(attestation.key_address(key), key)

    @classmethod
    def create(cls, path: Path) -> "Signer":
        """Open the key, made first where there is none yet."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            partial = path.with_name(f".{secrets.token_hex(8)}")
            descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(KEY_BYTES))
                file.flush()
                os.fsync(descriptor)
            try:
                os.link(partial, path)  # the first of two that start together wins
            except FileExistsError:
                pass
            finally:
                partial.unlink()
        return cls.open(path)

    @property
    def committee(self) -> bytes:
        return attestation.committee_id([self.address], threshold=1, epoch=EPOCH)

    def attest(self, store: Store, task: str, validity: int, now: float) -> SignedAttestation:
        """Sign the stored verdict of a task. Raises Conflict, and signs nothing, if another one was signed."""
        statement = self.statement(store.judged(task), validity)
        protected = store.protect(statement, now)
        signed = attestation.sign(protected, self._key)
        store.attest(signed, now)
        return signed

    def statement(self, judged: Judged, validity: int) -> PaymentAttestation:
        """What a verdict is worth: the reward to its worker, or nothing. A function of the record alone."""
        task, verdict = judged.task, judged.verdict
        accepted = verdict.verdict == "accepted"
        rules, issued = policy(task.policy), int(judged.at)
        return PaymentAttestation(
            chain_id=task.reward.chain_id,
            contract=task.reward.contract,
            task_id=task.id(),
            nonce=task.nonce,
            evidence_hash=evidence_hash(task, judged.commitment, judged.challenge, verdict),
            output_root=output_root(judged.commitment, judged.outputs),
            model_id=task.model,
            policy_hash=rules.hash(),
            committee_id=self.committee,
            ref_uid=bytes(32),
            payer=task.payer,
            payee=judged.commitment.worker or "",
            token=task.reward.token,
            amount=task.reward.amount if accepted else 0,
            verdict=PASS if accepted else FAIL,
            score=FULL_SCORE if accepted else 0,
            soundness_bits=rules.soundness_bits if accepted else 0,
            issued_at=issued,
            not_before=issued,
            expires_at=issued + validity,
        )


def evidence_hash(task: Task, commitment: Commitment, challenge: Challenge, verdict: Verdict) -> bytes:
    """SHA-256 of the canonical JSON of everything that led to the verdict; a bundle holds all of it."""
    evidence = {
        "task": task.to_json(),
        "commitment": commitment.digest().hex(),
        "challenge": challenge.to_json(),
        "verdict": verdict.to_json(),
    }
    return sha256(canonical(evidence)).digest()


def output_root(commitment: Commitment, outputs: tuple[str, ...]) -> bytes:
    """The root over the claims of the graph outputs, in the order of the graph."""
    claims = {claim.name: claim for claim in commitment.tensors}
    digests = [claims[name].digest() for name in outputs if name in claims]
    return merkle.root_hash(merkle.build(merkle.BLAKE3, digests))
