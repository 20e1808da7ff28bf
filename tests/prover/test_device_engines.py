"""Traces that stay on a device: the commitment and the proof that arrays give, and no more memory than is allowed."""

import decoders
import graphs
import numpy as np
import pytest
import torch
import world
from host_device import HostDevice
from onnx import TensorProto

from gpu.device import select
from gpu.resident import Resident
from proof.errors import Malformed, Unavailable
from proof.messages import Challenge
from prover import prove
from prover.engines import capture, residents
from prover.engines import onnxruntime as runtime
from prover.engines.residents import Parts, Peak
from prover.engines.torch import Recorder, loaded

CUDA = select("auto")
EVEN = 1e4  # a temperature that makes every token about as likely as any other
SEED = bytes(range(32))


@pytest.fixture(params=["host", *(["cuda"] if CUDA else [])])
def device(request):
    return HostDevice() if request.param == "host" else CUDA


def asked(prompt=9, tokens=12, temperature=0.7, seed=0):
    rng = np.random.default_rng(seed)
    given = {
        "prompt": rng.integers(3, decoders.WORDS, prompt),
        "temperature": np.float32(temperature),
        "top_k": np.int64(0 if temperature == EVEN else 40),
        "top_p": np.float32(1 if temperature == EVEN else 0.95),
        "seed": rng.integers(0, 256, 32, np.uint8),
        "max_tokens": np.int64(tokens),
    }
    return {name: np.asarray(value) for name, value in given.items()}


