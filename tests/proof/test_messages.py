"""Messages: what is written is read again, and nothing else is read."""

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proof import encoding, merkle
from proof.digest import canonical
from proof.errors import Malformed, Reason
from proof.graph import DTYPES
from proof.messages import Challenge, Commitment, Reward, Task, TensorClaim, Verdict
from proof.policy import POLICIES

DIGESTS = st.binary(min_size=32, max_size=32)
ADDRESSES = st.binary(min_size=20, max_size=20).map(lambda raw: "0x" + raw.hex())
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
NUMBERS = st.integers(0, 2**53 - 1)
CLAIMS = st.builds(
    TensorClaim,
    name=NAMES,
    dtype=st.sampled_from(list(DTYPES)),
    shape=st.lists(st.integers(0, 999), max_size=5).map(tuple),
    root=DIGESTS,
)
TUPLES = st.lists(CLAIMS, max_size=4, unique_by=lambda claim: claim.name).map(tuple)
REWARDS = st.builds(Reward, NUMBERS, ADDRESSES, ADDRESSES, st.integers(0, 2**256 - 1))
TASKS = st.builds(Task, DIGESTS, TUPLES, st.sampled_from(list(POLICIES)), REWARDS, ADDRESSES, NUMBERS, DIGESTS)
SIGNED = st.builds(Commitment, DIGESTS, DIGESTS, TUPLES, ADDRESSES, st.binary(min_size=65, max_size=65))
UNSIGNED = st.builds(Commitment, DIGESTS, st.none(), TUPLES)
CHALLENGES = st.builds(Challenge, DIGESTS, st.sampled_from(list(POLICIES)), DIGESTS)
COVERAGE = {
    "rows": st.none() | NUMBERS,
    "policy": st.sampled_from(list(POLICIES)),
    "misses": st.dictionaries(NAMES, st.floats(0, 1), max_size=4),
    "entries": st.dictionaries(NAMES, NUMBERS, max_size=4),
    "task": st.none() | DIGESTS,
    "commitment": DIGESTS,
    "check_seed": DIGESTS,
}
ACCEPTED = st.builds(
    lambda nodes, **fields: Verdict(verdict="accepted", nodes_total=nodes, nodes_checked=nodes, **fields),
    NUMBERS,
    **COVERAGE,
)
REJECTED = st.builds(
    Verdict,
    verdict=st.just("rejected"),
    reason=st.sampled_from(Reason),
    detail=st.text(st.characters(codec="utf-8"), max_size=40),
    node=st.none() | NAMES,
    nodes_total=NUMBERS,
    nodes_checked=NUMBERS,
    **COVERAGE,
)
MESSAGES = CLAIMS | REWARDS | TASKS | SIGNED | UNSIGNED | CHALLENGES | ACCEPTED | REJECTED
KINDS = (TensorClaim, Reward, Task, Commitment, Challenge, Verdict)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70) | ADDRESSES
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)

CLAIM = TensorClaim("x", "F32", (2, 3), bytes(32))
REWARD = Reward(1, "0x" + "11" * 20, "0x" + "22" * 20, 10**18)
TASK = Task(bytes(32), (CLAIM,), "standard", REWARD, "0x" + "33" * 20, 1_900_000_000, bytes(32))
COMMITMENT = Commitment(bytes(32), bytes(32), (CLAIM,), "0x" + "44" * 20, bytes(65))
VERDICT = Verdict(
    verdict="accepted",
    nodes_total=3,
    nodes_checked=3,
    rows=16,
    policy="standard",
    misses={"0.5": 0.5},
    task=None,
    commitment=bytes(32),
    check_seed=bytes(32),
)

