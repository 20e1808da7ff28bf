"""What proof/sampling.py draws, drawn on a device: the same bits from the same seed and label."""

from math import prod

import numpy as np

from gpu.blake3 import CHUNK
from gpu.device import Device, Memory
from proof.digest import KEYS, Tag
from proof.sampling import ATANH, COS, HALF_PI, LN_2, SEED_BYTES, SIN, Draw, Shape

THREADS = 128
WORDS_A_BLOCK = 16


def normals(device: Device, draw: Draw, label: str, shape: Shape) -> Memory:
    """Standard normals, float32."""
    numbers = device.array(np.array([*ATANH, *COS, *SIN, LN_2, HALF_PI]))
    return _drawn(device, draw, label, shape, ("draw_normals", np.float32, 2), numbers)


def words31(device: Device, draw: Draw, label: str, shape: Shape) -> Memory:
    """Uniform integers in [0, 2^31), int64."""
    return _drawn(device, draw, label, shape, ("draw_words31", np.int64, 1))


def entries(device: Device, draw: Draw, label: str, count: int, bound: int) -> Memory:
    """Uniform integers in [0, bound), int64. Raises ValueError where there is nothing to draw from."""
    if not 0 < bound < 2**63:
        raise ValueError(f"nothing to draw from in [0, {bound})")
    return _drawn(device, draw, label, count, ("draw_entries", np.int64, 2), np.uint64(bound))


def _drawn(
    device: Device, draw: Draw, label: str, shape: Shape, kind: tuple[str, type[np.generic], int], *given: np.generic
) -> Memory:
    """`kind`: the kernel, the dtype of what it makes, and the words of 32 bits that each takes."""
    kernel, dtype, words = kind
    message = draw.seed + f"{draw.scope}/{label}".encode()
    if len(draw.seed) != SEED_BYTES or len(message) > CHUNK:
        raise ValueError(f"a seed of {SEED_BYTES} bytes and its label make one chunk, not {len(message)} bytes")
    count = shape if isinstance(shape, int) else prod(shape)
    blocks = -(-count * words // WORDS_A_BLOCK)
    out = device.empty(shape, dtype)
    text, key = device.array(np.frombuffer(message, np.uint8)), device.array(np.frombuffer(KEYS[Tag.DRAW], np.uint32))
    device.launch(
        *("draw", kernel, -(-blocks // THREADS), THREADS),
        *(text, np.int32(len(message)), key, *given, np.int64(count), out),
    )
    return out
