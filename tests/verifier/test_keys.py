"""Verification with a secret key: what it accepts and refuses, when a key retires, what it never says."""

import json
import random
import stat
import subprocess
import sys
from dataclasses import replace

import graphs
import ml_dtypes
import numpy as np
import onnx
import pytest
import world
from onnx import TensorProto, helper, numpy_helper

import gpu.keys
from gpu.kernels.fold import fold
from gpu.kernels.keyed import fold_left, fold_right
from gpu.keys import REFUSED
from proof import bundle
from proof.errors import Malformed, Reason, Unavailable
from proof.messages import Verdict
from verifier import key_file, keys
from verifier.key_file import Terms

NOW, END = 1_000, 2_000
TERMS = Terms("spring", END)
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "key.safetensors"


def judge(place, subject, trace, now=NOW):
    return keys.judge(place, subject.prove(trace), world.CHECK_SEED, now)


def bfloats():
    """A table, a product with a bias and one of 5,000 logits, with weights of bfloat16; the trace is NumPy's."""
    rng = np.random.default_rng(7)
    weights = {
        name: (rng.standard_normal(shape) / scale).astype(BF16)
        for name, shape, scale in (("table", (40, 64), 1), ("w", (96, 64), 8), ("b", (96,), 1), ("head", (96, 5000), 9))
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"], name="x"),
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], name="h", transB=1),
        helper.make_node("MatMul", ["h", "head"], ["y"], name="y"),
    ]
    graph = helper.make_graph(
        nodes,
        "bfloats",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, ["n", 5000])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    source = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString()
    subject = replace(world.of(source, {"ids": rng.integers(0, 40, 24)}), policy="full")
    return subject, run_bfloats(weights, subject.inputs["ids"])


def run_bfloats(weights, ids):
    wide = {name: value.astype(np.float32) for name, value in weights.items()}
    x = wide["table"][ids]
    h = (x @ wide["w"].T + wide["b"]).astype(BF16)
    y = (h.astype(np.float32) @ wide["head"]).astype(BF16)
    return {"ids": ids, "x": x.astype(BF16), "h": h, "y": y}


