"""How a token is chosen from its row of logits: greedy, or sampled by the Gumbel-max rule (Gumbel 1954).

Position j of an answer draws one uniform u_i per token from the BLAKE3 XOF over (seed, j), as everything is drawn
here: a counter gives any position's numbers without those before it, and a worker cannot choose them. The token is
argmax_i l_i / T - ln(-ln u_i), which has the distribution softmax(l / T), after top-k and top-p cut the row. Among
equal logits the lower index comes first. Temperature 0 is greedy: the first of the largest logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from proof.errors import Malformed
from proof.sampling import gumbels

Array = npt.NDArray[np.float64]

TIE = 1e-4  # scores this close may change places in a sampler that computes them in fp32
CUT = 1e-5  # likewise of the probability mass before a token, where top-p cuts


@dataclass(frozen=True)
class Settings:
    """What a task asks of the sampler. `top_k` 0 and `top_p` 1 cut nothing."""

    temperature: float
    top_k: int
    top_p: float
    seed: bytes
    max_tokens: int

    @classmethod
    def of(cls, inputs: Mapping[str, npt.NDArray[Any]]) -> Self:
        """From graph inputs `temperature`, `top_k`, `top_p`, `seed` and `max_tokens`.

        Raises Malformed for a value that has no meaning.
        """
        temperature, top_k, top_p, max_tokens = (
            inputs[name].reshape(-1)[0].item() for name in ("temperature", "top_k", "top_p", "max_tokens")
        )
        if not 0 <= temperature < np.inf or top_k < 0 or not 0 < top_p <= 1 or max_tokens < 1:
            raise Malformed(
                f"temperature {temperature}, top_k {top_k}, top_p {top_p} and max_tokens {max_tokens}: need a finite "
                "temperature from 0, top_k from 0, top_p in (0, 1] and max_tokens from 1"
            )
        return cls(temperature, top_k, top_p, inputs["seed"].astype(np.uint8).tobytes(), max_tokens)


def choose(logits: npt.NDArray[Any], settings: Settings, position: int) -> int:
    """The token that the rule gives at a position of the answer, from its row of logits (V,)."""
    return int(np.argmax(scores(logits, settings, position)[0]))


def admitted(logits: npt.NDArray[Any], settings: Settings, position: int) -> npt.NDArray[np.int64]:
    """The tokens that an honest sampler may choose there: the rule's, and those that tie with it."""
    exact, loose = scores(logits, settings, position)
    best = exact.max()
    return np.flatnonzero(loose >= best - (TIE if settings.temperature else 0.0))


def scores(logits: npt.NDArray[Any], settings: Settings, position: int) -> tuple[Array, Array]:
    """What the rule takes the largest of, -inf where a token is cut; and the same where the cut is in doubt.

    Raises Malformed for a row with NaN or infinity in it.
    """
    row = logits.astype(np.float64)
    if not np.isfinite(row).all():
        raise Malformed("NaN or infinity among the logits")
    if not settings.temperature:
        return row, row
    scaled, label = row / settings.temperature, f"token/{position}"
    if not settings.top_k and settings.top_p == 1:
        noisy = scaled + gumbels(settings.seed, label, len(row))
        return noisy, noisy
    order = _largest(row, settings.top_k or len(row))
    noisy = scaled[order] + gumbels(settings.seed, label, len(row), order)
    weights = np.exp(scaled[order] - scaled[order[0]])
    before = (np.cumsum(weights) - weights) / weights.sum()
    exact, loose = (np.full(len(row), -np.inf) for _ in range(2))
    for kept, slack in ((exact, 0.0), (loose, CUT)):
        taken = before < settings.top_p + slack if settings.top_p < 1 else slice(None)
        kept[order[taken]] = noisy[taken]
    return exact, loose


def _largest(row: Array, count: int) -> npt.NDArray[np.int64]:
    """The `count` largest, largest first, the lower index first among equals."""
    candidates = np.arange(len(row))
    if count < len(row):
        candidates = np.flatnonzero(row >= np.partition(row, -count)[-count])
    return candidates[np.argsort(-row[candidates], kind="stable")[:count]]
