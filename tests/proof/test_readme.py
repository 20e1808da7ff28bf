"""What proof/README.md shows is real: its tables, its example bytes, its limits."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from proof import attestation, bundle, encoding, graph, merkle, messages, sampling
from proof.attestation import PASS, PaymentAttestation, SignedAttestation
from proof.bundle import Opening, Proof
from proof.digest import KEYS, Tag, tagged
from proof.errors import Reason
from proof.messages import Challenge, Commitment, Reward, Task, TensorClaim, Verdict
from proof.policy import POLICIES, policy

README = (Path(__file__).parents[2] / "proof/README.md").read_text()
SECTIONS = dict(re.findall(r"^#{2,3} (.+?)\n(.*?)(?=^#{2,3} |\Z)", README, re.MULTILINE | re.DOTALL))

KEY = bytes([1] * 32)
MODEL = tagged(Tag.MODEL, b"example")
X = np.arange(6, dtype="<f4").reshape(3, 2)
Y = X[:, :1] + X[:, 1:]
TREES = {
    name: merkle.build(merkle.BLAKE3, [merkle.BLAKE3.leaf(row.tobytes()) for row in value])
    for name, value in (("x", X), ("y", Y))
}
CLAIM_X = TensorClaim("x", "F32", (3, 2), merkle.root_hash(TREES["x"]))
CLAIM_Y = TensorClaim("y", "F32", (3, 1), merkle.root_hash(TREES["y"]))
REWARD = Reward(8453, "0x" + "a1" * 20, "0x" + "b2" * 20, 2_500_000)
TASK = Task(MODEL, (CLAIM_X,), "spot", REWARD, "0x" + "c3" * 20, 1_900_000_000, bytes(range(32)))
COMMITMENT = attestation.sign_commitment(Commitment(MODEL, TASK.id(), (CLAIM_X, CLAIM_Y)), REWARD, KEY)
CHALLENGE = Challenge(COMMITMENT.digest(), "spot", bytes(range(32, 64)))
VERDICT = Verdict(
    verdict="accepted",
    nodes_total=1,
    nodes_checked=1,
    rows=4,
    policy="spot",
    misses=policy("spot").report(),
    heads=1,
    entries={"pointwise": 2},
    largest={"pointwise": 0.5},
    task=TASK.id(),
    commitment=COMMITMENT.digest(),
    check_seed=bytes(range(64, 96)),
)
SIGNED = attestation.sign(
    PaymentAttestation(
        chain_id=REWARD.chain_id,
        contract=REWARD.contract,
        task_id=TASK.id(),
        nonce=TASK.nonce,
        evidence_hash=VERDICT.digest(),
        output_root=CLAIM_Y.root,
        model_id=MODEL,
        policy_hash=policy("spot").hash(),
        committee_id=attestation.committee_id([attestation.key_address(KEY)], 1, 0),
        ref_uid=bytes(32),
        payer=TASK.payer,
        payee=attestation.key_address(KEY),
        token=REWARD.token,
        amount=REWARD.amount,
        verdict=PASS,
        score=100,
        soundness_bits=policy("spot").soundness_bits,
        issued_at=1_890_000_000,
        not_before=1_890_000_000,
        expires_at=1_900_000_000,
    ),
    KEY,
)
EXAMPLES = {
    "TensorClaim": (CLAIM_X, CLAIM_X.digest()),
    "Reward": (REWARD, None),
    "Task": (TASK, TASK.id()),
    "Commitment": (COMMITMENT, COMMITMENT.digest()),
    "Challenge": (CHALLENGE, CHALLENGE.digest()),
    "Verdict": (VERDICT, VERDICT.digest()),
    "SignedAttestation": (SIGNED, SIGNED.attestation.digest()),
}


def rows_of(section):
    """The rows of a section's table, as the cells between the bars."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def shown(section):
    """The digest that a section says its example has."""
    return bytes.fromhex(re.search(r"is\s+`(?:0x)?([0-9a-f]{64})`", SECTIONS[section])[1])


