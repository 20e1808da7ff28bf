"""Elements, casts and turned pairs on a device at the edge of the reference's radius; malformed tables are not read."""

import ml_dtypes
import numpy as np
import pytest
from onnx import helper
from scipy.special import erf

from gpu.clearing import pointwise, rotary
from gpu.ops import pointwise as ops
from gpu.ops.registry import REGISTRY
from gpu.rounding import FORMATS, U32
from tests.gpu.clearing import accepts, agree, call_of, cleared, taken
from tests.gpu.nodes import CONTRIBUTED, FORGERIES, Case, assembled, claims, run, same
from tests.gpu.test_device_rowwise import held_at_the_edge, left, reference, unanswered
from tests.gpu.test_pointwise import CASES

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
PAIRS = [(source, to) for source in DTYPES for to in DTYPES if source != to]
RUN = [case for case in CASES if REGISTRY[case.domain, case.op].clear and case.inputs[0].dtype in DTYPES]
FORMS = {
    "Sigmoid": Case("Sigmoid", [], opset=13),
    "Swish": Case("Swish", [], {"alpha": 0.7}, opset=24),
    "Gelu by erf": Case("Gelu", [], opset=20),
    "Gelu by tanh": Case("Gelu", [], {"approximate": "tanh"}, opset=20),
    "contributed Gelu": Case("Gelu", [], domain=CONTRIBUTED),
    "QuickGelu": Case("QuickGelu", [], domain=CONTRIBUTED),
}
CAST = REGISTRY["", "Cast"]
EXACT = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for module in (pointwise, rotary):
        monkeypatch.setattr(module, "LEAST", 0)


def data(dtype, *shape, scale=1.0, seed=4):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def every_row(run):
    return (np.arange(run.site.outputs[0].rows),)


@pytest.mark.parametrize("scale", [1e-41, 1e-3, 1.0, 20.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_no_entry_outside_of_its_radius_is_cleared(device, monkeypatch, form, dtype, scale):
    case = Case(form.op, [data(dtype, 2, 61, scale=scale)], form.attributes, opset=form.opset, domain=form.domain)
    run, op = unanswered(case), REGISTRY[form.domain, form.op]
    z, slack = reference(monkeypatch, ops, op, call_of(op, run, every_row(run), claims(run, every_row(run))))
    held_at_the_edge(device, op, run, z, slack)


@pytest.mark.parametrize("scale", [1e-40, 1e-3, 1e3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_of_one_operation_only_the_nearest_is_cleared(device, name, dtype, scale):
    a, b = data(dtype, 3, 50, scale=scale), np.abs(data(dtype, 3, 50, seed=5)) + dtype.type(0.5)
    exact = EXACT[name](a.astype(np.float64), b.astype(np.float64))
    nearest = exact.astype(dtype)
    run, op = assembled(Case(name, [a, b], opset=14), [nearest]), REGISTRY["", name]
    assert agree(device, op, call_of(op, run, every_row(run), [nearest]))
    for to in (-np.inf, np.inf):
        beside = np.nextafter(nearest, np.array(to, dtype))
        flushed = (beside == 0) & (np.abs(exact) < FORMATS[dtype].flush)
        assert left(device, op, call_of(op, run, every_row(run), [beside])) == (~flushed).sum()


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize(("source", "to"), PAIRS, ids=str)
def test_casts_between_float_formats_are_cleared(device, source, to, scale):
    x = data(source, 3, 90, scale=scale)
    attributes = {"to": helper.np_dtype_to_tensor_dtype(to)}
    run, op = assembled(Case("Cast", [x], attributes), [x.astype(to)]), CAST
    honest = x.astype(to)
    assert agree(device, op, call_of(op, run, every_row(run), [honest]))
    z = x.astype(np.float64)
    held_at_the_edge(device, op, run, z, U32 * np.abs(z) * (to.itemsize < 4))


def test_exact_ties_among_subnormal_numbers_are_left(device):
    x = np.array([[1.0, 1.5, 2.5]], ml_dtypes.bfloat16) * ml_dtypes.bfloat16(2.0**-24)
    run, op = (
        assembled(Case("Cast", [x], {"to": helper.np_dtype_to_tensor_dtype(DTYPES[1])}), [x.astype(np.float16)]),
        CAST,
    )
    call = call_of(op, run, every_row(run), claims(run, every_row(run)))
    assert accepts(op, call) is not None
    assert left(device, op, call) == 2


def test_a_cast_like_another_tensor_is_cleared(device):
    x, like = data(np.float32, 3, 90), data(np.float16, 4, 7)
    run, op = assembled(Case("CastLike", [x, like], opset=15), [x.astype(np.float16)]), REGISTRY["", "CastLike"]
    assert agree(device, op, call_of(op, run, every_row(run), claims(run, every_row(run))))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (data(np.float32, 3, 9), data(np.float32, 3, 9).astype(np.float64)),
        (data(np.float32, 3, 9), data(np.float32, 3, 9).astype(np.int32)),
        (np.arange(27).reshape(3, 9), np.arange(27).reshape(3, 9).astype(np.float32)),
        (data(np.float32, 3, 9), data(np.float32, 3, 9)),
    ],
)
def test_other_casts_are_not_taken(device, x, y):
    run = assembled(Case("Cast", [x], {"to": helper.np_dtype_to_tensor_dtype(y.dtype)}), [y])
    assert not taken(device, CAST, call_of(CAST, run, every_row(run), [y]))


@pytest.mark.parametrize("case", RUN, ids=str)
def test_what_onnx_runtime_computes_is_cleared(device, case):
    result, op = run(case), REGISTRY[case.domain, case.op]
    rows, honest = every_row(result), claims(result, every_row(result))
    call = call_of(op, result, rows, honest)
    if not taken(device, op, call):
        assert case.op.startswith("Cast")
        return
    if np.isfinite(honest[0].astype(np.float64)).all():
        assert cleared(device, op, call).ratio == pytest.approx(accepts(op, call).ratio, rel=1e-6)
    for forge in FORGERIES.values():
        forged = forge(honest[0], np.random.default_rng(0))
        assert same(forged, honest[0]) or not agree(device, op, call_of(op, result, rows, [forged]))


def test_an_attribute_that_an_op_does_not_have_changes_nothing(device):
    x = data(np.float32, 4, 40)
    by_erf = (x / 2 * (1 + erf(x / np.float32(2**0.5)))).astype(np.float32)
    by_tanh = (x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))).astype(np.float32)
    run, op = assembled(Case("Gelu", [x], {"alpha": 1.0}, domain=CONTRIBUTED), [by_erf]), REGISTRY[CONTRIBUTED, "Gelu"]
    assert agree(device, op, call_of(op, run, every_row(run), [by_erf]))
    assert not agree(device, op, call_of(op, run, every_row(run), [by_tanh]))


