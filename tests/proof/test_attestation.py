"""Attestations: the digest is EIP-712's, computed three ways, and no signature but the right one passes."""

import json
from dataclasses import fields, replace

import pytest
from eth_abi.abi import encode
from eth_account import Account
from eth_account.messages import encode_typed_data
from eth_utils.crypto import keccak
from hypothesis import given
from hypothesis import strategies as st

from proof import attestation as att
from proof.attestation import FAIL, PASS, PaymentAttestation, SignedAttestation
from proof.digest import canonical
from proof.errors import Malformed, Reason, Rejected
from proof.messages import Commitment, Reward, TensorClaim

KEY, OTHER_KEY = bytes([7] * 32), bytes([8] * 32)
SIGNER, OTHER = att.key_address(KEY), att.key_address(OTHER_KEY)
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
REWARD = Reward(1, "0x" + "11" * 20, "0x" + "22" * 20, 5)

TYPES = [
    ("bytes32", "taskId"),
    ("bytes32", "nonce"),
    ("bytes32", "evidenceHash"),
    ("bytes32", "outputRoot"),
    ("bytes32", "modelId"),
    ("bytes32", "policyHash"),
    ("bytes32", "committeeId"),
    ("bytes32", "refUID"),
    ("address", "payer"),
    ("address", "payee"),
    ("address", "token"),
    ("uint256", "amount"),
    ("uint8", "verdict"),
    ("uint8", "score"),
    ("uint16", "soundnessBits"),
    ("uint64", "issuedAt"),
    ("uint64", "notBefore"),
    ("uint64", "expiresAt"),
]
DIGESTS = st.binary(min_size=32, max_size=32)
ADDRESSES = st.binary(min_size=20, max_size=20).map(lambda raw: "0x" + raw.hex())
SECONDS = st.integers(0, 2**53 - 1)
ATTESTATIONS = st.builds(
    PaymentAttestation,
    chain_id=SECONDS,
    contract=ADDRESSES,
    task_id=DIGESTS,
    nonce=DIGESTS,
    evidence_hash=DIGESTS,
    output_root=DIGESTS,
    model_id=DIGESTS,
    policy_hash=DIGESTS,
    committee_id=DIGESTS,
    ref_uid=DIGESTS,
    payer=ADDRESSES,
    payee=ADDRESSES,
    token=ADDRESSES,
    amount=st.integers(0, 2**256 - 1),
    verdict=st.sampled_from([PASS, FAIL]),
    score=st.integers(0, 100),
    soundness_bits=st.integers(0, 2**16 - 1),
    issued_at=SECONDS,
    not_before=SECONDS,
    expires_at=SECONDS,
)
EXAMPLE = PaymentAttestation(
    chain_id=1,
    contract="0x" + "11" * 20,
    task_id=bytes([1] * 32),
    nonce=bytes([2] * 32),
    evidence_hash=bytes([3] * 32),
    output_root=bytes([4] * 32),
    model_id=bytes([5] * 32),
    policy_hash=bytes([6] * 32),
    committee_id=bytes([7] * 32),
    ref_uid=bytes(32),
    payer="0x" + "33" * 20,
    payee="0x" + "44" * 20,
    token="0x" + "22" * 20,
    amount=10**18,
    verdict=PASS,
    score=100,
    soundness_bits=16,
    issued_at=1_800_000_000,
    not_before=1_800_000_000,
    expires_at=1_900_000_000,
)
SIGNED = att.sign(EXAMPLE, KEY)


def values(attestation):
    return [getattr(attestation, field.name) for field in fields(attestation)][2:]


def separator(chain_id, contract):
    """The domain separator by hand."""
    kind = b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
    members = [keccak(kind), keccak(b"Assay"), keccak(b"1"), chain_id, contract]
    return keccak(encode(["bytes32", "bytes32", "bytes32", "uint256", "address"], members))


def by_hand(declaration, kinds, members, chain_id, contract):
    """(struct hash, digest) from abi.encode and keccak alone: no member is of dynamic size."""
    struct = keccak(encode(["bytes32", *kinds], [keccak(declaration.encode()), *members]))
    return struct, keccak(b"\x19\x01" + separator(chain_id, contract) + struct)


@given(ATTESTATIONS)
def test_the_digest_is_the_one_computed_by_hand(attestation):
    declaration = "PaymentAttestation(" + ",".join(f"{kind} {name}" for kind, name in TYPES) + ")"
    struct, digest = by_hand(
        declaration, [kind for kind, _ in TYPES], values(attestation), attestation.chain_id, attestation.contract
    )
    assert (attestation.struct_hash(), attestation.digest()) == (struct, digest)