SUBJECTS = {
    "causal blocks": lambda: (world.small(), world.small().run()),
    "every row": lambda: (replace(world.small(), policy="full"), world.small().run()),
    "biases, transposed weights": lambda: (graphs.mlp(), graphs.mlp().run()),
    "half precision": lambda: (graphs.halves(TensorProto.FLOAT16), graphs.halves(TensorProto.FLOAT16).run()),
    "bfloat16, wide logits": bfloats,
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_an_honest_proof_is_accepted(place, name):
    subject, trace = SUBJECTS[name]()
    key = keys.create(place, subject.model, TERMS)
    verdict = judge(place, subject, trace)
    assert (verdict.verdict, verdict.detail, verdict.keyed) == ("accepted", "", key.id)
    assert verdict.nodes_checked == verdict.nodes_total
    assert verdict.largest == {}
    plain = subject.judge(subject.prove(trace))
    assert (plain.keyed, dict(plain.entries)) == (None, dict(verdict.entries))
    assert Verdict.from_json(verdict.to_json()) == verdict


def bent(name, change):
    def bend(trace):
        array = trace[name].copy()
        change(array)
        return trace | {name: array}

    return bend


def scale_row(array):
    rows = array.reshape(-1, array.shape[-1])
    rows[1] = (rows[1].astype(np.float32) * 1.1).astype(array.dtype)


def swap_rows(array):
    rows = array.reshape(-1, array.shape[-1])
    rows[[0, 1]] = rows[[1, 0]]


def nudge_entry(array):
    bits = array.reshape(-1).view(f"u{array.itemsize}")
    bits[5] ^= 1


def not_a_number(array):
    array.reshape(-1)[3] = np.nan


def zeros(array):
    array[...] = 0


ROWS = {"a scaled row": scale_row, "swapped rows": swap_rows, "NaN": not_a_number, "zeros": zeros}
LIES = {f"{lie} of {node}": (node, change) for lie, change in ROWS.items() for node in ("x", "h", "y")}
LIES["one bit of an embedding"] = ("x", nudge_entry)


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_with_one_sentence(place, lie):
    node, change = LIES[lie]
    subject, trace = bfloats()
    keys.create(place, subject.model, TERMS)
    verdict = judge(place, subject, bent(node, change)(trace))
    assert (verdict.verdict, verdict.reason, verdict.node) == ("rejected", Reason.FREIVALDS, node)
    assert verdict.detail.endswith(f": {REFUSED}")
    assert verdict.largest == {}


def rounded_to_int8(array):
    step = np.abs(array).max() / 127
    return (np.round(array.astype(np.float32) / step) * step).astype(array.dtype)


def test_weights_of_int8_are_refused(place):
    subject, honest = bfloats()
    keys.create(place, subject.model, TERMS)
    weights = {name: np.asarray(value) for name, value in subject.model.constants.items()}
    assert key_file.read(place).key.parts.keys() == {*gpu.keys.roles(subject.model).values()}
    cheap = run_bfloats(weights | {"w": rounded_to_int8(weights["w"])}, subject.inputs["ids"])
    assert np.array_equal(cheap["x"], honest["x"])
    verdict = judge(place, subject, cheap)
    assert (verdict.verdict, verdict.node) == ("rejected", "h")


def test_what_needs_no_weights_is_checked_as_ever(place):
    subject = world.small()
    keys.create(place, subject.model, TERMS)
    verdict = judge(place, subject, bent("layer0.softmax", zeros)(subject.run()))
    assert (verdict.reason, verdict.node) == (Reason.REEXECUTION, "layer0.softmax")


def attending():
    """Attention whose node comes after two that are folded: its heads are drawn by its number."""
    write, parts = world.Writer(5), {}
    for name in ("spare", "parted"):
        value = numpy_helper.from_array(np.array([0, 0, 8, 4]))
        write.nodes.append(helper.make_node("Constant", [], [name], name=name, value=value))
    for part in "qkv":
        flat = write.op("MatMul", "x", write.weight(f"w{part}", 32, 32, scale=32**-0.5), to=part)
        split = write.op("Reshape", flat, "parted", to=f"{part}.split")
        parts[part] = write.op("Transpose", split, to=f"{part}.heads", perm=[0, 2, 1, 3])
    write.op("Attention", *parts.values(), to="y", is_causal=1)
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [1, 24, 32]), ("y", [1, 8, 24, 4]))
    )
    return world.of(write.model([x], [y], opset=23), {"x": write.rng.standard_normal((1, 24, 32)).astype(np.float32)})


def test_nodes_keep_their_numbers_where_others_are_folded(place):
    subject = attending()
    assert len(subject.model.folded) == 2
    keys.create(place, subject.model, TERMS)
    assert [node.index for node in keys.read(place).key.model.nodes] == [node.index for node in subject.model.nodes]
    assert judge(place, subject, subject.run()).verdict == "accepted"


# ---- retirement


def test_the_first_rejection_retires_a_key(place):
    subject, trace = bfloats()
    key = keys.create(place, subject.model, TERMS)
    assert judge(place, subject, trace).verdict == "accepted"
    assert judge(place, subject, bent("y", scale_row)(trace)).verdict == "rejected"
    assert keys.state_of(place, key) == keys.State(2, "it has rejected a proof")
    with pytest.raises(Unavailable, match="retired, it has rejected a proof"):
        judge(place, subject, trace)
    assert keys.state_of(place, key).used == 2


def test_a_key_ends_with_its_epoch_even_if_the_clock_goes_back(place):
    subject, trace = bfloats()
    keys.create(place, subject.model, TERMS)
    for now in (END, NOW):
        with pytest.raises(Unavailable, match="its epoch 'spring' has ended"):
            judge(place, subject, trace, now)


def test_a_key_gives_so_many_verdicts(place):
    subject, trace = bfloats()
    keys.create(place, subject.model, replace(TERMS, checks=2))
    assert [judge(place, subject, trace).verdict for _ in range(2)] == ["accepted"] * 2
    with pytest.raises(Unavailable, match="it has given 2 verdicts"):
        judge(place, subject, trace)


def test_a_use_is_on_record_before_its_outcome_is_known(place, monkeypatch):
    subject, trace = bfloats()
    key = keys.create(place, subject.model, TERMS)

    def stopped(*_, **__):
        assert keys.state_of(place, key).used == 1
        raise Unavailable("the power went")

    monkeypatch.setattr(keys, "verify", stopped)
    with pytest.raises(Unavailable, match="the power went"):
        judge(place, subject, trace)