BATCH = [asked(7, 8), asked(3, 6, 1.0, seed=1)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Networks and their graphs, each made once."""
    known = {}

    def made(form, dtype, device, attention="sdpa"):
        if (form, dtype) not in known:
            known[form, dtype] = decoders.made(tmp_path_factory.mktemp("decoder"), decoders.CONFIGS[form], dtype)
        network, statement = known[form, dtype]
        network.set_attn_implementation(attention)
        return network.to(device.place), statement

    return made


@pytest.fixture
def llama(made, device):
    return made("llama", torch.bfloat16, device)


def left(trace):
    """The tensors that stayed on the device."""
    return {name: tensor for name, tensor in trace.items() if isinstance(tensor, Resident)}


def proven(model, trace, policy="standard"):
    committed = prove.commit(model, trace)
    challenge = Challenge(committed.commitment.digest(), policy, SEED)
    return committed.commitment.to_json(), prove.answer(committed, committed.commitment, challenge).openings


def assert_alike(model, kept, arrays):
    """What lies on a device commits to the same roots and opens the same rows, under the same siblings."""
    assert tuple(kept) == tuple(arrays)
    for name, tensor in left(kept).items():
        assert (tensor.dtype, tensor.shape) == (arrays[name].dtype, arrays[name].shape)
        assert tensor.numpy().tobytes() == arrays[name].tobytes(), name
    (commitment, openings), (wanted, opened) = proven(model, kept), proven(model, arrays)
    assert commitment == wanted
    assert openings.keys() == opened.keys()
    for name, opening in openings.items():
        assert opening.rows.dtype == opened[name].rows.dtype
        assert opening.rows.shape == opened[name].rows.shape
        assert opening.rows.tobytes() == opened[name].rows.tobytes()
        assert opening.siblings.tobytes() == opened[name].siblings.tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["llama", "qwen 3", "gemma 3"])
def test_a_batch_is_left_on_the_device_bit_for_bit(made, device, form, attention, dtype):
    network, statement = made(form, dtype, device, attention)
    arrays = Recorder(network, statement).generate_batch(BATCH)
    kept = Recorder(network, statement, device).generate_batch(BATCH)
    for trace, wanted in zip(kept, arrays, strict=True):
        plan = prove.plan_of(statement, wanted)
        assert set(wanted) - set(left(trace)) == {*plan.inputs, *plan.derived, "fed", "ids", "tokens"} & set(wanted)
        assert_alike(statement, trace, wanted)


@pytest.mark.parametrize("form", ["llama with biases", "llama, one kv-head", "mistral with a window", "qwen 2"])
def test_every_other_form_is_left_there_too(made, device, form):
    network, statement = made(form, torch.float16, device)
    arrays, kept = (Recorder(network, statement, *at).generate(asked(tokens=4)) for at in ((), (device,)))
    assert_alike(statement, kept, arrays)


@pytest.mark.parametrize(("prompt", "tokens"), [(1, 1), (1, 9), (20, 1), (2, 3)])
def test_any_lengths(llama, device, prompt, tokens):
    network, statement = llama
    given = asked(prompt, tokens, EVEN)
    assert_alike(statement, Recorder(network, statement, device).generate(given), Recorder(*llama).generate(given))


def test_a_pass_over_a_given_answer_is_left_there_too(llama, device):
    network, statement = llama
    given = asked() | {"answer": np.arange(3, 10)}
    assert_alike(statement, Recorder(network, statement, device).forward(given), Recorder(*llama).forward(given))


@pytest.mark.parametrize("form", ["llama", "qwen 3", "gemma 3"])
@pytest.mark.parametrize(("room", "steps"), [(0, 3), (30_000, 1), (30_000, 3)])
def test_steps_beyond_the_room_move_to_the_host_and_commit_to_the_same(made, device, form, room, steps, monkeypatch):
    network, statement = made(form, torch.bfloat16, device)
    recorder = Recorder(network, statement, device, room)
    monkeypatch.setattr(residents, "JOINED", steps)
    monkeypatch.setattr(residents, "BLOCK", 1 << 12)
    for trace, wanted in zip(
        recorder.generate_batch(BATCH), Recorder(network, statement).generate_batch(BATCH), strict=True
    ):
        assert_alike(statement, trace, wanted)
    assert recorder.peak.host > 0


def spans(trace):
    """The memory that a trace holds: distinct owners, with their sizes."""
    owners = {segment.owner.untyped_storage() for tensor in left(trace).values() for segment in tensor.segments}
    return {store.data_ptr(): store.nbytes() for store in owners}


def test_the_peak_is_what_was_kept_and_what_was_moved(llama, device, monkeypatch):
    network, statement = llama
    monkeypatch.setattr(residents, "JOINED", 1000)
    monkeypatch.setattr(residents.Kept, "_join", lambda kept: None)
    free = Recorder(network, statement, device, None)
    assert free.peak == Peak(0, 0)
    held = spans(free.generate(asked(20, 12, EVEN)))
    assert free.peak.host == 0
    assert 1 <= free.peak.device / sum(held.values()) < 1.02  # angles are seen as well, and follow from shapes
    monkeypatch.undo()

    nothing = Recorder(network, statement, device, 0)
    trace = nothing.generate(asked(20, 12, EVEN))
    assert 1 <= nothing.peak.host / sum(nbytes(trace[name]) for name in recorded(statement, trace)) < 1.02
    assert nothing.peak.device < free.peak.device  # the longest step alone

    half = Recorder(network, statement, device, free.peak.device // 2)
    half.generate(asked(20, 12, EVEN))
    assert 0 < half.peak.host < nothing.peak.host
    assert half.peak.device <= free.peak.device // 2 + nothing.peak.device


def recorded(statement, trace):
    """Tensors on the device that are no views of others."""
    return {n.outputs[0] for n in statement.nodes if n.op not in ("Reshape", "Transpose", "Slice")} & set(left(trace))


def nbytes(tensor):
    return tensor.spec.nbytes


def test_rows_that_moved_lie_in_pinned_memory(llama):
    class Pins(HostDevice):
        def pinned(self, nbytes):
            blocks.append(super().pinned(nbytes))
            return blocks[-1]

    blocks = []
    recorder = Recorder(*llama[:1], llama[1], Pins(), 0)
    trace = recorder.generate(asked())
    areas = [(block.ctypes.data, block.ctypes.data + block.nbytes) for block in blocks]
    for tensor in left(trace).values():
        for segment in tensor.segments:
            assert any(start <= segment.address < end for start, end in areas)
    assert sum(block.nbytes for block in blocks) < 3 * recorder.peak.host


@pytest.mark.parametrize("form", ["llama", "gemma 3"])
def test_a_long_step_moves_layer_by_layer(made, device, form, monkeypatch):
    network, statement = made(form, torch.bfloat16, device)
    recorder, given = Recorder(network, statement, device, 0), asked(40, 3)
    wanted = recorder.generate(given)
    whole = recorder.peak
    monkeypatch.setattr(capture, "LONG", 30)
    assert_alike(statement, recorder.generate(given), {name: host(tensor) for name, tensor in wanted.items()})
    assert recorder.peak.device < 0.7 * whole.device
    assert recorder.peak.host == whole.host


def host(tensor):
    return tensor.numpy() if isinstance(tensor, Resident) else tensor


def test_a_quarter_of_what_is_free_is_the_room_unless_told(llama, monkeypatch):
    class Full(HostDevice):
        def free(self):
            return 0

    for device, moves in ((Full(), True), (HostDevice(), False)):
        recorder = Recorder(*llama, device)
        recorder.generate(asked())
        assert (recorder.peak.host > 0) == moves


def test_a_trace_outlives_what_made_it(tmp_path, device):
    network, statement = decoders.made(tmp_path, decoders.CONFIGS["llama"], torch.float32)
    network.to(device.place)
    wanted = Recorder(network, statement).generate(asked())
    trace = Recorder(network, statement, device).generate(asked())
    Recorder(network, statement, device).generate(asked(seed=5))
    del network
    assert_alike(statement, trace, wanted)


def test_a_module_that_computes_otherwise_is_noticed_at_the_end(tmp_path, device):
    network, statement = decoders.made(tmp_path, decoders.CONFIGS["gemma 3"], torch.bfloat16)
    network.to(device.place)
    network.model.layers[1].mlp.register_forward_hook(lambda module, given, out: out * 2)  # a value, not a norm
    Recorder(network, statement, device).generate(asked())
    network.model.layers[1].input_layernorm.register_forward_hook(lambda module, given, out: out * 2)
    with pytest.raises(Unavailable, match=r"'layers\.1\.input_norm'"):
        Recorder(network, statement, device).generate(asked())


def test_a_network_elsewhere_than_the_device_is_refused(tmp_path):
    network, statement = decoders.made(tmp_path, decoders.CONFIGS["llama"])
    device = HostDevice()
    device.place = "cuda"
    with pytest.raises(Malformed, match="network is on 'cpu'"):
        Recorder(network, statement, device)
    if not torch.cuda.is_available():
        with pytest.raises(Malformed, match="no CUDA"):
            loaded(tmp_path, statement, 1, "sdpa", device)
    assert left(loaded(tmp_path, statement, 1, "sdpa", HostDevice()).generate(asked(tokens=2)))


def test_parts_move_as_numpy_moves_the_whole(device):
    rng = np.random.default_rng(0)
    for _ in range(60):
        t, heads, width = rng.integers(1, 5, 3).tolist()
        whole = rng.standard_normal((t, heads * width)).astype(np.float32)
        cuts = np.sort(rng.integers(0, t + 1, rng.integers(0, 3)))
        tensors = [torch.from_numpy(part).to(device.place) for part in np.split(whole, cuts) if len(part)]
        parts, start = Parts.of(tensors, 0), int(rng.integers(0, t))
        split = parts.reshape((1, t, heads, width))
        turned = split.transpose((0, 2, 1, 3))
        wanted = whole.reshape(1, t, heads, width).transpose(0, 2, 1, 3)
        for found, array in (
            (parts, whole),
            (split, whole.reshape(1, t, heads, width)),
            (turned, wanted),
            (turned.transpose((0, 2, 1, 3)).reshape((t, heads * width)), whole),
            (parts[start:t], whole[start:]),
            (turned.transpose((0, 2, 3, 1)), wanted.transpose(0, 2, 3, 1)) if len(parts.parts) == 1 else (parts, whole),
        ):
            resident = found.resident(device)
            assert resident.shape == array.shape
            assert np.array_equal(resident.numpy(), array)
    with pytest.raises(ValueError, match="cannot be reshaped"):
        Parts.of([torch.zeros(2, 6)], 0).reshape((3, 4))
    with pytest.raises(ValueError, match="not along its rows"):
        Parts.of([torch.zeros(2, 6)], 1)[0:1]


WORLDS = {
    "small": world.small,
    "mlp": graphs.mlp,
    "convolutions": graphs.convnet,
    "bfloat16": lambda: graphs.halves(TensorProto.BFLOAT16),
    "float16": lambda: graphs.halves(TensorProto.FLOAT16),
    "integers": graphs.integers,
}


@pytest.mark.parametrize("name", WORLDS)
def test_outputs_of_onnx_runtime_are_left_on_the_device(name, device):
    if device.place == "cuda" and "CUDAExecutionProvider" not in runtime.onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA")
    ours = WORLDS[name]()
    plan = ours.model.plan({name: array.shape for name, array in ours.inputs.items()})
    recorder = runtime.Recorder(ours.source, ours.model, plan, threads=1, device=device)
    kept = recorder.run(ours.inputs)
    assert set(kept) - set(left(kept)) == set(plan.inputs)
    arrays = {name: host(tensor) for name, tensor in kept.items()}
    if device.place == "cpu":
        arrays = runtime.record(ours.source, ours.model, ours.inputs, threads=1)
    assert_alike(ours.model, kept, arrays)


def test_a_runtime_without_the_device_runs_as_without_one():
    device, ours = HostDevice(), world.small()
    device.place = "cuda"
    if "CUDAExecutionProvider" in runtime.onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    trace = runtime.record(ours.source, ours.model, ours.inputs, 1, device)
    assert not left(trace)
    assert_alike(ours.model, trace, ours.run())


def test_a_trace_of_arrays_and_residents_may_be_mixed(device):
    ours = world.small()
    arrays = ours.run()
    mixed = {
        name: Resident.of(device, array) if i % 3 == 1 else array for i, (name, array) in enumerate(arrays.items())
    }
    assert_alike(ours.model, mixed, arrays)
