"""Two statements of one signer on one task: evidence if they differ, and nothing else is."""

from dataclasses import replace

import pytest

from proof.attestation import EXPIRED, FAIL, PASS, PaymentAttestation, committee_id, key_address, sign
from proof.equivocation import equivocation
from proof.errors import Malformed

KEY, OTHER = bytes([7] * 32), bytes([8] * 32)
SAID = PaymentAttestation(
    chain_id=31337,
    contract="0x" + "c0" * 20,
    task_id=bytes([1] * 32),
    nonce=bytes([2] * 32),
    evidence_hash=bytes([3] * 32),
    output_root=bytes(32),
    model_id=bytes([4] * 32),
    policy_hash=bytes(32),
    committee_id=committee_id([key_address(KEY)], 1, 0),
    ref_uid=bytes(32),
    payer="0x" + "9a" * 20,
    payee="0x" + "9b" * 20,
    token="0x" + "70" * 20,
    amount=5,
    verdict=PASS,
    score=100,
    soundness_bits=20,
    issued_at=1_800_000_000,
    not_before=1_800_000_000,
    expires_at=1_900_000_000,
)
CONTRADICTIONS = [
    {"verdict": FAIL, "amount": 0},
    {"verdict": EXPIRED, "amount": 0},
    {"amount": 6},
    {"expires_at": 2**40},
]


@pytest.mark.parametrize("change", CONTRADICTIONS)
def test_two_different_statements_are_evidence(change):
    first, second = sign(SAID, KEY), sign(replace(SAID, **change), KEY)
    told = equivocation(first, second).to_json()
    assert (told["signer"], told["task"]) == (key_address(KEY), SAID.task_id.hex())
    assert told["uids"] == sorted({first.attestation.digest().hex(), second.attestation.digest().hex()})
    assert len(told["uids"]) == 2


def test_repeating_oneself_is_none():
    assert equivocation(sign(SAID, KEY), sign(SAID, KEY)) is None


UNRELATED = {
    "another task": lambda: sign(replace(SAID, task_id=bytes(32)), KEY),
    "another nonce": lambda: sign(replace(SAID, nonce=bytes(32)), KEY),
    "another signer": lambda: sign(replace(SAID, verdict=FAIL), OTHER),
    "another committee": lambda: sign(replace(SAID, verdict=FAIL, committee_id=bytes(32)), KEY),
    "a forged signature": lambda: replace(sign(replace(SAID, verdict=FAIL), OTHER), signer=key_address(KEY)),
    "a signature of other words": lambda: replace(sign(SAID, KEY), attestation=replace(SAID, verdict=FAIL)),
}


@pytest.mark.parametrize("other", UNRELATED.values(), ids=UNRELATED.keys())
def test_what_proves_nothing_is_malformed(other):
    for pair in ((sign(SAID, KEY), other()), (other(), sign(SAID, KEY))):
        with pytest.raises(Malformed, match="not evidence"):
            equivocation(*pair)
