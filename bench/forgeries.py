"""Forgeries of opened rows, gross and small, for bench/vacuity.py.

A gross one is at least 10 % off in norm over all opened rows. A row has Gaussian noise of a relative size added, an
entry is moved by it. What rounding takes back to the honest value is no forgery.
"""

from collections.abc import Callable

import numpy as np

from gpu.rounding import is_float
from tests.gpu.nodes import Array, same

Random = np.random.Generator
Forge = Callable[[Array, Random], Array]

SIZES = ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5")
GROSS = 0.1


def _size(claim: Array) -> float:
    wide = claim.astype(np.float64)
    return float(np.sqrt(np.mean(np.where(np.isfinite(wide), wide, 0.0) ** 2)))


def _random(claim: Array, rng: Random) -> Array:
    """Of the right norm; integers and booleans in another order."""
    if is_float(claim.dtype):
        return (rng.standard_normal(claim.shape) * _size(claim)).astype(claim.dtype)
    return rng.permutation(claim.reshape(-1)).reshape(claim.shape)


def _row(size: float) -> Forge:
    def forge(claim: Array, rng: Random) -> Array:
        forged, i = claim.copy(), rng.integers(len(claim))
        noise = rng.standard_normal(claim.shape[1]) * _size(claim[i]) * size
        forged[i] = (claim[i].astype(np.float64) + noise).astype(claim.dtype)
        return forged

    return forge


def _entry(size: float) -> Forge:
    def forge(claim: Array, rng: Random) -> Array:
        forged, at = claim.copy(), np.unravel_index(rng.integers(claim.size), claim.shape)
        forged[at] = float(claim[at]) * (1.0 + size * rng.choice([-1.0, 1.0]))
        return forged

    return forge


FORGERIES: dict[tuple[str, str], Forge] = {
    ("gross", "random"): _random,
    ("gross", "zeros"): lambda claim, rng: np.zeros_like(claim),
    ("gross", "shifted"): lambda claim, rng: np.roll(claim, 1, axis=1),
    ("gross", "swapped rows"): lambda claim, rng: np.roll(claim, 1, axis=0),
    ("gross", "negated"): lambda claim, rng: ~claim if claim.dtype == np.bool_ else -claim,
    **{("row", size): _row(float(size)) for size in SIZES},
    **{("entry", size): _entry(float(size)) for size in SIZES},
}


def differs(kind: str, forged: Array, claim: Array) -> bool:
    """Whether it is a forgery at all."""
    if kind != "gross":
        return not same(forged, claim)
    wide, honest = (np.nan_to_num(x.astype(np.float64), posinf=1e30, neginf=-1e30) for x in (forged, claim))
    return bool(np.linalg.norm(wide - honest) > GROSS * np.linalg.norm(honest))