@given(ATTESTATIONS)
def test_the_json_is_what_eip_712_tools_take(attestation):
    """`domain` and `message` of the JSON go into eth_account (or viem, ethers) as they are."""
    value = json.loads(canonical(attestation.to_json()))
    message = value["message"] | {"amount": int(value["message"]["amount"])}
    types = {"PaymentAttestation": [{"name": name, "type": kind} for kind, name in TYPES]}
    signable = encode_typed_data(value["domain"], types, message)
    digest = keccak(b"\x19" + signable.version + signable.header + signable.body)
    assert attestation.digest() == digest
    signature = Account.sign_message(signable, KEY).signature
    att.verify(SignedAttestation(attestation, SIGNER, bytes(signature)), SIGNER)


@given(ATTESTATIONS)
def test_an_attestation_comes_back(attestation):
    signed = SignedAttestation(attestation, SIGNER, bytes(65))
    assert SignedAttestation.from_json(json.loads(canonical(signed.to_json()))) == signed
    assert PaymentAttestation.from_json(attestation.to_json()) == attestation


@pytest.mark.parametrize("name", [field.name for field in fields(PaymentAttestation)])
def test_every_field_is_signed(name):
    value = getattr(EXAMPLE, name)
    other = value + 1 if isinstance(value, int) else (bytes([9] * 32) if isinstance(value, bytes) else "0x" + "99" * 20)
    with pytest.raises(Rejected) as rejection:
        att.verify(replace(SIGNED, attestation=replace(EXAMPLE, **{name: other})), SIGNER)
    assert rejection.value.reason is Reason.SIGNATURE


def test_the_signer_may_be_named_in_either_case():
    att.verify(SIGNED, SIGNER)
    att.verify(SIGNED, Account.from_key(KEY).address)
    assert SIGNED.signer == SIGNER
    assert int.from_bytes(SIGNED.signature[32:64], "big") <= ORDER // 2


def high_s(signature):
    """The other spelling of a signature, which EIP-2 forbids: s replaced by n - s, and v turned."""
    s = ORDER - int.from_bytes(signature[32:64], "big")
    return signature[:32] + s.to_bytes(32, "big") + bytes([55 - signature[64]])


SIGNATURE_LIES = {
    "another signer": lambda s: att.sign(EXAMPLE, OTHER_KEY),
    "another name": lambda s: replace(s, signer=OTHER),
    "high s": lambda s: replace(s, signature=high_s(s.signature)),
    "v of 0": lambda s: replace(s, signature=s.signature[:64] + bytes([s.signature[64] - 27])),
    "the other v": lambda s: replace(s, signature=s.signature[:64] + bytes([55 - s.signature[64]])),
    "zeros": lambda s: replace(s, signature=bytes(65)),
    "zeros with v": lambda s: replace(s, signature=bytes(64) + b"\x1b"),
    "r beyond the order": lambda s: replace(s, signature=b"\xff" * 32 + s.signature[32:]),
    "s of 0": lambda s: replace(s, signature=s.signature[:32] + bytes(32) + s.signature[64:]),
    "a byte too few": lambda s: replace(s, signature=s.signature[:64]),
    "a byte too many": lambda s: replace(s, signature=s.signature + b"\0"),
}


@pytest.mark.parametrize("lie", SIGNATURE_LIES.values(), ids=SIGNATURE_LIES.keys())
def test_no_lie_is_signed(lie):
    with pytest.raises(Rejected) as rejection:
        att.verify(lie(SIGNED), SIGNER)
    assert rejection.value.reason is Reason.SIGNATURE


@given(st.binary(min_size=65, max_size=65))
def test_no_random_signature_passes(signature):
    with pytest.raises(Rejected):
        att.verify(replace(SIGNED, signature=signature), SIGNER)


JSON_LIES = {
    "another name of the domain": ("domain", {"name": "Essay"}),
    "another version": ("domain", {"version": "2"}),
    "a chain of text": ("domain", {"chainId": "1"}),
    "a contract in capitals": ("domain", {"verifyingContract": "0x" + "AB" * 20}),
    "another field": ("message", {"tip": 1}),
    "verdict unset": ("message", {"verdict": 0}),
    "verdict 4": ("message", {"verdict": 4}),
    "a score of 101": ("message", {"score": 101}),
    "bits beyond uint16": ("message", {"soundnessBits": 2**16}),
    "a numeric amount": ("message", {"amount": 1}),
    "an amount beyond uint256": ("message", {"amount": str(2**256)}),
    "a task without 0x": ("message", {"taskId": "01" * 32}),
    "a task of 31 bytes": ("message", {"taskId": "0x" + "01" * 31}),
}