LIES = {
    "an unknown field": (TASK, lambda m: m | {"tip": 1}, "task.tip: not a field"),
    "a missing field": (TASK, lambda m: {k: v for k, v in m.items() if k != "nonce"}, "task.nonce: missing"),
    "not an object": (TASK, lambda m: [m], "task: not an object"),
    "uppercase hex": (TASK, lambda m: m | {"model": "AB" * 32}, "task.model: not 64 lowercase hex digits"),
    "prefixed hex": (TASK, lambda m: m | {"model": "0x" + "ab" * 31}, "task.model:"),
    "short hex": (TASK, lambda m: m | {"nonce": "ab" * 31}, "task.nonce:"),
    "hex with a newline": (TASK, lambda m: m | {"nonce": "ab" * 31 + "a\n"}, "task.nonce:"),
    "hex of wide digits": (TASK, lambda m: m | {"nonce": "\uff11" * 64}, "task.nonce:"),
    "a number for hex": (TASK, lambda m: m | {"nonce": 0}, "task.nonce:"),
    "a checksummed address": (TASK, lambda m: m | {"payer": "0x" + "Ab" * 20}, "task.payer: not 0x"),
    "an unknown policy": (TASK, lambda m: m | {"policy": "lenient"}, "task.policy: not one of spot"),
    "a policy of another type": (TASK, lambda m: m | {"policy": ["spot"]}, "task.policy:"),
    "a negative deadline": (TASK, lambda m: m | {"deadline": -1}, "task.deadline: not in"),
    "a deadline beyond 2^53": (TASK, lambda m: m | {"deadline": 2**53}, "task.deadline: not in"),
    "a truth value for a number": (TASK, lambda m: m | {"deadline": True}, "task.deadline: not an integer"),
    "a float for a number": (TASK, lambda m: m | {"deadline": 1.0}, "task.deadline: not an integer"),
    "inputs not in an array": (TASK, lambda m: m | {"inputs": {}}, "task.inputs: not an array"),
    "an input twice": (TASK, lambda m: m | {"inputs": m["inputs"] * 2}, "task.inputs: a tensor is named twice"),
    "too many inputs": (TASK, lambda m: m | {"inputs": [0] * 100_001}, "task.inputs: 100001 items"),
    "a wrong input": (TASK, lambda m: m | {"inputs": [m["inputs"][0], 7]}, "task.inputs[1]: not an object"),
    "a numeric amount": (REWARD, lambda m: m | {"amount": 5}, "reward.amount: not a decimal string"),
    "a padded amount": (REWARD, lambda m: m | {"amount": "05"}, "reward.amount: not a decimal string"),
    "a signed amount": (REWARD, lambda m: m | {"amount": "-5"}, "reward.amount: not a decimal string"),
    "an amount of wide digits": (REWARD, lambda m: m | {"amount": "\uff15"}, "reward.amount:"),
    "an amount of 2^256": (REWARD, lambda m: m | {"amount": str(2**256)}, "reward.amount: not below 2^256"),
    "an endless amount": (REWARD, lambda m: m | {"amount": "9" * 9999}, "reward.amount:"),
    "an unknown dtype": (CLAIM, lambda m: m | {"dtype": "F8"}, "tensor.dtype: not one of"),
    "an empty name": (CLAIM, lambda m: m | {"name": ""}, "tensor.name: empty"),
    "a long name": (CLAIM, lambda m: m | {"name": "é" * 513}, "tensor.name: 1026 bytes"),
    "half a surrogate": (CLAIM, lambda m: m | {"name": "\ud800"}, "tensor.name: not Unicode text"),
    "a negative dimension": (CLAIM, lambda m: m | {"shape": [2, -1]}, "tensor.shape[1]: not in"),
    "too many dimensions": (CLAIM, lambda m: m | {"shape": [1] * 17}, "tensor.shape: 17 items"),
    "too many elements": (CLAIM, lambda m: m | {"shape": [2**30, 0, 2**30]}, "tensor.shape: more than"),
    "signed by nobody": (COMMITMENT, lambda m: m | {"worker": None}, "commitment: task, worker and signature"),
    "signed for nothing": (COMMITMENT, lambda m: m | {"task": None}, "commitment: task, worker and signature"),
    "a short signature": (COMMITMENT, lambda m: m | {"signature": "00" * 64}, "commitment.signature:"),
    "no verdict": (VERDICT, lambda m: m | {"verdict": "unsure"}, "verdict.verdict: neither"),
    "a ratio beyond its radius": (VERDICT, lambda m: m | {"largest": {"movement": 1.5}}, "verdict.largest.movement:"),
    "a ratio that is no number": (VERDICT, lambda m: m | {"largest": {"movement": "1"}}, "verdict.largest.movement:"),
    "negative heads": (VERDICT, lambda m: m | {"heads": -1}, "verdict.heads:"),
    "ambiguous by half": (VERDICT, lambda m: m | {"ambiguous": 0.5}, "verdict.ambiguous:"),
    "accepted for a reason": (VERDICT, lambda m: m | {"reason": "shape"}, "verdict.reason: a reason belongs"),
    "rejected for none": (VERDICT, lambda m: m | {"verdict": "rejected"}, "verdict.reason: a reason belongs"),
    "an unknown reason": (VERDICT, lambda m: m | {"reason": "mood"}, "verdict.reason: not one of"),
    "accepted half checked": (VERDICT, lambda m: m | {"nodes_checked": 2}, "verdict.nodes_checked: accepted"),
    "a miss above one": (VERDICT, lambda m: m | {"misses": {"0.5": 1.5}}, "verdict.misses.0.5: not a prob"),
    "entries that are no count": (VERDICT, lambda m: m | {"entries": {"movement": -1}}, "verdict.entries.movement:"),
    "a miss that is NaN": (VERDICT, lambda m: m | {"misses": {"0.5": float("nan")}}, "verdict.misses.0.5:"),
}


