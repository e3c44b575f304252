"""The trade-off law of steps against examples, and the laws that carry a learning rate to another batch.

Trade-off law: (S/S_min − 1)(E/E_min − 1) = 1 with S optimizer steps and E examples to reach one loss, so

    E/E_min = 1 + B/B_crit        S/S_min = 1 + B_crit/B

Source: McCandlish et al. 2018, arXiv:1812.06162, eq. (2.11), for the law.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def examples_ratio(batch: float, b_crit: float) -> float:
    """E/E_min = 1 + B/B_crit: examples to reach a loss, relative to the fewest possible."""
    return 1 + (batch / b_crit if b_crit else math.inf)


def steps_ratio(batch: float, b_crit: float) -> float:
    """S/S_min = 1 + B_crit/B: optimizer steps to reach a loss, relative to the fewest possible."""
    return 1 + b_crit / batch


def extra_cost(batch: float, b_crit: float) -> float:
    """Cost above the cheapest, 0 = cheapest, where S_min steps and E_min examples cost the same.

    (S/S_min + E/E_min)/4 − 1, least at B = B_crit.
    """
    return (steps_ratio(batch, b_crit) + examples_ratio(batch, b_crit)) / 4 - 1


def sgd(batch: float, reference: float, noise_scale: float) -> float:
    """ε(B)/ε(B₀) = (1 + B_noise/B₀)/(1 + B_noise/B): linear far below B_noise, flat far above.

    Source: McCandlish et al. 2018, arXiv:1812.06162, eq. (2.7).
    """
    if math.isinf(noise_scale):
        return batch / reference
    return (1 + noise_scale / reference) / (1 + noise_scale / batch)


def adam_square_root(batch: float, reference: float, noise_scale: float) -> float:
    """ε(B)/ε(B₀) = √(B/B₀), whatever the noise scale."""
    return math.sqrt(batch / reference)


def adam_surge(batch: float, reference: float, noise_scale: float) -> float:
    """ε(B) = 2ε_max/(√(B_n/B) + √(B/B_n)): like √B below B_n, falling above it.

    Source: Li et al. 2024, arXiv:2405.14578; its B_n is fitted from steps and examples, not measured so.
    """
    rise = math.sqrt(batch / reference)
    return rise if math.isinf(noise_scale) else rise * (noise_scale + reference) / (noise_scale + batch)


LAWS: dict[str, Callable[[float, float, float], float]] = {
    "SGD law": sgd,
    "Adam square-root law": adam_square_root,
    "Adam surge law": adam_surge,
}


def band(values: list[float]) -> tuple[float, float]:
    """Lower and upper end of some values."""
    return min(values), max(values)