@pytest.mark.parametrize(("part", "change"), JSON_LIES.values(), ids=JSON_LIES.keys())
def test_no_lie_is_decoded(part, change):
    value = SIGNED.to_json()
    with pytest.raises(Malformed, match=f"^attestation.{part}"):
        SignedAttestation.from_json(value | {part: value[part] | change})


@given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["domain", "message", "signer", "signature"]), inner)
        ),
    )
)
def test_any_json_is_malformed(value):
    with pytest.raises(Malformed):
        SignedAttestation.from_json(value)


# The worker's signatures.

CLAIM = TensorClaim("x", "F32", (2, 3), bytes(32))
TASK_ID = bytes([1] * 32)
UNSIGNED = Commitment(bytes([2] * 32), TASK_ID, (CLAIM,))


def test_a_worker_signs_its_commitment():
    commitment = att.sign_commitment(UNSIGNED, REWARD, KEY)
    att.verify_commitment_signature(commitment, REWARD)
    assert commitment.worker == SIGNER
    assert Commitment.from_json(commitment.to_json()) == commitment
    declaration = "WorkCommitment(bytes32 taskId,bytes32 modelId,bytes32 root)"
    members = [TASK_ID, UNSIGNED.model, UNSIGNED.root()]
    _, digest = by_hand(declaration, ["bytes32"] * 3, members, REWARD.chain_id, REWARD.contract)
    assert commitment.signature == bytes(Account.unsafe_sign_hash(digest, KEY).signature)


COMMITMENT_LIES = {
    "another worker": lambda c: (replace(c, worker=OTHER), REWARD),
    "another task": lambda c: (replace(c, task=bytes(32)), REWARD),
    "another model": lambda c: (replace(c, model=bytes(32)), REWARD),
    "another tensor": lambda c: (replace(c, tensors=(replace(CLAIM, root=bytes([1] * 32)),)), REWARD),
    "another chain": lambda c: (c, replace(REWARD, chain_id=2)),
    "another contract": lambda c: (c, replace(REWARD, contract=REWARD.token)),
    "no signature": lambda c: (UNSIGNED, REWARD),
}


@pytest.mark.parametrize("lie", COMMITMENT_LIES.values(), ids=COMMITMENT_LIES.keys())
def test_no_other_commitment_is_signed(lie):
    with pytest.raises(Rejected) as rejection:
        att.verify_commitment_signature(*lie(att.sign_commitment(UNSIGNED, REWARD, KEY)))
    assert rejection.value.reason is Reason.SIGNATURE


def test_an_offline_commitment_is_not_signed():
    with pytest.raises(ValueError, match="no task"):
        att.sign_commitment(Commitment(bytes(32), None, (CLAIM,)), REWARD, KEY)


# Committees and keys.


def test_a_committee_is_its_members_threshold_and_epoch():
    members = sorted([SIGNER, OTHER])
    expected = keccak(encode(["uint64", "uint16", "address[]"], [3, 1, members]))
    assert att.committee_id([SIGNER, OTHER], 1, 3) == expected
    assert att.committee_id(reversed([SIGNER, Account.from_key(OTHER_KEY).address]), 1, 3) == expected
    assert len({att.committee_id(*case) for case in (([SIGNER], 1, 3), (members, 2, 3), (members, 1, 4))}) == 3


@pytest.mark.parametrize(("members", "threshold"), [([], 0), ([SIGNER], 0), ([SIGNER], 2), ([SIGNER, SIGNER], 1)])
def test_no_committee_is_out_of_reach(members, threshold):
    with pytest.raises(ValueError, match="threshold"):
        att.committee_id(members, threshold, 0)


@pytest.mark.parametrize("text", [KEY.hex(), "0x" + KEY.hex() + "\n", KEY.hex().upper()])
def test_a_key_is_read_from_hex(tmp_path, text):
    (tmp_path / "key").write_text(text)
    assert att.read_key(tmp_path / "key") == KEY


@pytest.mark.parametrize("text", ["", KEY.hex()[:-1], KEY.hex() * 2, "\0" * 64, "0x0x" + KEY.hex()])
def test_what_is_no_key_is_malformed_and_not_shown(tmp_path, text):
    (tmp_path / "key").write_text(text)
    with pytest.raises(Malformed) as failure:
        att.read_key(tmp_path / "key")
    assert KEY.hex()[:8] not in str(failure.value)


@pytest.mark.parametrize("key", [bytes(32), b"\xff" * 32, KEY + b"!", KEY[:31]])
def test_a_key_outside_the_curve_is_not_shown(key):
    with pytest.raises(ValueError) as failure:  # noqa: PT011
        att.key_address(key)
    assert key.hex()[:20] not in str(failure.value)
    assert repr(key)[2:20] not in str(failure.value)
