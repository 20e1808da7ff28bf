"""Named policies: how much of a proof is opened and checked, and what that misses.

Rows are drawn with replacement, so a cheat on a fraction f of a tensor's rows goes unopened with
probability (1 - f)^q. It holds for every tensor at once: rows are the same u_i of all (sampling.py).
"""

from dataclasses import asdict, dataclass

from proof.digest import Tag, digest_json
from proof.errors import Malformed

FRACTIONS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
FLOAT_CHECK_BITS = 20  # what one float check escapes with, once it meets a wrong row


@dataclass(frozen=True)
class Policy:
    """`rows` opened of each tensor (None: all), `challenges` random vectors, `entries` spot-checked, in a
    product whose honest result is refused with probability at most 2^-`delta_bits`."""

    name: str
    rows: int | None
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


POLICIES = {entry.name: entry for entry in (Policy("spot", 4), Policy("standard", 16), Policy("full", None))}


def policy(name: str) -> Policy:
    try:
        return POLICIES[name]
    except KeyError:
        raise Malformed(f"policy {name!r} is not one of {', '.join(POLICIES)}") from None
