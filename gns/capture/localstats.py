"""Local statistics: where an engine hides `.grad`, each rank's own batch is taken as an optimizer step.

ZeRO and its like move gradients into buffers of their own inside backward, so ‖ḡ‖² of the real step cannot
be read. The taps still give Σcᵢ of the examples on this rank, and (m, q) of that smaller batch are as
unbiased as those of the real step: only noisier, and with fewer examples in each. Over ranks the two
unbiased estimates are averaged as `gns/estimate.py` does over steps: |G|² with weights n(n − 1), tr Σ with
weights n − 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gns.capture.readings import Readings


@dataclass(frozen=True)
class Parts:
    """What one rank's batch adds to the averages; all fields add over ranks.

    Args:
        pairs: n (n − 1), the weight of |G|².
        free: n − 1, the weight of tr Σ.
        grad: [P], n (n − 1) |G|² of each parameter.
        trace: [P], (n − 1) tr Σ of each parameter.
    """

    pairs: float
    free: float
    grad: np.ndarray
    trace: np.ndarray


def parts(r: Readings) -> Parts:
    """Take one rank's readings as a step: |G|² = (q − m/n) / (1 − Σaᵢ²), tr Σ = n (q − |G|²), m = n s."""
    _, w, ww = r.totals
    squares = ww / w**2 if w > 0 else 1 / max(r.n, 1)  # NaN is not > 0: equal weights
    if r.n < 2 or not squares < 1:
        return Parts(0.0, 0.0, np.zeros_like(r.q), np.zeros_like(r.q))
    with np.errstate(over="ignore", invalid="ignore"):
        grad = (r.q - r.s) / (1 - squares)
        trace = r.n * (r.q - grad)
    pairs, free = r.n * (r.n - 1), r.n - 1
    return Parts(pairs, free, pairs * grad, free * trace)


def step(total: Parts) -> tuple[int, np.ndarray, np.ndarray]:
    """Give the one step of equal weights that has the averages of all ranks as its own estimates.

    Its n is the ranks' n, where they are equal; s = (|G|² + tr Σ)/n and q = |G|² + tr Σ/n give back both.

    Returns:
        n, s [P] and q [P]; n = 0 where no rank had two examples.
    """
    if not total.free:
        return 0, np.zeros_like(total.grad), np.zeros_like(total.grad)
    n, grad, trace = round(total.pairs / total.free), total.grad / total.pairs, total.trace / total.free
    return n, (grad + trace) / n, grad + trace / n


def rounded(rows: np.ndarray, n: float, per_step: int) -> np.ndarray:
    """Scale rows over all ranks to those of one step, so that n of them are exactly `per_step`."""
    return np.round(rows * (per_step / n if n else 0.0), 6)


def scaled_tokens(tokens: float, n: float, per_step: int) -> float:
    """Tokens of one step; NaN where unknown."""
    return tokens * per_step / n if n else math.nan
