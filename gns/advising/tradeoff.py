"""The trade-off law of steps against examples, and the laws that carry a learning rate to another batch.

Trade-off law: (S/S_min − 1)(E/E_min − 1) = 1 with S optimizer steps and E examples to reach one loss, so

    E/E_min = 1 + B/B_crit        S/S_min = 1 + B_crit/B

Source: McCandlish et al. 2018, arXiv:1812.06162, eq. (2.11), for the law.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


def positive(name: str, value: Any, *, whole: bool = False) -> None:
    """Require a finite positive number.

    Raises:
        ValueError: it is none.
    """
    value = value.item() if isinstance(value, np.generic) else value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # compared, as math.isfinite raises on a whole number beyond all floats
    if not number or not 0 < value <= sys.float_info.max or (whole and value != int(value)):
        kind = "a whole number, 1 or more," if whole else "a finite number > 0"
        raise ValueError(f"{name} is {value!r}; {kind} is needed")


def examples_ratio(batch: float, b_crit: float) -> float:
    """E/E_min = 1 + B/B_crit: examples to reach a loss, relative to the fewest possible."""
    return 1 + (batch / b_crit if b_crit else math.inf)


def steps_ratio(batch: float, b_crit: float) -> float:
    """S/S_min = 1 + B_crit/B: optimizer steps to reach a loss, relative to the fewest possible."""
    return 1 + b_crit / batch


@dataclass(frozen=True)
class Price:
    """What time costs against examples; the cost of a run is c_S·S + c_E·E.

    Give one of the two. In either unit the cheapest batch has a closed form, and those that cost at most a
    share w more are an interval between two roots of a quadratic:

        time:  B* = √p·B_crit           B + p·B_crit²/B ≤ (2√p + w(1 + √p)²)·B_crit
        step:  B* = √(ρ·B_crit)         B + ρ·B_crit/B ≤ 2√(ρ·B_crit) + w(√B_crit + √ρ)²

    Args:
        time: p = c_S·S_min / (c_E·E_min): what the fewest possible steps cost, relative to what the fewest
            possible examples cost. 1: time and examples matter equally; 3: time matters more.
        step: ρ = c_S / c_E: what the time of one optimizer step costs, in examples (one step is worth as much
            as ρ examples). It is p = ρ/B_crit. A step whose seconds are t₀ + B/v has ρ = t₀·v examples.

    Raises:
        ValueError: not exactly one is given, or it is no finite number > 0.
    """

    time: float | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        if (self.time is None) == (self.step is None):
            raise ValueError(
                f"time_price is {self.time} and step_price is {self.step}; exactly one of the two is needed"
            )
        name, value = ("time_price", self.time) if self.time is not None else ("step_price", self.step)
        positive(name, value)

    def best(self, b_crit: float) -> float:
        """Batch of the least cost, in examples."""
        if self.step is not None:
            return math.sqrt(self.step * b_crit)
        return math.sqrt(self.time or 0) * b_crit

    def extra_cost(self, batch: float, b_crit: float) -> float:
        """Cost of a batch above the cheapest, 0 = cheapest; `inf` where it has no bound."""
        if self.step is None:
            p = self.time or 0
            cost = p * steps_ratio(batch, b_crit) + examples_ratio(batch, b_crit)
            return cost / (1 + math.sqrt(p)) ** 2 - 1
        if math.isinf(b_crit):
            return self.step / batch
        off = (batch - self.best(b_crit)) / (math.sqrt(b_crit) + math.sqrt(self.step))
        return off**2 / batch

    def near(self, b_crit: float, waste: float) -> tuple[float, float]:
        """Batches that cost at most `waste` more than the cheapest, as an interval; rises with B_crit."""
        if math.isinf(b_crit):
            return (math.inf if self.step is None else self.step / waste), math.inf
        best = self.best(b_crit)
        more = (b_crit + best) ** 2 / b_crit if b_crit else self.step or 0.0
        wide = waste * more
        high = best + (wide + math.sqrt(wide * (wide + 4 * best))) / 2
        return (best * (best / high) if high else 0.0), high


EQUAL = Price(time=1.0)


def extra_cost(batch: float, b_crit: float) -> float:
    """Cost above the cheapest, 0 = cheapest, where S_min steps and E_min examples cost the same.

    (S/S_min + E/E_min)/4 − 1, least at B = B_crit.
    """
    return EQUAL.extra_cost(batch, b_crit)


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
