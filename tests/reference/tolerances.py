"""One tolerance table per dtype, and the comparison that uses it."""

from __future__ import annotations

import numpy as np
import torch

# Relative, on squared norms, against one backward pass per example.
RTOL = {
    # 2⁻⁵³ ≈ 1e-16; sums of ≤ 10⁴ products, and the Gram form cancels a few digits more
    torch.float64: 1e-10,
    # 2⁻²⁴ ≈ 6e-8; the same sums in another order, squared once
    torch.float32: 1e-5,
    # 2⁻⁹ ≈ 2e-3; the twin's own gradient is rounded to bf16 once a parameter, inputs are shared
    torch.bfloat16: 2e-2,
}
# Relative to the largest entry, for values that are what a cancellation leaves.
ATOL = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}
EXACT = 1e-12  # float64 arithmetic on a handful of numbers, no sums to speak of


def array(values: object) -> np.ndarray:
    """Give anything numeric as a float64 array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def close(
    actual: object,
    expected: object,
    dtype: torch.dtype = torch.float64,
    *,
    rtol: float | None = None,
    what: str = "value",
) -> None:
    """Assert equality within the dtype's tolerance; a failure prints index, both values and their ratio."""
    a, e = array(actual), array(expected)
    assert a.shape == e.shape, f"{what}: shape {a.shape}, {e.shape} expected"
    if not a.size:
        return
    assert np.isfinite(a).all(), f"{what}: not finite: {a}"
    rtol = RTOL[dtype] if rtol is None else rtol
    allowed = rtol * np.abs(e) + min(ATOL[dtype], rtol) * np.abs(e).max()
    excess = np.abs(a - e) - allowed
    worst = np.unravel_index(int(excess.argmax()), a.shape)
    x, y = float(a[worst]), float(e[worst])
    ratio = x / y if y else float("nan")
    assert excess[worst] <= 0, (
        f"{what}[{', '.join(map(str, worst))}]: {x!r}, {y!r} expected, ratio {ratio!r}, rtol {rtol:g}"
    )
