"""What a device draws is what proof/sampling.py draws, bit for bit."""

import numpy as np
import pytest

from gpu import draws
from proof.sampling import Draw

SEED = bytes(range(32))
SHAPES = [1, 2, 7, 8, 9, (3, 5), (8, 1001), (0, 4)]


@pytest.mark.parametrize("scope", ["", "node/3", "x" * 22, "x" * 500, "ü" * 450])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_draws_are_those_of_the_definition(device, scope, shape):
    draw = Draw(SEED, scope)
    for name in ("normals", "words31"):
        found, wanted = device.numpy(getattr(draws, name)(device, draw, name, shape)), getattr(draw, name)(name, shape)
        assert found.dtype == wanted.dtype
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("bound", [1, 2, 12345, 2**32 + 1, 2**62 + 5, 2**63 - 1])
@pytest.mark.parametrize("count", [1, 8, 100, 257])
def test_entries_are_those_of_the_definition(device, bound, count):
    draw = Draw(SEED, "node/1")
    assert np.array_equal(device.numpy(draws.entries(device, draw, "e", count, bound)), draw.entries("e", count, bound))


def test_a_hundred_thousand_normals_agree(device):
    draw = Draw(SEED, "many")
    assert np.array_equal(device.numpy(draws.normals(device, draw, "n", 100_001)), draw.normals("n", 100_001))


def test_what_cannot_be_drawn_is_refused(device):
    with pytest.raises(ValueError, match="one chunk"):
        draws.normals(device, Draw(SEED, "x" * 1000), "n", 1)
    for bound in (0, -1, 2**63):
        with pytest.raises(ValueError, match="nothing to draw"):
            draws.entries(device, Draw(SEED, ""), "e", 1, bound)
