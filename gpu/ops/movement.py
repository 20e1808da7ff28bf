"""Movement: ops whose output elements are input elements, or follow from shapes and attributes.

A row of the table pulls output elements back: which element of which input each of them is. Moved data is compared
bit for bit. Where a steering input (the indices of Gather) is data, every row that it might choose is opened.
Where rows move whole, rows are pulled instead of elements: `whole` says when, on tensors seen as one element wide.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gpu.ops import placement
from gpu.ops.call import Call, Family, Measure, Op, RowIds, Site, Tensor, distinct, every_row, rows_of
from gpu.ops.indexing import accepts, blocks, elements_of, known_tensor, measured, output, source, unknown
from gpu.ops.placement import FILL
from gpu.rounding import Interval, Values, compare_equal, determined
from proof.graph import Node, Spec


@dataclass(frozen=True, kw_only=True)
class Movement:
    """`pull(site, position, inputs, flat)` for output `position`; of `inputs` it reads only those that steer.

    `steering(site, steer, flat)` gives the elements of a steering input that are read; all of them when it is None.
    """

    pull: placement.Puller
    whole: Callable[[Site, int], bool] = placement.never
    steers: tuple[int, ...] = ()
    steering: Callable[[Site, npt.NDArray[np.int64]], npt.NDArray[np.int64]] | None = None
    values: tuple[int, ...] = ()
    refuses: Callable[[Node], str | None] = accepts


def movement(row: Movement) -> Op:
    def reach(site: Site, position: int, rows: RowIds) -> Mapping[int, RowIds]:
        if any(steer in row.steers for steer, _ in unknown(site)):
            return _reach_steered(row, site, position, rows)
        return _reach(row, site, position, rows)

    def check(call: Call) -> Measure:
        def block(position: int, rows: RowIds, claimed: Values) -> float:
            return compare_equal(claimed, _moved(row, call, position, rows))

        return measured(call, block, lambda position: output(call.site, position).width)

    def interval(call: Call) -> Interval:
        rows = call.rows[0]
        parts = [_moved(row, call, 0, rows[part]) for part in blocks(rows, output(call.site).width)]
        spec = output(call.site)
        return determined(np.concatenate(parts) if parts else np.zeros((0, spec.width), spec.dtype))

    return Op(
        family=Family.MOVEMENT,
        reach=reach,
        check=check,
        interval=interval,
        exact=True,
        values=row.values,
        refuses=row.refuses,
    )


def _reach(row: Movement, site: Site, position: int, rows: RowIds) -> dict[int, RowIds]:
    inputs = tuple(known_tensor(site, i) for i in range(len(site.inputs)))
    seen, _ = _view(row, site, position)
    spec = output(seen, position)
    needed: dict[int, list[RowIds]] = {i: [] for i, _ in unknown(site)}
    for part in blocks(rows, spec.width):
        pull = row.pull(seen, position, inputs, elements_of(rows[part], spec))
        for i, found in needed.items():
            flat = pull.flat[pull.of(i)]
            if flat.size:
                found.append(rows_of(flat, source(seen, i)))
    return {i: distinct(np.concatenate(found)) for i, found in needed.items() if found}


def _reach_steered(row: Movement, site: Site, position: int, rows: RowIds) -> dict[int, RowIds]:
    needed = {}
    for i, spec in unknown(site):
        if i not in row.steers or row.steering is None:
            needed[i] = every_row(spec)
        else:
            needed[i] = rows_of(row.steering(site, elements_of(rows, output(site, position))), spec)
    return needed


def _view(row: Movement, site: Site, position: int) -> tuple[Site, bool]:
    """The site with tensors one element wide where rows move whole, else as it is."""
    if not output(site, position).width or not row.whole(site, position):
        return site, False
    inputs = tuple(spec if i in row.steers else _narrow(spec) for i, spec in enumerate(site.inputs))
    return replace(site, inputs=inputs, outputs=tuple(_narrow(spec) for spec in site.outputs)), True


def _narrow(spec: Spec | None) -> Spec | None:
    return spec if spec is None or not spec.shape else Spec(spec.dtype, (*spec.shape[:-1], 1))


def _moved(row: Movement, call: Call, position: int, rows: RowIds) -> Values:
    site, whole = _view(row, call.site, position)
    pull = row.pull(site, position, call.inputs, elements_of(rows, output(site, position)))
    spec = output(call.site, position)
    if isinstance(pull.source, int) and pull.source != FILL:
        return _fetch(call.inputs[pull.source], pull.flat, whole)
    moved = np.empty((len(rows), spec.width), spec.dtype)
    moved[...] = pull.fill
    for i, tensor in enumerate(call.inputs):
        at = pull.of(i)
        if whole and at.any():
            moved[at[:, 0]] = _fetch(tensor, pull.flat[at][:, None], whole)
        elif at.any():
            moved[at] = _fetch(tensor, pull.flat[at], whole)
    return moved


def _fetch(tensor: Tensor | None, flat: npt.NDArray[np.int64], whole: bool) -> Values:
    if tensor is None:
        raise ValueError("an absent input cannot be moved")
    return tensor.take(flat[:, 0]) if whole else tensor.elements(flat)


def _random_dropout(node: Node) -> str | None:
    return (
        "is random: it was exported in training mode" if node.since < 7 and not node.attributes.get("is_test") else None
    )


def _reduces(node: Node) -> str | None:
    reduction = node.attributes.get("reduction", "none")
    return None if reduction == "none" else f"reduction {reduction!r} of scattered updates is not supported"


def _sparse(node: Node) -> str | None:
    plain = [name for name in node.attributes if name.startswith("value")]
    return None if plain else "is a sparse or string constant"


def _pad_mode(node: Node) -> str | None:
    mode = node.attributes.get("mode", "constant")
    return None if mode in placement.PAD_MODES else f"mode {mode!r} is unknown"


def _miscounted(node: Node) -> str | None:
    """As of a negative `batch_dims`, onnx's inference would write beside what it allocated."""
    parts = node.attributes.get("num_outputs", len(node.outputs))
    return None if parts == len(node.outputs) else f"num_outputs={parts} with {len(node.outputs)} outputs"


