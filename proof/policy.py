"""Named policies: how much is committed, opened and checked, how strictly, and what that misses.

A name is `spot`, `standard` or `full`; `+PROFILE` holds the worker to the roundings of that profile (strength P)
where there is an interval for the op, and otherwise to what any honest kernel gives (strength F); `+boundary` after
it commits to the tensors between segments alone, and the verifier recomputes what lies inside.

Rows are drawn with replacement, so a cheat on a fraction f of a tensor's rows goes unopened with
probability (1 - f)^q. It holds for every tensor at once: rows are the same u_i of all (sampling.py).
"""

from dataclasses import asdict, dataclass
from itertools import product

from proof.digest import Tag, digest_json
from proof.errors import Malformed

FRACTIONS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
PROFILES = ("torch-eager", "torch-sdpa")  # where they round: gpu/profiles.py
FLOAT_CHECK_BITS = 20  # what one float check escapes with, once it meets a wrong row


@dataclass(frozen=True)
class Policy:
    """`rows` opened of each tensor (None: all) and `heads` of K and V of each attention node (None: all);
    `challenges` random vectors, `entries` spot-checked, in a product whose honest result is refused with probability
    at most 2^-`delta_bits`."""

    name: str
    rows: int | None
    heads: int | None = None
    profile: str | None = None
    boundary: bool = False
    challenges: int = 8
    entries: int = 256
    delta_bits: int = 40

    def misses(self, fraction: float) -> float:
        """The probability that no wrong row is opened when `fraction` of a tensor's rows are wrong."""
        if self.rows is None:
            return 0.0 if fraction > 0 else 1.0
        return (1.0 - fraction) ** self.rows

    def report(self) -> dict[str, float]:
        return {str(fraction): self.misses(fraction) for fraction in FRACTIONS}

    def hash(self) -> bytes:
        return digest_json(Tag.POLICY, asdict(self))

    @property
    def soundness_bits(self) -> int:
        """-log2 of the probability to miss a tensor that has half of its rows wrong, each by more than 25 of
        its check's bounds: opening none of them, or escaping the float check that meets one."""
        return FLOAT_CHECK_BITS if self.rows is None else min(self.rows, FLOAT_CHECK_BITS)


def _policies() -> dict[str, Policy]:
    amounts = {"spot": (4, 1), "standard": (16, 1), "full": (None, None)}
    found = {}
    strengths = [(None, False), *product(PROFILES, (False, True))]  # to recompute is to know where a worker rounds
    for (amount, (rows, heads)), (profile, boundary) in product(amounts.items(), strengths):
        name = "+".join(filter(None, (amount, profile, "boundary" if boundary else None)))
        found[name] = Policy(name, rows, heads, profile, boundary)
    return found


POLICIES = _policies()


def policy(name: str) -> Policy:
    try:
        return POLICIES[name]
    except KeyError:
        raise Malformed(f"policy {name!r} is not one of {', '.join(POLICIES)}") from None
