"""One query row of attention over a prefix of T keys, for every query head of one head of K and V (three), bf16.

`radius`: the exact row and how far an honest kernel's may lie (F). `eager`, `flash`: a profile's interval (P).
extra_info: `ms_a_head`.
"""

import ml_dtypes
import numpy as np
import pytest

from gpu.kernels.attention import replay
from gpu.kernels.attention_radius import Bounds, attend

BF16 = np.dtype(ml_dtypes.bfloat16)
HEADS = 3
BOUNDS = Bounds(0.125, 0.0, 2.0**-6, 2.0**-7, 0.0, 2.0**-8, 2.0**-13, 2.0**-8)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("keys", [512, 4096])
@pytest.mark.parametrize("kind", ["radius", "eager", "flash"])
def bench_row(benchmark, kind, keys, width):
    rng = np.random.default_rng(6)
    q = rng.standard_normal((HEADS, width)).astype(BF16).astype(np.float64)
    k, v = (rng.standard_normal((keys, width)).astype(BF16) for _ in range(2))
    scale = width**-0.5

    def check():
        if kind == "radius":
            return attend(q, k, v, np.zeros((HEADS, keys)), BOUNDS._replace(scale=scale), BF16)
        return replay(q, k, v, np.ones((HEADS, keys), np.bool_), scale, eager=kind == "eager", units=(8.0, 4.0, 8.0))

    z, radius = check()
    assert np.isfinite(z).all()
    assert np.isfinite(radius).all()
    benchmark.pedantic(check, rounds=21, warmup_rounds=2)
    benchmark.extra_info["ms_a_head"] = round(benchmark.stats.stats.median * 1e3 / HEADS, 3)