def test_the_table_of_tags_is_the_real_one():
    assert [(tag, key) for tag, key, *_ in rows_of("Digests")] == [(str(tag), KEYS[tag].hex()) for tag in Tag]


def test_the_table_of_reasons_is_the_real_one():
    assert {reason for reason, *_ in rows_of("Reasons")} == {str(reason) for reason in Reason}


def test_the_table_of_policies_is_the_real_one():
    for name, opened, heads, half, tenth, bits, digest in rows_of("Policies"):
        rules = POLICIES[name]
        assert [opened, heads] == ["all" if count is None else str(count) for count in (rules.rows, rules.heads)]
        assert (half, tenth) == (f"{rules.misses(0.5):.2g}", f"{rules.misses(0.1):.2g}")
        assert (bits, digest) == (str(rules.soundness_bits), rules.hash().hex())
    assert [row[0] for row in rows_of("Policies")] == list(POLICIES)


def test_the_table_of_limits_is_the_real_one():
    modules = {"attestation": attestation, "bundle": bundle, "encoding": encoding, "graph": graph, "messages": messages}
    documented = {}
    for name, value, *_ in rows_of("Limits"):
        module, constant = name.split(".")
        base, _, exponent = value.partition("^")
        documented[name] = int(base) ** int(exponent) if exponent else int(value)
        assert documented[name] == getattr(modules[module], constant), name
    constants = {
        f"{title}.{constant}"
        for title, module in modules.items()
        for constant, value in vars(module).items()
        if constant.startswith("MAX_") and f"{constant} = " in Path(module.__file__).read_text()
    }
    assert documented.keys() == constants


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_real(name):
    message, digest = EXAMPLES[name]
    example = json.loads(re.search(r"```json\n(.*?)```", SECTIONS[name], re.DOTALL)[1])
    assert example == message.to_json()
    assert type(message).from_json(example) == message
    if digest:
        assert shown(name) == digest


def test_the_example_of_a_tree_is_real():
    listed = re.search(r"```\n(.*?)```", SECTIONS["Trees"], re.DOTALL)[1].split("\n")[:-1]
    leaves, root = TREES["x"][0], CLAIM_X.root
    expected = [f"row {i}  {X[i].tobytes().hex()}  leaf {leaf.hex()}" for i, leaf in enumerate(leaves)]
    assert listed == [*expected, f"root  {root.hex()}"]


def test_the_example_of_a_draw_is_real():
    label = SECTIONS["Draws"]
    assert f"`{sampling.select(CHALLENGE.seed, 4, 3).tolist()}`" in label
    assert f"`{sampling.select(CHALLENGE.seed, 4, 1000).tolist()}`" in label


def test_the_example_of_a_container_is_real(tmp_path):
    path = tmp_path / "example"
    bundle.write(path, [("x", X)], {})
    listed = re.search(r"```\n(.*?)```", SECTIONS["Container"], re.DOTALL)[1]
    assert bytes.fromhex("".join(re.findall(r"^([0-9a-f ]+?)(?:   .*)?$", listed, re.MULTILINE))) == path.read_bytes()


def test_the_example_of_a_proof_has_the_listed_members(tmp_path):
    path = tmp_path / "proof"
    rows = [1, 2]
    openings = {
        name: Opening(value[rows], np.frombuffer(b"".join(merkle.multiproof(TREES[name], rows)), "u1").reshape(-1, 32))
        for name, value in (("x", X), ("y", Y))
    }
    bundle.write_proof(path, Proof(TASK, COMMITMENT, CHALLENGE, openings))
    bundle.write_bundle(path, path, VERDICT, SIGNED.to_json())
    container = bundle.read(path)
    assert {key for key, *_ in rows_of("Proof and bundle") if "/" not in key} == container.metadata.keys()
    audited = bundle.read_bundle(path)
    assert audited.attestation is not None
    assert SignedAttestation.from_json(audited.attestation) == SIGNED
