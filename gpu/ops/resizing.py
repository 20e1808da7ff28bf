"""Taps of Resize and Upsample: nearest, linear and cubic, with ONNX's coordinate transformations.

Coordinates are computed in float32, in the order of ONNX Runtime's kernels, because rounding decides which element is
nearest. Linear and cubic weights are continuous in the coordinate, so their errors go into the radius.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from gpu.ops.call import Site
from gpu.ops.indexing import known, normalize_axis, output, source
from gpu.ops.windows import Taps, straight
from gpu.rounding import Array, Values, compare_between
from proof.graph import Node

F32 = np.float32
COORDINATES = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
)


def refuses(node: Node) -> str | None:
    attributes = node.attributes
    if attributes.get("antialias", 0):
        return "antialiased resizing is not supported"
    if attributes.get("exclude_outside", 0):
        return "exclude_outside=1 is not supported"
    if attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return "only keep_aspect_ratio_policy=stretch is supported"
    coordinate = attributes.get("coordinate_transformation_mode", "half_pixel")
    return None if coordinate in COORDINATES else f"coordinate_transformation_mode {coordinate!r} is not supported"


def mode(site: Site) -> str:
    return str(site.node.attributes.get("mode", "nearest"))


def taps(site: Site) -> list[Taps]:
    shape, out = source(site, 0).shape, output(site).shape
    return [
        straight(size) if size == wanted and scale == 1 else _taps(site, size, wanted, F32(scale))
        for size, wanted, scale in zip(shape, out, _scales(site), strict=True)
    ]


def _scales(site: Site) -> list[float]:
    """Scale of every axis: given, or from the sizes."""
    shape, out, node = source(site, 0).shape, output(site).shape, site.node
    given = known(site, 2 if node.op == "Resize" and node.since >= 11 else 1)
    listed = node.attributes.get("scales") if given is None else [float(scale) for scale in given.reshape(-1)]
    if not listed:
        return [float(F32(wanted) / F32(size)) if size else 1.0 for size, wanted in zip(shape, out, strict=True)]
    scales = [1.0] * len(shape)
    for axis, scale in zip(node.attributes.get("axes", range(len(shape))), listed, strict=True):
        scales[normalize_axis(axis, len(shape))] = scale
    return scales


def _coordinate(site: Site) -> str:
    before = site.node.op == "Upsample" or site.node.since < 11
    return "asymmetric" if before else str(site.node.attributes.get("coordinate_transformation_mode", "half_pixel"))


def _original(kind: str, size: int, wanted: int, scale: np.float32) -> npt.NDArray[np.float32]:
    """Coordinates in the input of the output positions."""
    at = np.arange(wanted, dtype=F32)
    if kind == "asymmetric":
        return at / scale
    if kind == "align_corners":
        return at * F32(size - 1) / F32(wanted - 1) if wanted > 1 else np.zeros(1, F32)
    if kind == "pytorch_half_pixel" and wanted == 1:
        return np.zeros(1, F32)
    half = (at + F32(0.5)) / scale - F32(0.5)
    if kind != "half_pixel_symmetric":
        return half
    centre = F32(size) / F32(2)
    return centre * (F32(1) - F32(wanted) / (scale * F32(size))) + half


def _taps(site: Site, size: int, wanted: int, scale: np.float32) -> Taps:
    original = _original(_coordinate(site), size, wanted, scale)
    if mode(site) == "nearest":
        index = np.clip(_nearest(site, original, scale), 0, size - 1)
        return index[:, None], np.ones((wanted, 1))
    if mode(site) == "cubic":
        return _cubic(original.astype(np.float64), size, site.node.attributes.get("cubic_coeff_a", -0.75))
    return _linear(np.clip(original.astype(np.float64), 0, size - 1), size)


def _nearest(site: Site, at: npt.NDArray[np.float32], scale: np.float32) -> npt.NDArray[np.int64]:
    kind = site.node.attributes.get("nearest_mode", "round_prefer_floor")
    if site.node.op == "Upsample" or site.node.since < 11:
        kind = "ceil" if scale < 1 else "floor"
    roundings: dict[str, Callable[[npt.NDArray[np.float32]], Values]] = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_floor": lambda x: np.ceil(x - F32(0.5)),
        "round_prefer_ceil": lambda x: np.floor(x + F32(0.5)),
    }
    return roundings[str(kind)](at).astype(np.int64)


def _linear(at: Array, size: int) -> Taps:
    low = np.minimum(np.floor(at), max(size - 2, 0))
    index = np.minimum(low[:, None] + np.arange(2), size - 1).astype(np.int64)
    return index, np.stack([1.0 - (at - low), at - low], axis=1)


def _cubic(at: Array, size: int, a: float) -> Taps:
    """Keys' kernel; taps beyond the border repeat its element."""
    low = np.floor(at)
    distance = np.abs((at - low)[:, None] - np.arange(-1, 3))
    near = ((a + 2.0) * distance - (a + 3.0)) * distance * distance + 1.0
    far = ((a * distance - 5.0 * a) * distance + 8.0 * a) * distance - 4.0 * a
    index = np.clip(low[:, None] + np.arange(-1, 3), 0, size - 1).astype(np.int64)
    return index, np.where(distance <= 1, near, far)


def weight_error(site: Site) -> float:
    """Error of the weights in units of u: coordinates up to the length of an axis, rounded about eight times."""
    return 8.0 * sum(size for size, _ in _resized(site))


def _resized(site: Site) -> list[tuple[int, int]]:
    shape, out = source(site, 0).shape, output(site).shape
    return [(size, wanted) for size, wanted in zip(shape, out, strict=True) if size != wanted]


def compare_integers(claimed: Values, elements: Values, weights: Array) -> float:
    """Integers resized with weights: the fraction may be cut off or rounded."""
    z = np.sum(elements.astype(np.float64) * weights, axis=-1)
    doubt = 2.0**-16 * (1.0 + np.sum(np.abs(elements.astype(np.float64)), axis=-1))
    limits = np.iinfo(claimed.dtype)
    low, high = (
        np.clip(np.floor(z - doubt), limits.min, limits.max),
        np.clip(np.ceil(z + doubt), limits.min, limits.max),
    )
    return compare_between(claimed, low, high)
