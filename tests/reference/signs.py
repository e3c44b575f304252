"""Slow twin of the noise scale of sign-like optimizers: coordinate by coordinate. Imports nothing of gns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def sign_scale(gradients: Sequence[Sequence[float]], n: int) -> tuple[float, float, float]:
    """((Σσ)², (s·G)², ‖ḡ‖₁) of batch gradients, the first half for the signs s."""
    half = len(gradients) // 2
    first, second = gradients[:half], gradients[half:]
    d = len(gradients[0])
    signs = [(t > 0) - (t < 0) for t in (sum(g[j] for g in first) for j in range(d))]
    sigma = sum(math.sqrt(n) * statistics.stdev([g[j] for g in second]) for j in range(d))
    along = [sum(s * v for s, v in zip(signs, g, strict=True)) for g in second]
    pairs = [a * b for i, a in enumerate(along) for j, b in enumerate(along) if i != j]
    l1 = sum(abs(statistics.fmean([g[j] for g in second])) for j in range(d))
    return sigma**2, statistics.fmean(pairs), l1