ROTATED = {  # shapes of x, of both tables, of positions; attributes
    "heads as a dimension": ((1, 2, 5, 8), (1, 5, 4), None, {}),
    "interleaved": ((2, 2, 5, 8), (20, 4), (2, 5), {"interleaved": 1}),
    "heads in a row": ((2, 5, 24), (20, 4), (2, 5), {"num_heads": 3}),
    "half of a head": ((2, 3, 4, 8), (20, 2), (2, 4), {"rotary_embedding_dim": 4}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ROTATED.values(), ids=ROTATED.keys())
def test_no_turned_entry_outside_of_its_radius_is_cleared(device, form, dtype):
    shape, table, places, attributes = form
    x, tables = data(dtype, *shape, scale=3), [data(dtype, *table, seed=seed) for seed in (6, 7)]
    positions = [] if places is None else [np.random.default_rng(8).integers(0, table[0], places)]
    case = Case("RotaryEmbedding", [x, *tables, *positions], attributes, opset=24)
    run, op = unanswered(case), REGISTRY["", "RotaryEmbedding"]
    z, size, turned = rotation(x, tables, positions, attributes)
    slack = (FORMATS[dtype].u + U32) * size
    nearest = z.astype(dtype)
    nearest[~turned] = x.reshape(z.shape)[~turned]
    assert agree(device, op, call_of(op, run, every_row(run), [nearest]))
    for other in (np.inf, -np.inf):
        moved = np.nextafter(nearest, np.array(other, dtype))
        assert left(device, op, call_of(op, run, every_row(run), [np.where(turned, nearest, moved)])) == (~turned).sum()
    if turned.all():
        held_at_the_edge(device, op, run, z, slack)


def rotation(x, tables, positions, attributes):
    """Exact values and |c a| + |s b|, as rows of x; and which of them are turned."""
    heads = attributes.get("num_heads", 1)
    if x.ndim == 4:
        batch, count, length, width = x.shape
        numbers = np.broadcast_to(np.arange(batch * length).reshape(batch, 1, length), (batch, count, length)).reshape(
            -1
        )
    else:
        numbers, width = np.arange(len(x) * x.shape[1]), x.shape[2] // heads
    if positions:
        numbers = positions[0].reshape(-1)[numbers]
    c, s = (table.reshape(-1, table.shape[-1])[numbers].astype(np.float64)[:, None] for table in tables)
    wide, half = x.reshape(len(numbers), heads, width).astype(np.float64), c.shape[-1]
    at = np.arange(half)
    one, two = (2 * at, 2 * at + 1) if attributes.get("interleaved") else (at, at + half)
    z, size, turned = wide.copy(), np.zeros_like(wide), np.zeros(wide.shape, np.bool_)
    first, second = wide[..., one], wide[..., two]
    z[..., one], z[..., two] = c * first - s * second, s * first + c * second
    size[..., one] = np.abs(c * first) + np.abs(s * second)
    size[..., two] = np.abs(s * first) + np.abs(c * second)
    turned[..., : 2 * half] = True
    return tuple(part.reshape(len(numbers), -1) for part in (z, size, turned))


@pytest.mark.parametrize(
    ("shape", "cos", "sin", "attributes"),
    [
        ((1, 2, 4, 8), (4, 6), (4, 6), {}),
        ((1, 2, 4, 8), (4, 4), (4, 2), {}),
        ((1, 2, 4, 8), (4, 4), (2, 4), {}),
        ((1, 2, 4, 8), (1, 2, 4), (1, 2, 4), {}),
        ((1, 4, 16), (4, 4), (4, 4), {}),
        ((1, 4, 16), (4, 1), (4, 1), {"num_heads": 5}),
        ((1, 4, 16), (4, 1), (4, 1), {"num_heads": -2}),
    ],
)
def test_tables_that_do_not_fit_are_not_read(device, shape, cos, sin, attributes):
    x, positions = data(np.float32, *shape), [np.arange(4)[None]] if len(cos) == 2 else []
    inputs = [x, data(np.float32, *cos), data(np.float32, *sin), *positions]
    run, op = (
        unanswered(Case("RotaryEmbedding", inputs, attributes, opset=24, constant=(1, 2))),
        REGISTRY["", "RotaryEmbedding"],
    )
    assert not taken(device, op, call_of(op, run, every_row(run), claims(run, every_row(run))))
