"""The table itself: (domain, op) -> registry row. A new op is one row in its family's table."""

from gpu.ops import attention, contraction, decode, movement, pointwise, rowwise
from gpu.ops.call import Op

REGISTRY: dict[tuple[str, str], Op] = {
    key: op
    for table in (movement.OPS, pointwise.OPS, rowwise.OPS, contraction.OPS, attention.OPS, decode.OPS)
    for key, op in table.items()
}
