"""Rounding profiles: where the kernels of an engine round, so that a check may replay it (numerics-local section 1).

A row is data, named by a policy. The worker declares it by taking the task; the verifier recomputes in float64, rounds
where the profile rounds, and leaves room only for the fp32 arithmetic in between. Measured on: bench/README.md.
"""

from dataclasses import dataclass
from typing import Literal

from proof.policy import Policy


@dataclass(frozen=True)
class Profile:
    """Errors are in units of 2^-24 of what they stand beside."""

    attention: Literal["eager", "flash"]
    gamma: float = 4.0  # of a sum of products, beside the partial sums of its blocks of 16 terms
    scores: float = 8.0  # the same of the scores of attention
    exponential: float = 8.0  # of a flash kernel's exponential, beside the one that is replayed
    norm: float = 16.0  # of x / rms(x), which is rounded to the dtype before it meets the weight
    activation: float = 8.0  # of x sigmoid(x), beside the result
    trigonometric: float = 4.0  # of sines and cosines


PROFILES = {
    "torch-eager": Profile(attention="eager"),
    "torch-sdpa": Profile(attention="flash"),
}


def profile_of(policy: Policy) -> Profile:
    if policy.profile is None:
        raise ValueError(f"policy {policy.name!r} names no profile")
    return PROFILES[policy.profile]
