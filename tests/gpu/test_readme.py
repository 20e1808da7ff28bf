"""What gpu/README.md shows is real: the table of ops, the contract's constants, the new row, the measured figures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from gpu import freivalds
from gpu.ops import pointwise
from gpu.ops.registry import REGISTRY
from gpu.plan import Model
from gpu.rounding import FORMATS
from proof.errors import Malformed, Reason
from proof.graph import dtype_name
from tests.gpu import test_pointwise
from tests.gpu.nodes import accepted_forgeries, assembled, check, sampled
from tests.world import World

ROOT = Path(__file__).parents[2]
README = (ROOT / "gpu/README.md").read_text()
SECTIONS = dict(re.findall(r"^#{2,3} (.+?)\n(.*?)(?=^#{2,3} |\Z)", README, re.MULTILINE | re.DOTALL))
ROW, TEST_ROW = re.findall(r"```python\n(.+?),?\n```", SECTIONS["A new op is one table row"], re.DOTALL)
RESULTS = json.loads((ROOT / "bench/results/vacuity.json").read_text())
SIZES = ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5")


def table(section):
    """Cells of the rows of a section's tables, headings left out."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line[:1] == "|"]
    return [
        row for i, row in enumerate(rows) if "---" not in row[0] and (i + 1 == len(rows) or "---" not in rows[i + 1][0])
    ]


@pytest.mark.parametrize("family", ["movement", "pointwise", "rowwise", "contraction", "attention"])
def test_the_tables_name_every_registered_op_once_and_no_other(family):
    named = [op for row in table(SECTIONS[family]) for op in re.findall(r"`(.+?)`", row[0])]
    registered = [f"{domain}.{name}".lstrip(".") for (domain, name), op in REGISTRY.items() if op.family == family]
    assert sorted(named) == sorted(registered)


def number(text):
    base, _, exponent = text.partition("^")
    return float(base) ** float(exponent or 1)


def test_the_constants_are_those_of_the_code():
    contract = {row[0]: row[1:] for row in table(SECTIONS["The numeric contract"])}
    for dtype, form in FORMATS.items():
        p, least, flush = contract[dtype_name(dtype)]
        assert (int(p), int(least), 0.0 if flush == "never" else number(flush)) == (form.p, form.e_min, form.flush)
    for name, profile in (("fp32", freivalds.FP32), ("tc", freivalds.TC)):
        fields = (profile.u, profile.alpha, profile.beta, profile.gamma, profile.constant)
        assert tuple(map(number, contract[name][1:])) == fields


def test_what_is_refused_is_refused_in_these_words():
    files = [path for folder in ("gpu", "proof") for path in (ROOT / folder).rglob("*.py")]
    source = "\n".join(path.read_text() for path in files)
    for *_, words in table(SECTIONS["What is refused"]):
        assert words.strip("`") in source


def model_bytes():
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 7]) for name in ("x", "y")]
    node = helper.make_node("SquaredRelu", ["x"], ["y"], domain="com.example")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.example", 1)]
    graph = helper.make_graph([node], "one", infos[:1], infos[1:])
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


@pytest.fixture
def row(monkeypatch):
    (entry,) = eval(f"{{{ROW}}}", vars(pointwise)).items()
    monkeypatch.setitem(REGISTRY, *entry)
    return entry


def test_an_unknown_op_is_refused_in_these_words():
    with pytest.raises(Malformed) as refusal:
        Model.open(model_bytes())
    assert str(refusal.value) in SECTIONS["A new op is one table row"]


def test_with_its_row_a_model_of_it_is_proven_and_a_lie_is_not(row):
    x = np.random.default_rng(1).standard_normal((40, 7)).astype(np.float32)
    world = World(model_bytes(), Model.open(model_bytes()), {"x": x})
    y = np.maximum(x, 0) ** 2
    assert world.judge(world.prove({"x": x, "y": y})).verdict == "accepted"
    verdict = world.judge(world.prove({"x": x, "y": y * np.float32(1 + 1e-6)}))
    assert (verdict.verdict, verdict.reason, verdict.node) == ("rejected", Reason.REEXECUTION, "y")


def test_its_test_row_tests_it(row):
    case = eval(TEST_ROW, vars(test_pointwise))
    (key, op), rng = row, np.random.default_rng(2)
    worker = assembled(case, [np.maximum(case.inputs[0], 0) ** 2])
    assert (case.domain, case.op) == key
    assert check(op, worker, sampled(worker, rng, None)).entries == worker.outputs[0].size
    assert accepted_forgeries(op, worker, rng) == []


def figures(group, dtype, entry):
    """A row of the table of figures."""
    tries = list(entry.get("gross", {}).values())
    gross = f"{sum(t[0] for t in tries)} of {sum(t[1] for t in tries):,}"
    pairs = [[entry.get(kind, {}).get(size) for kind in ("row", "entry")] for size in SIZES]
    cells = [" · ".join(f"{100 * a[0] / a[1]:.1f}" if a else "-" for a in pair) if any(pair) else "" for pair in pairs]
    honest = entry["honest"]
    return f"| {group} | {dtype} | {honest['rows']:,} | {honest['refused']} | {gross} | {' | '.join(cells)} |"


def test_the_figures_are_those_of_the_last_measurement():
    groups = {**RESULTS["families"], **{f"{op}, folded": dtypes for op, dtypes in RESULTS["folded"].items()}}
    wanted = [figures(group, dtype, entry) for group, dtypes in groups.items() for dtype, entry in dtypes.items()]
    shown = [line for line in SECTIONS["No vacuous check"].splitlines() if line.startswith("| ")][1:]
    assert shown == wanted


def test_every_registered_op_was_measured():
    assert RESULTS["ops"].keys() == {f"{domain}.{name}".lstrip(".") for domain, name in REGISTRY}
