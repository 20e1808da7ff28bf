"""Two signed attestations that contradict each other: proof that a signer said two things of one task.

A signer may repeat itself, and may not say anything else for the same (committee, task, nonce). Who holds two such
statements can show them to anybody.
"""

from dataclasses import dataclass

from proof.attestation import SignedAttestation, verify
from proof.errors import Malformed, Rejected
from proof.messages import Json


@dataclass(frozen=True)
class Equivocation:
    """Both statements, valid and signed by the same signer."""

    first: SignedAttestation
    second: SignedAttestation

    def to_json(self) -> Json:
        said = self.first.attestation
        return {
            "format": "assay-equivocation/1",
            "signer": self.first.signer,
            "task": said.task_id.hex(),
            "nonce": said.nonce.hex(),
            "uids": sorted(one.attestation.digest().hex() for one in (self.first, self.second)),
            "first": self.first.to_json(),
            "second": self.second.to_json(),
        }


def equivocation(first: SignedAttestation, second: SignedAttestation) -> Equivocation | None:
    """The evidence, or None when both say the same.

    Raises Malformed when the two are not about one task by one signer, or one of them is not signed by whom it names.
    """
    for one in (first, second):
        try:
            verify(one, one.signer)
        except Rejected as rejection:
            raise Malformed(f"not evidence: {rejection.detail}") from rejection
    keys = [(one.signer, a.committee_id, a.task_id, a.nonce) for one in (first, second) for a in (one.attestation,)]
    if keys[0] != keys[1]:
        raise Malformed("not evidence: the attestations are of different signers, tasks or nonces")
    if first.attestation.digest() == second.attestation.digest():
        return None
    return Equivocation(first, second)
