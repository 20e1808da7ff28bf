"""Which rows of attention are checked where a row is one head's: sampled positions, in a few groups of heads.

A row needs all keys and values before it, so a policy names how many heads of K and V an attention node opens; every
query head that reads them is checked at every sampled position. The groups are drawn for each node anew.
"""

import numpy as np

from gpu.ops.call import RowIds, Site, distinct
from proof.policy import Policy
from proof.sampling import drawn, words


def sample(site: Site, policy: Policy, seed: bytes) -> RowIds:
    """Rows (batch, head, position) of the output (batch, heads, queries, width), or those of any packed output."""
    out, keys = site.outputs[0], site.inputs[1]
    assert out is not None
    assert keys is not None
    if len(out.shape) == 3 or policy.heads is None:
        return drawn(seed, policy.rows, out.rows)
    batches, heads, queries, _ = out.shape
    groups = keys.shape[1]
    chosen = np.argsort(words(seed, f"heads/{site.node.index}", groups), kind="stable")[: policy.heads]
    each = heads // groups
    head = (np.sort(chosen)[:, None] * each + np.arange(each)).reshape(-1)
    batch, position = np.divmod(drawn(seed, policy.rows, batches * queries), max(queries, 1))
    return distinct((batch[:, None] * heads + head) * queries + position[:, None])
