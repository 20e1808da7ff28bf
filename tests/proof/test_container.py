"""The container: every tensor comes back, other readers agree, and no bytes do anything but decode or not."""

import json
import os
from contextlib import suppress
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from proof import bundle, encoding, merkle
from proof.bundle import Opening, Proof
from proof.digest import Tag, tagged
from proof.errors import Malformed, Reason
from proof.graph import DTYPES
from proof.messages import Challenge, Commitment, Reward, Task, TensorClaim, Verdict

SHAPES = [(), (0,), (3,), (2, 3), (0, 4), (4, 0), (1, 1, 5)]
FILES = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
    hnp.arrays(
        st.sampled_from([dtype for dtype in DTYPES.values() if dtype != ml_dtypes.bfloat16]),
        hnp.array_shapes(min_dims=0, min_side=0, max_side=4),
    ),
    max_size=4,
)
METADATA = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=9), st.text("aé\n", max_size=9), max_size=3)


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def pack(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="U8", shape=(4,), begin=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tensors.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("container")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_shape_comes_back(path, name, shape):
    size = int(np.prod(shape))
    array = (np.arange(size) % 2).astype(DTYPES[name]).reshape(shape)
    bundle.write(path, [("x", array)], {})
    assert same(bundle.read(path).tensors["x"], array)


@given(tensors=FILES, metadata=METADATA)
def test_files_come_back(folder, tensors, metadata):
    path = folder / "file"
    bundle.write(path, tensors.items(), metadata)
    container = bundle.read(path)
    assert container.metadata == metadata
    assert container.tensors.keys() == tensors.keys()
    assert all(same(container.tensors[name], tensors[name]) for name in tensors)
    assert all(array.flags.aligned and not array.flags.writeable for array in container.tensors.values())


@given(tensors=FILES, metadata=METADATA)
def test_the_safetensors_package_reads_what_is_written(folder, tensors, metadata):
    path = folder / "ours"
    bundle.write(path, tensors.items(), metadata)
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    assert theirs.keys() == tensors.keys()
    for name, array in tensors.items():
        assert (DTYPES[theirs[name]["dtype"]], tuple(theirs[name]["shape"])) == (array.dtype, array.shape)
        assert bytes(theirs[name]["data"]) == array.tobytes()
    with safetensors.safe_open(path, "numpy") as file:
        assert (file.metadata() or {}) == metadata


@given(tensors=FILES)
def test_what_the_safetensors_package_writes_is_read(folder, tensors):
    path = folder / "theirs"
    safetensors.numpy.save_file(tensors, path, {"by": "them"})
    container = bundle.read(path)
    assert container.metadata == {"by": "them"}
    assert container.tensors.keys() == tensors.keys()
    assert all(same(container.tensors[name], tensors[name]) for name in tensors)


def test_bfloat16_of_the_safetensors_package_is_read(path):
    array = np.array([1.5, -2.0, np.inf], ml_dtypes.bfloat16)
    safetensors.numpy.save_file({"x": array}, path)
    assert same(bundle.read(path).tensors["x"], array)


def test_views_are_written_in_their_own_order(path):
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    bundle.write(path, [("t", array.T), ("s", array[::2, 1::3])], {})
    tensors = bundle.read(path).tensors
    assert same(tensors["t"], np.ascontiguousarray(array.T))
    assert same(tensors["s"], np.ascontiguousarray(array[::2, 1::3]))


def test_the_order_of_tensors_leaves_no_trace(tmp_path):
    tensors = [("a", np.zeros(3, np.uint8)), ("b", np.ones(2)), ("c", np.ones(2, np.float16)), ("d", np.ones(1))]
    bundle.write(tmp_path / "one", tensors, {})
    bundle.write(tmp_path / "other", reversed(tensors), {})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_file_may_be_written_from_itself(path):
    bundle.write(path, [("x", np.arange(9))], {})
    bundle.write(path, bundle.read(path).tensors.items(), {"again": "yes"})
    assert bundle.read(path).tensors["x"].tolist() == list(range(9))


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(Malformed):
        bundle.write(tmp_path / "x", [("x", np.zeros(1, np.complex64))], {})
    with pytest.raises(Malformed):
        bundle.write(tmp_path / "x", [("x", np.zeros(1)), ("x", np.zeros(1))], {})
    for name in ("", "__metadata__", "a" * 2000, "\ud800"):
        with pytest.raises(Malformed):
            bundle.write(tmp_path / "x", [(name, np.zeros(1))], {})
    assert list(tmp_path.iterdir()) == []


def test_reading_costs_the_header_and_not_the_data(path):
    """64 GiB that no disk holds: a sparse file."""
    size = 2**36
    header = json.dumps({"x": entry("F32", (size // 4096, 1024), 0, size)}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    assert bundle.read(path).tensors["x"][-1, -1] == 0
    with pytest.raises(Malformed):
        bundle.read(path, limit=size)


GAP = pack({"x": entry(end=2, shape=(2,)), "y": entry(begin=3, end=4, shape=(1,))}, bytes(4))
OVERLAP = pack({"x": entry(end=3, shape=(3,)), "y": entry(begin=2, end=4, shape=(2,))}, bytes(4))
TWICE = b'{"x":%s,"x":%s}' % ((json.dumps(entry()).encode(),) * 2)
LIES = {
    "nothing": b"",
    "a cut size": bytes(7),
    "no header": bytes(8),
    "a header of no end": (2**64 - 1).to_bytes(8, "little") + b"{}",
    "a header beyond the file": (3).to_bytes(8, "little") + b"{}",
    "a header beyond the limit": (16 * 2**20 + 1).to_bytes(8, "little") + b" " * (16 * 2**20 + 1),
    "not JSON": pack(b"{]"),
    "not UTF-8": pack(b'{"\xff":1}'),
    "UTF-16": pack("{}".encode("utf-16")),
    "an array": pack([]),
    "spaces before": pack(b" {}"),
    "deeper than the stack": pack(b"[" * 10**6),
    "an endless number": pack(b'{"x":' + b"1" * 10**5 + b"}"),
    "a tensor twice": pack(TWICE, bytes(4)),
    "data of no tensor": pack({}, b"!"),
    "trailing bytes": pack({"x": entry()}, bytes(5)),
    "missing bytes": pack({"x": entry()}, bytes(3)),
    "a gap": GAP,
    "an overlap": OVERLAP,
    "the same bytes twice": pack({"x": entry(), "y": entry()}, bytes(4)),
    "backwards": pack({"x": entry(begin=4, end=0)}, bytes(4)),
    "before the data": pack({"x": entry(begin=-4, end=0)}, bytes(4)),
    "an unknown dtype": pack({"x": entry("F8_E4M3")}, bytes(4)),
    "a dtype that is no name": pack({"x": entry(["U8"])}, bytes(4)),
    "another size": pack({"x": entry("U16")}, bytes(4)),
    "an overflowing size": pack({"x": entry("U8", (2**32, 2**32, 0, 2**32), 0, 0)}),
    "a negative size": pack({"x": entry("U8", (-2, -2))}, bytes(4)),
    "too many axes": pack({"x": entry("U8", (1,) * 16 + (4,))}, bytes(4)),
    "a shape of floats": pack({"x": entry("U8", (4.0,))}, bytes(4)),
    "three offsets": pack({"x": entry() | {"data_offsets": [0, 4, 4]}}, bytes(4)),
    "no offsets": pack({"x": {"dtype": "U8", "shape": [4]}}, bytes(4)),
    "another member": pack({"x": entry() | {"note": "!"}}, bytes(4)),
    "no name": pack({"": entry()}, bytes(4)),
    "metadata of numbers": pack({"__metadata__": {"a": 1}}),
    "metadata in an array": pack({"__metadata__": []}),
    "metadata of half a surrogate": pack(b'{"__metadata__":{"a":"\\ud800"}}'),
}


@pytest.mark.parametrize("data", LIES.values(), ids=LIES.keys())
def test_no_lie_is_read(path, data):
    path.write_bytes(data)
    with pytest.raises(Malformed):
        bundle.read(path)


def test_too_many_tensors_are_refused(path, monkeypatch):
    monkeypatch.setattr(bundle, "MAX_HELD_TENSORS", 2)
    path.write_bytes(pack({name: entry("U8", (0,), 0, 0) for name in "xyz"}))
    with pytest.raises(Malformed, match="3 tensors"):
        bundle.read(path)


@given(data=st.binary(max_size=100) | st.binary(max_size=80).map(pack))
def test_any_bytes_are_a_container_or_malformed(folder, data):
    (folder / "bytes").write_bytes(data)
    with suppress(Malformed):
        bundle.read(folder / "bytes")


# A proof: what the verifier reads from a stranger.

ROWS = np.arange(6, dtype=np.float32).reshape(3, 2)
LEAVES = [tagged(Tag.ROW, row.tobytes()) for row in ROWS]
TREE = merkle.build(merkle.BLAKE3, LEAVES)
CLAIM = TensorClaim("x/y", "F32", (3, 2), merkle.root_hash(TREE))
MASK = TensorClaim("mask", "BOOL", (1, 2), tagged(Tag.ROW, b"\1\0"))
REWARD = Reward(1, "0x" + "11" * 20, "0x" + "22" * 20, 5)
TASK = Task(bytes(32), (CLAIM,), "spot", REWARD, "0x" + "33" * 20, 99, bytes(32))
COMMITMENT = Commitment(bytes(32), TASK.id(), (CLAIM, MASK), "0x" + "44" * 20, bytes(65))
SIBLINGS = np.frombuffer(b"".join(merkle.multiproof(TREE, [1])), np.uint8).reshape(-1, 32)
PROOF = Proof(
    task=TASK,
    commitment=COMMITMENT,
    challenge=Challenge(COMMITMENT.digest(), "spot", bytes(32)),
    openings={
        "x/y": Opening(ROWS[1:2], SIBLINGS),
        "mask": Opening(np.array([[True, False]]), np.zeros((0, 32), np.uint8)),
    },
)
VERDICT = Verdict(
    verdict="rejected",
    reason=Reason.OPENING,
    nodes_total=3,
    nodes_checked=1,
    rows=4,
    policy="spot",
    misses={"1.0": 0.0},
    task=TASK.id(),
    commitment=COMMITMENT.digest(),
    check_seed=bytes(32),
)


def same_proof(one, other):
    return (
        (one.task, one.commitment, one.challenge) == (other.task, other.commitment, other.challenge)
        and one.openings.keys() == other.openings.keys()
        and all(same(one.openings[name].rows, other.openings[name].rows) for name in one.openings)
        and all(same(one.openings[name].siblings, other.openings[name].siblings) for name in one.openings)
    )


def rewritten(path, bend):
    """The proof file again, with one thing bent."""
    bundle.write_proof(path, PROOF)
    container = bundle.read(path)
    metadata, tensors = bend(dict(container.metadata), dict(container.tensors))
    bundle.write(path, tensors.items(), metadata)


def without(members, key):
    return {name: member for name, member in members.items() if name != key}


PROOF_LIES = {
    "no format": lambda m, t: (without(m, "assay"), t),
    "another format": lambda m, t: (m | {"assay": "proof/2"}, t),
    "no commitment": lambda m, t: (without(m, "commitment"), t),
    "no challenge": lambda m, t: (without(m, "challenge"), t),
    "a commitment that is no JSON": lambda m, t: (m | {"commitment": "{"}, t),
    "a task that is none": lambda m, t: (m | {"task": "[]"}, t),
    "another member": lambda m, t: (m | {"note": "!"}, t),
    "rows without siblings": lambda m, t: (m, without(t, "siblings/mask")),
    "siblings without rows": lambda m, t: (m, without(t, "rows/mask")),
    "a tensor beside": lambda m, t: (m, t | {"weights/x": t["rows/mask"]}),
    "rows of rank 1": lambda m, t: (m, t | {"rows/mask": t["rows/mask"][0]}),
    "rows of rank 3": lambda m, t: (m, t | {"rows/mask": t["rows/mask"][None]}),
    "siblings of 31 bytes": lambda m, t: (m, t | {"siblings/mask": np.zeros((0, 31), np.uint8)}),
    "siblings in one row": lambda m, t: (m, t | {"siblings/mask": np.zeros(32, np.uint8)}),
    "signed siblings": lambda m, t: (m, t | {"siblings/mask": np.zeros((1, 32), np.int8)}),
    "a truth value of 2": lambda m, t: (m, t | {"rows/mask": np.array([[1, 2]], np.uint8).view(np.bool_)}),
}


def test_a_proof_comes_back(path):
    bundle.write_proof(path, PROOF)
    assert same_proof(bundle.read_proof(path), PROOF)


def test_a_name_of_the_longest_kind_comes_back(path):
    name = "é" * (encoding.MAX_NAME_BYTES // 2)
    proof = replace(PROOF, openings={name: PROOF.openings["mask"]})
    bundle.write_proof(path, proof)
    assert same_proof(bundle.read_proof(path), proof)


def test_an_offline_proof_comes_back(path):
    proof = replace(PROOF, task=None, commitment=Commitment(bytes(32), None, (CLAIM,)))
    bundle.write_proof(path, proof)
    assert same_proof(bundle.read_proof(path), proof)


def test_a_bundle_is_the_proof_with_its_verdict(tmp_path):
    bundle.write_proof(tmp_path / "proof", PROOF)
    bundle.write_bundle(tmp_path / "proof", tmp_path / "bundle", VERDICT, {"signer": "0x"})
    audited = bundle.read_bundle(tmp_path / "bundle")
    assert (audited.verdict, audited.attestation) == (VERDICT, {"signer": "0x"})
    assert same_proof(audited.proof, PROOF)
    assert same_proof(bundle.read_proof(tmp_path / "bundle"), PROOF)


def test_a_proof_without_verdict_is_no_bundle(path):
    bundle.write_proof(path, PROOF)
    with pytest.raises(Malformed, match="verdict"):
        bundle.read_bundle(path)


@pytest.mark.parametrize("bend", PROOF_LIES.values(), ids=PROOF_LIES.keys())
def test_no_bent_proof_is_read(path, bend):
    rewritten(path, bend)
    with pytest.raises(Malformed):
        bundle.read_proof(path)


@given(data=st.data())
def test_a_damaged_proof_is_read_or_malformed(folder, data):
    source, path = folder / "honest", folder / "damaged"
    if not source.exists():
        bundle.write_proof(source, PROOF)
    damaged = bytearray(source.read_bytes())
    at = data.draw(st.integers(0, len(damaged) - 1))
    length = data.draw(st.integers(0, 3))
    damaged[at : at + length] = data.draw(st.binary(max_size=3))
    path.write_bytes(damaged[: data.draw(st.none() | st.integers(0, len(damaged)))])
    with suppress(Malformed):
        bundle.read_proof(path)


def test_a_file_has_one_digest(path):
    bundle.write_proof(path, PROOF)
    assert bundle.file_digest(path) == tagged(Tag.PROOF, path.read_bytes())


def test_a_directory_is_our_mistake_and_not_the_senders(tmp_path):
    with pytest.raises(OSError, match=os.strerror(21)):
        bundle.read(tmp_path)