def test_of_two_rejections_at_once_one_is_told(place, monkeypatch):
    subject, trace = bfloats()
    lie, verify = bent("y", scale_row)(trace), keys.verify
    keys.create(place, subject.model, TERMS)

    def overtaken(*arguments, **options):
        monkeypatch.setattr(keys, "verify", verify)
        assert judge(place, subject, lie).verdict == "rejected"
        return verify(*arguments, **options)

    monkeypatch.setattr(keys, "verify", overtaken)
    with pytest.raises(Unavailable, match="retired"):
        judge(place, subject, lie)


def test_a_key_without_a_past_is_not_used(place):
    subject, trace = bfloats()
    keys.create(place, subject.model, TERMS)
    place.with_name(f"{place.name}.state").unlink()
    with pytest.raises(Unavailable, match="nobody can tell"):
        judge(place, subject, trace)


# ---- files


def test_files_are_private_and_never_overwritten(place):
    model = graphs.mlp().model
    keys.create(place, model, TERMS)
    content = place.read_bytes()
    assert {stat.S_IMODE(path.stat().st_mode) for path in place.parent.iterdir()} == {0o600}
    with pytest.raises(Malformed, match="never overwritten"):
        keys.create(place, model, TERMS)
    assert place.read_bytes() == content


def test_nothing_is_left_of_a_key_that_cannot_be_made(place):
    with pytest.raises(Malformed, match="no key can be made for"):
        keys.create(place, graphs.convnet().model, TERMS)
    assert list(place.parent.iterdir()) == []


def test_two_keys_of_a_model_share_no_secret(place):
    model = graphs.mlp().model
    made = [keys.create(place.with_name(name), model, TERMS) for name in "ab"]
    assert made[0].id != made[1].id
    assert not np.intersect1d(made[0].r, made[1].r).size


def test_a_damaged_file_is_malformed(place):
    subject, _ = bfloats()
    keys.create(place, subject.model, TERMS)
    whole, rng = place.read_bytes(), random.Random(3)
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(60)]
    for _ in range(240):
        at = rng.randrange(len(whole) if rng.random() < 0.5 else 3000)
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
    for content in damaged:
        place.write_bytes(content)
        with pytest.raises(Malformed):
            key_file.read(place)


def test_a_file_holds_the_graph_and_what_no_key_stands_for(place):
    model = world.small().model
    keys.create(place, model, TERMS)
    kept = key_file.read(place).key.model
    stands = {role.weight for role in gpu.keys.roles(model).values()}
    assert kept.id == model.id
    assert [str(node) for node in kept.nodes] == [str(node) for node in model.nodes]
    for name, value in model.constants.items():
        assert (kept.constants[name].dtype, kept.constants[name].shape) == (value.dtype, value.shape)
        assert name in stands or np.array_equal(kept.constants[name], value, equal_nan=True)


def test_a_key_is_for_one_model(place):
    subject, trace = bfloats()
    other = keys.create(place, graphs.mlp().model, TERMS)
    with pytest.raises(Malformed, match=r"the key is for model .* the proof of"):
        judge(place, subject, trace)
    assert keys.state_of(place, other) == keys.State()


def test_a_policy_that_recomputes_products_is_refused(place):
    subject, trace = bfloats()
    keys.create(place, subject.model, TERMS)
    with pytest.raises(Malformed, match="takes the weights"):
        judge(place, replace(subject, policy="full+torch-eager+boundary"), trace)


# ---- reveal


@pytest.mark.parametrize("lie", [None, scale_row])
def test_a_revealed_key_repeats_its_verdicts(place, lie):
    subject, trace = bfloats()
    keys.create(place, subject.model, TERMS)
    told = judge(place, subject, bent("h", lie)(trace) if lie else trace)
    revealed, again = place.with_name("revealed"), place.with_name("again")
    keys.reveal(place, revealed)
    with pytest.raises(Unavailable, match="retired"):
        judge(place, subject, trace)
    keys.rebuild(again, subject.model, revealed)
    assert [judge(again, subject, bent("h", lie)(trace) if lie else trace) for _ in range(2)] == [told] * 2
    assert bundle.read(again).tensors["0/sums"].tobytes() == bundle.read(place).tensors["0/sums"].tobytes()