def _negative_batch(node: Node) -> str | None:
    return None if node.attributes.get("batch_dims", 0) >= 0 else "batch_dims is negative"


_renumbered = Movement(pull=placement.same, whole=placement.same_width, values=(1,))

_TABLE: dict[str, Movement] = {
    "Identity": _renumbered,
    "Reshape": _renumbered,
    "Flatten": _renumbered,
    "Squeeze": _renumbered,
    "Unsqueeze": _renumbered,
    "Dropout": Movement(pull=placement.dropout, whole=placement.same_width, values=(2,), refuses=_random_dropout),
    "Transpose": Movement(pull=placement.transpose, whole=placement.keeps_last),
    "Slice": Movement(pull=placement.slice_, whole=placement.unsliced, values=(1, 2, 3, 4)),
    "Split": Movement(pull=placement.split, whole=placement.off_axis, values=(1,), refuses=_miscounted),
    "Concat": Movement(pull=placement.concat, whole=placement.off_axis),
    "Expand": Movement(pull=placement.expand, whole=placement.same_width, values=(1,)),
    "Tile": Movement(pull=placement.tile, whole=placement.same_width, values=(1, 2)),
    "Gather": Movement(
        pull=placement.gather, whole=placement.off_axis, steers=(1,), steering=placement.gather_steering
    ),
    "GatherElements": Movement(pull=placement.gather_elements, steers=(1,), steering=placement.as_output),
    "GatherND": Movement(
        pull=placement.gather_nd, steers=(1,), steering=placement.gather_nd_steering, refuses=_negative_batch
    ),
    "Scatter": Movement(pull=placement.scatter_elements, steers=(1,)),
    "ScatterElements": Movement(pull=placement.scatter_elements, steers=(1,), refuses=_reduces),
    "ScatterND": Movement(pull=placement.scatter_nd, steers=(1,), refuses=_reduces),
    "Pad": Movement(pull=placement.pad, values=(1, 3), refuses=_pad_mode),
    "CenterCropPad": Movement(pull=placement.center_crop_pad, values=(1,)),
    "DepthToSpace": Movement(pull=placement.depth_to_space),
    "SpaceToDepth": Movement(pull=placement.space_to_depth),
    "ReverseSequence": Movement(pull=placement.reverse_sequence, steers=(1,)),
    "Trilu": Movement(pull=placement.trilu, steers=(1,)),
    "OneHot": Movement(pull=placement.one_hot, steers=(0,), steering=placement.one_hot_steering, values=(1,)),
    "Compress": Movement(pull=placement.compress, values=(1,)),
    "NonZero": Movement(pull=placement.non_zero, values=(0,)),
    "Shape": Movement(pull=placement.shape),
    "Size": Movement(pull=placement.size),
    "Constant": Movement(pull=placement.constant, refuses=_sparse),
    "ConstantOfShape": Movement(pull=placement.constant_of_shape, values=(0,)),
    "EyeLike": Movement(pull=placement.eye_like),
    "Range": Movement(pull=placement.range_, values=(0, 1, 2)),
}

OPS: dict[tuple[str, str], Op] = {("", name): movement(row) for name, row in _TABLE.items()}