@given(MESSAGES)
def test_what_is_written_is_read_again(message):
    assert type(message).from_json(json.loads(canonical(message.to_json()))) == message


@pytest.mark.parametrize(("message", "lie", "field"), LIES.values(), ids=LIES.keys())
def test_a_lie_is_malformed_and_names_its_field(message, lie, field):
    with pytest.raises(Malformed) as failure:
        type(message).from_json(lie(message.to_json()))
    assert str(failure.value).startswith(field)


@pytest.mark.parametrize("kind", KINDS)
@given(value=JSON)
def test_any_json_is_a_message_or_malformed(kind, value):
    try:
        message = kind.from_json(value)
    except Malformed:
        return
    assert message.to_json() == value


@given(MESSAGES, st.data())
def test_a_message_with_another_member_is_a_message_or_malformed(message, data):
    value = message.to_json()
    value[data.draw(st.sampled_from(sorted(value)))] = data.draw(JSON)
    with suppress(Malformed):
        assert type(message).from_json(value).to_json() == value


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_json_or_malformed(data):
    try:
        encoding.parse(data, "data", 1000)
    except Malformed as failure:
        assert str(failure).startswith("data: ")  # noqa: PT017


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1,"a":2}',
        "[NaN]",
        "[-Infinity]",
        "[" * 10**6,
        '["]]]]",' * 10**6,
        '"' + '\\"' * 10**6,
        "1" * 5000,
        "\ufeff{}",
        "{} {}",
        "",
        "{}".encode("utf-16"),
        b"\xff",
        '"' + "a" * 2**24 + '"',
    ],
    ids=lambda text: str(text[:12]),
)
def test_what_json_leaves_open_is_refused(text):
    with pytest.raises(Malformed):
        encoding.parse(text, "text", 2**24)


def test_a_task_is_bound_by_every_field():
    other = bytes([1] * 32)
    variants = [
        TASK,
        replace(TASK, model=other),
        replace(TASK, inputs=()),
        replace(TASK, inputs=(replace(CLAIM, root=other),)),
        replace(TASK, policy="spot"),
        replace(TASK, reward=replace(REWARD, amount=1)),
        replace(TASK, payer=REWARD.token),
        replace(TASK, deadline=1),
        replace(TASK, nonce=other),
    ]
    assert len({variant.id() for variant in variants}) == len(variants)


def test_a_commitment_binds_model_task_and_tensors_but_not_the_signature():
    other = bytes([1] * 32)
    second = replace(CLAIM, name="y")
    variants = [
        COMMITMENT,
        replace(COMMITMENT, model=other),
        replace(COMMITMENT, task=other),
        replace(COMMITMENT, task=None),
        replace(COMMITMENT, tensors=()),
        replace(COMMITMENT, tensors=(CLAIM, second)),
        replace(COMMITMENT, tensors=(second, CLAIM)),
        replace(COMMITMENT, tensors=(replace(CLAIM, dtype="I32"),)),
        replace(COMMITMENT, tensors=(replace(CLAIM, shape=(3, 2)),)),
    ]
    assert len({variant.digest() for variant in variants}) == len(variants)
    assert replace(COMMITMENT, signature=bytes([1] * 65)).digest() == COMMITMENT.digest()


def test_a_tensor_opens_under_the_root_of_a_commitment():
    claims = tuple(replace(CLAIM, name=str(index)) for index in range(5))
    tree = merkle.build(merkle.BLAKE3, [claim.digest() for claim in claims])
    root = Commitment(bytes(32), None, claims).root()
    merkle.verify_inclusion(merkle.BLAKE3, root, 5, 3, claims[3].digest(), merkle.inclusion_path(tree, 3))


def test_messages_need_no_ethereum_library():
    program = "import proof.messages, proof.bundle, sys; sys.exit('eth_account' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