def test_only_the_revealed_seed_rebuilds_a_key(place):
    subject, _ = bfloats()
    keys.create(place, subject.model, TERMS)
    revealed = place.with_name("revealed")
    keys.reveal(place, revealed)
    container = bundle.read(revealed)
    bundle.write(revealed, [("seed", container.tensors["seed"] ^ 1)], container.metadata)
    with pytest.raises(Malformed, match="the seed is not that of key"):
        keys.rebuild(place.with_name("again"), subject.model, revealed)
    with pytest.raises(Malformed, match="not a revealed key"):
        keys.rebuild(place.with_name("again"), subject.model, place)


# ---- commands


def assay(*arguments, expect=0):
    command = [sys.executable, "-m", "assay", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == expect, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout + done.stderr


def test_the_commands_need_no_weights_and_tell_no_secret(tmp_path):
    model, key, proofs = tmp_path / "model.onnx", tmp_path / "key.safetensors", [tmp_path / "good", tmp_path / "bad"]
    subject, trace = bfloats()
    proto = onnx.load_from_string(subject.source)
    onnx.save(proto, model, save_as_external_data=True, location="weights.bin", size_threshold=0)
    for path, ran in zip(proofs, (trace, bent("h", scale_row)(trace)), strict=True):
        bundle.write_proof(path, subject.prove(ran))
    said = assay("key", "make", model, "--epoch", "spring", "--out", key)
    kept, weights = model.read_bytes(), (tmp_path / "weights.bin").read_bytes()
    model.unlink()
    (tmp_path / "weights.bin").unlink()

    verdict = json.loads(assay("verify", "--key", key, proofs[0], "--json"))
    assert (verdict["verdict"], verdict["largest"]) == ("accepted", {})
    refused = json.loads(assay("verify", "--key", key, proofs[1], "--json", expect=1))
    assert refused["detail"] == f"Gemm node 'h': {REFUSED}"
    said += assay("verify", "--key", key, proofs[0], expect=3)
    said += assay("verify", "--key", key, *proofs, expect=2)
    shown = json.loads(assay("key", "show", key, "--json"))
    assert (shown["verdicts"], shown["retired"], shown["key"]) == (2, "it has rejected a proof", verdict["keyed"])
    seed = bundle.read(key).tensors["seed"].tobytes()
    assert seed.hex() not in said + json.dumps([verdict, refused, shown])

    assay("key", "reveal", key, "--out", tmp_path / "revealed")
    model.write_bytes(kept)
    (tmp_path / "weights.bin").write_bytes(weights)
    assay("key", "rebuild", model, tmp_path / "revealed", "--out", tmp_path / "again")
    assay("verify", "--key", tmp_path / "again", proofs[1], expect=1)


# ---- the kernel


@pytest.mark.parametrize("k", [1, 15, 16, 511, 513, 1300])
def test_the_kernel_agrees_with_the_fold(k):
    rng = np.random.default_rng(k)
    x = rng.standard_normal((3, k)).astype(BF16)
    vectors = rng.standard_normal((8, k + 4)).astype(np.float32)
    weights = np.exp2(rng.integers(-3, 4, k)).astype(np.float32)
    own = np.ascontiguousarray(vectors[:, 4:])
    for found, wanted in (
        (fold_right(x, own, weights, min(16, k)), fold(x, own.astype(float), weights.astype(float), min(16, k))),
        (fold_left(x, vectors, 4, weights), fold(x, own * weights.astype(float), weights.astype(float) ** 2, 1, BF16)),
    ):
        assert np.allclose(found.sums, wanted.sums, rtol=0, atol=1e-5 * k**0.5)
        for name in ("energy", "rounding"):
            assert np.allclose(getattr(found, name), getattr(wanted, name), rtol=1e-5)
        assert not found.probe.any() or np.allclose(found.probe, wanted.probe, rtol=1e-3)


def test_rows_beyond_the_range_of_float32_are_judged_in_float64(place):
    subject, trace = bfloats()
    key = gpu.keys.make(subject.model, bytes(32))
    matrix = next(part for role, part in key.parts.items() if role.weight == "head")
    x = np.zeros((1, 96), BF16)
    x[0, 0] = 1e30
    found = gpu.keys._right(x, matrix.u[0], matrix.nu[0])
    assert np.isfinite(found.energy).all()
    assert np.allclose(found.sums, x.astype(float) @ matrix.u[0].T.astype(float))
