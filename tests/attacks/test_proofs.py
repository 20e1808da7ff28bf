"""Lies about the messages and the file: other statements, other rows, other bytes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import world
from hypothesis import given, settings
from hypothesis import strategies as st
from world import World

from proof import bundle
from proof.attestation import sign_commitment
from proof.bundle import Opening, Proof
from proof.errors import Malformed, Reason
from proof.messages import Challenge
from prover import prove

OTHER_SEED = bytes(reversed(world.SEED))
MALLORY = bytes.fromhex("22" * 32)


@pytest.fixture(scope="module")
def subject() -> World:
    return world.small()


@pytest.fixture(scope="module")
def proof(subject: World) -> Proof:
    return subject.prove(subject.run())


@pytest.fixture(scope="module")
def other(subject: World) -> World:
    """The same model, another task: other words."""
    return subject.with_inputs({"ids": (subject.inputs["ids"] + 7) % world.WORDS})


def opened(proof: Proof, name: str, opening: Opening) -> Proof:
    return replace(proof, openings=dict(proof.openings) | {name: opening})


def first_row_off(proof: Proof, name: str) -> Proof:
    """One element of one opened row 1 % larger."""
    rows = proof.openings[name].rows.copy()
    rows[0, 0] *= 1.01
    return opened(proof, name, replace(proof.openings[name], rows=rows))


def claims_bent(subject: World, proof: Proof, bend: Callable[[tuple], tuple]) -> Proof:
    """The commitment with its list of tensors bent, signed and challenged again."""
    bare = replace(proof.commitment, tensors=bend(proof.commitment.tensors), worker=None, signature=None)
    signed = sign_commitment(bare, world.REWARD, world.WORKER)
    return replace(proof, commitment=signed, challenge=replace(proof.challenge, commitment=signed.digest()))


def siblings_bent(proof: Proof, bend: Callable[[np.ndarray], np.ndarray]) -> Proof:
    name = next(name for name, opening in proof.openings.items() if len(opening.siblings))
    opening = proof.openings[name]
    return opened(proof, name, replace(opening, siblings=bend(opening.siblings.copy())))


def without(proof: Proof, name: str) -> Proof:
    return replace(proof, openings={key: value for key, value in proof.openings.items() if key != name})


def flipped(siblings: np.ndarray) -> np.ndarray:
    siblings[0, 0] ^= 1
    return siblings


LIES: dict[str, tuple[Callable[[World, Proof], Proof], Reason]] = {
    "one element of an opened row": (lambda w, p: first_row_off(p, "logits"), Reason.OPENING),
    "a sibling flipped": (lambda w, p: siblings_bent(p, flipped), Reason.OPENING),
    "a sibling too few": (lambda w, p: siblings_bent(p, lambda s: s[1:]), Reason.OPENING),
    "a sibling too many": (lambda w, p: siblings_bent(p, lambda s: np.concatenate([s, s[:1]])), Reason.OPENING),
    "rows of a tensor left out": (lambda w, p: without(p, "layer0.q"), Reason.SELECTION),
    "nothing opened": (lambda w, p: replace(p, openings={}), Reason.SELECTION),
    "an opening too many": (lambda w, p: opened(p, "ghost", p.openings["logits"]), Reason.SELECTION),
    "a row too few": (
        lambda w, p: opened(p, "layer0.q", replace(p.openings["layer0.q"], rows=p.openings["layer0.q"].rows[1:])),
        Reason.SELECTION,
    ),
    "rows in another dtype": (
        lambda w, p: opened(
            p, "layer0.q", replace(p.openings["layer0.q"], rows=p.openings["layer0.q"].rows.astype(np.float64))
        ),
        Reason.SELECTION,
    ),
    "rows for another challenge": (
        lambda w, p: replace(w.prove(w.run(), OTHER_SEED), challenge=p.challenge),
        Reason.SELECTION,
    ),
    "a challenge to another commitment": (
        lambda w, p: replace(p, challenge=replace(p.challenge, commitment=bytes(32))),
        Reason.BINDING,
    ),
    "a cheaper policy": (lambda w, p: replace(w, policy="spot").prove(w.run()), Reason.BINDING),
    "a tensor not committed": (lambda w, p: claims_bent(w, p, lambda c: c[:-1]), Reason.SHAPE),
    "tensors in another order": (lambda w, p: claims_bent(w, p, lambda c: (c[0], c[2], c[1], *c[3:])), Reason.SHAPE),
    "a tensor of another shape": (
        lambda w, p: claims_bent(w, p, lambda c: (*c[:-1], replace(c[-1], shape=(1, *c[-1].shape)))),
        Reason.SHAPE,
    ),
    "a tensor of another dtype": (
        lambda w, p: claims_bent(w, p, lambda c: (*c[:-1], replace(c[-1], dtype="F16"))),
        Reason.SHAPE,
    ),
    "no inputs committed": (lambda w, p: claims_bent(w, p, lambda c: c[1:]), Reason.SHAPE),
    "another root": (
        lambda w, p: claims_bent(w, p, lambda c: (*c[:-1], replace(c[-1], root=bytes(32)))),
        Reason.OPENING,
    ),
    "nobody signed": (
        lambda w, p: replace(p, commitment=replace(p.commitment, worker=None, signature=None)),
        Reason.SIGNATURE,
    ),
    "signed by another": (
        lambda w, p: replace(
            p,
            commitment=replace(p.commitment, signature=sign_commitment(p.commitment, world.REWARD, MALLORY).signature),
        ),
        Reason.SIGNATURE,
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_the_proof_has_its_reason(subject, proof, lie):
    bend, reason = LIES[lie]
    verdict = subject.judge(bend(subject, proof))
    assert (verdict.verdict, verdict.reason) == ("rejected", reason), verdict.detail


def test_the_honest_proof_is_accepted(subject, proof):
    assert subject.judge(proof).verdict == "accepted"


def test_a_proof_of_another_task_is_refused(subject, other):
    assert other.judge(subject.prove(subject.run())).reason is Reason.BINDING


def test_a_stale_commitment_is_refused(subject, other):
    """The run of another task, committed to this one: inputs are bound."""
    assert other.judge(other.prove(subject.run())).reason is Reason.INPUT


def test_a_run_on_other_inputs_under_the_right_ones_is_refused(subject, other):
    """The other task's run, with this task's inputs in place of its own."""
    trace = subject.run() | dict(other.inputs)
    assert other.judge(other.prove(trace)).reason is Reason.REEXECUTION


def test_a_proof_of_another_model_is_refused(subject):
    impostor = world.small(seed=3)
    assert impostor.judge(subject.prove(subject.run())).reason is Reason.BINDING


def test_an_unsigned_proof_needs_no_task_but_binds_its_model(subject):
    committed = prove.commit(subject.model, subject.run())
    challenge = Challenge(committed.commitment.digest(), "standard", world.SEED)
    proof = prove.answer(committed, committed.commitment, challenge)
    assert subject.judge(proof).reason is Reason.BINDING


@pytest.fixture(scope="module")
def written(proof: Proof, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("proof") / "proof.safetensors"
    bundle.write_proof(path, proof)
    return path


FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-1],
    "header only": lambda data: data[:64],
    "padded": lambda data: data + b"\0",
    "a huge header announced": lambda data: (2**63 - 1).to_bytes(8, "little") + data[8:],
    "another container": lambda data: b"PK\3\4" + data,
}


@pytest.mark.parametrize("lie", FILES)
def test_a_broken_file_is_malformed(written, tmp_path, lie):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(FILES[lie](written.read_bytes()))
    with pytest.raises(Malformed):
        bundle.read_proof(path)


def test_an_opening_with_two_values_is_malformed(written, tmp_path):
    data = written.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    name = b'"rows/logits":'
    entry = header[header.index(name) : header.index(b"}", header.index(name)) + 1]
    twice = header[:-1] + b"," + entry + b"}"
    path = tmp_path / "twice.safetensors"
    path.write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + size :])
    with pytest.raises(Malformed):
        bundle.read_proof(path)


def test_a_file_beyond_the_limit_is_not_read(written):
    with pytest.raises(Malformed):
        bundle.read_proof(written, limit=1000)


@settings(max_examples=60, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_malformed_or_refused(subject, written, tmp_path_factory, at, bit):
    data = bytearray(written.read_bytes())
    data[int(at * len(data))] ^= 1 << bit
    path = tmp_path_factory.mktemp("flipped") / "proof.safetensors"
    path.write_bytes(data)
    try:
        found = bundle.read_proof(path)
    except Malformed:
        return
    assert subject.judge(found).verdict == "rejected"
