"""Row-wise: an output element follows from a group of input elements. The tables stand beside each noun."""

from gpu.ops import normalisation, pooling, reduction, residual, scanning
from gpu.ops.call import Op

OPS: dict[tuple[str, str], Op] = {**reduction.OPS, **normalisation.OPS, **scanning.OPS, **pooling.OPS, **residual.OPS}
