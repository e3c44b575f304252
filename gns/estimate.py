"""From the sums of many steps to a value, a confidence set, a status and a detection limit. Pure functions.

Averages first, ratio last: X = Σ wₖ tr Σₖ, Y = Σ vₖ |G|²ₖ, B_simple = X / Y, with wₖ ∝ nₖ − 1 and
vₖ ∝ nₖ(nₖ − 1). The set is the hull of Fieller's and of its version with Hall's skewness correction.
A negative average of |G|² is legal; nothing is clamped. Unit of every B: examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from gns.sets import MIN_STEPS, Moments, confidence_set, detection_limit, honest_set, status_of
from gns.sums import StepSums

if TYPE_CHECKING:
    from gns.curvature.watching import CurvatureReading

__all__ = [
    "LOCAL",
    "MIN_STEPS",
    "STATUSES",
    "Estimate",
    "Moments",
    "confidence_set",
    "estimate",
    "format_count",
]

STATUSES = ("measured", "lower bound", "not detectable", "collecting")
LOCAL = "local statistics"


@dataclass(frozen=True)
class Estimate:
    """A noise scale with its confidence set, and what to believe of it.

    Args:
        b_simple: X / Y in examples; NaN where Y ≤ 0.
        low: lower end of the confidence set, in examples; where Y < 0, no more than Y := 0 would give.
        high: upper end; `inf` where the data set no upper bound.
        level: nominal coverage of [low, high].
        status: "measured" (bounded set), "lower bound" (|G|² not distinguishable from 0), "not
            detectable" (|G|² averages so far below 0 that no positive B fits),
            "collecting" (fewer than `MIN_STEPS` usable steps: the set is not yet trustworthy).
        trace_sigma: X, in (loss / parameter)².
        grad_sq_norm: Y, in (loss / parameter)²; may be negative.
        detection_limit: largest B that these steps could tell from infinity, X / (t · se(Y)), in examples.
        n_steps: usable steps in the averages.
        n_examples: examples in them.
        unit: what one "example" is, with its mean tokens where known.
        groups: the same for each parameter group, "A" and "B" for LoRA.
        n_skipped: steps left out because they carry a `reason`.
        loss_scaled: tr Σ and |G|² still carry an unknown loss scale; B_simple does not.
        steps: first and last step number in the averages, or None.
        history: the steps themselves, where the estimate was loaded from a run.
        curvature: the readings of B_noise, where the estimate was loaded from a run.
        coverage: share of the trainable parameters that is in the sums, or None where unknown.
    """

    b_simple: float
    low: float
    high: float
    level: float
    status: str
    trace_sigma: float
    grad_sq_norm: float
    detection_limit: float
    n_steps: int
    n_examples: int
    unit: str = "examples"
    groups: dict[str, Estimate] = field(default_factory=dict)
    n_skipped: int = 0
    loss_scaled: bool = False
    steps: tuple[int, int] | None = None
    history: tuple[StepSums, ...] = field(default=(), repr=False, compare=False)
    coverage: float | None = None
    curvature: tuple[CurvatureReading, ...] = field(default=(), repr=False, compare=False)

    @property
    def examples_per_step(self) -> float:
        """Mean number of examples in a step; NaN without steps."""
        return self.n_examples / self.n_steps if self.n_steps else math.nan

    @property
    def target(self) -> str:
        """What the number estimates: which average over which steps."""
        over = f"steps {self.steps[0]}–{self.steps[1]}" if self.steps else "no steps"
        return f"ratio of averages over {over}; population gradient as long as no example was seen twice"

    def __str__(self) -> str:
        size = f"{self.n_steps} steps × {format_count(self.examples_per_step)}"
        if LOCAL in self.unit:
            size += f" on each rank alone ({LOCAL})"
        percent = f"{100 * self.level:g} %"
        if self.n_steps < 2:
            return f"B_simple: collecting, {self.n_steps} usable step(s) so far ({self.n_skipped} left out)"
        if self.status in ("lower bound", "not detectable"):
            bound = f"B_simple ≥ {format_count(self.low)} examples ({percent})"
            limit = f"detection limit {format_count(self.detection_limit)}, {size}"
            return f"{bound}; |G|² not distinguishable from 0 ({limit}); {self.status}"
        value = (
            "B_simple not resolved"
            if math.isnan(self.b_simple)
            else f"B_simple = {format_count(self.b_simple)} examples"
        )
        bounds = f"{format_count(self.low)} … {format_count(self.high)}"
        return f"{value} ({percent}: {bounds}), {size}; {self.status}"


def format_count(x: float) -> str:
    """Write a number of examples with the digits a reader can use: 0.052, 3.4, 212, 15,300, ∞."""
    if math.isnan(x):
        return "?"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    if abs(x) >= 1000:
        return f"{float(f'{x:.3g}'):,.0f}"
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.2g}" if abs(x) < 10 else f"{x:.3g}"


def estimate(steps: Iterable[StepSums], *, level: float = 0.95) -> Estimate:
    """Estimate B_simple = tr Σ / |G|² from the sums of many steps.

    Args:
        steps: records of steps; those that carry a `reason` are left out and counted.
        level: nominal coverage of the confidence set.

    Returns:
        The estimate; with fewer than two usable steps all its figures are NaN and its status "collecting".

    Raises:
        ValueError: `level` is outside (0, 1).
        TypeError: `steps` holds something else than `StepSums`.

    Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A, for the averages.
    """
    steps = list(steps)
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; a coverage in (0, 1) is needed, e.g. 0.95")
    foreign = {type(s).__name__ for s in steps if not isinstance(s, StepSums)}
    if foreign:
        raise TypeError(
            f"steps holds {', '.join(sorted(foreign))}; StepSums are needed, e.g. monitor.history"
        )
    usable = [s for s in steps if s.usable]
    joint = _estimate(usable, level)
    of_step = [s.groups for s in usable]
    names = of_step[0] if of_step else ()
    by_name = {name: [groups[name] for groups in of_step if name in groups] for name in names}
    groups = {name: _estimate(of_group, level) for name, of_group in by_name.items()}
    return replace(joint, groups=groups, n_skipped=len(steps) - len(usable))


def _estimate(steps: list[StepSums], level: float) -> Estimate:
    n = np.array([s.n_examples for s in steps], dtype=np.float64)
    about = {
        "level": level,
        "n_steps": len(steps),
        "n_examples": int(n.sum()),
        "unit": _unit(steps),
        "loss_scaled": any(s.loss_scaled for s in steps),
        "steps": (steps[0].step, steps[-1].step) if steps else None,
    }
    nan = math.nan
    if len(steps) < 2:
        x, y = (steps[0].trace_sigma, steps[0].grad_sq_norm) if steps else (nan, nan)
        return Estimate(
            nan,
            nan,
            math.inf,
            status="collecting",
            trace_sigma=x,
            grad_sq_norm=y,
            detection_limit=nan,
            **about,
        )
    x = np.array([s.trace_sigma for s in steps])
    y = np.array([s.grad_sq_norm for s in steps])
    unit = 2.0 ** -np.ceil(np.log2(np.abs(np.concatenate([x, y])).max() or 1.0))  # exact: cubes stay in range
    moments = Moments.of(x * unit, y * unit, n - 1, n * (n - 1))
    low, high, empty = honest_set(moments, level)
    return Estimate(
        b_simple=moments.x / moments.y if moments.y > 0 else nan,
        low=low,
        high=high,
        status=status_of(moments, high, empty),
        trace_sigma=float(moments.x / unit),
        grad_sq_norm=float(moments.y / unit),
        detection_limit=detection_limit(moments, level),
        **about,
    )


def _unit(steps: list[StepSums]) -> str:
    """Say what one example is, "examples (mean 187 tokens)", and whether steps are real ones."""
    if any(s.local for s in steps):
        return f"{_counted(steps)}, {LOCAL}: `.grad` is hidden, so each rank's own batch stands for a step"
    return _counted(steps)


def _counted(steps: list[StepSums]) -> str:
    """Say what one example is."""
    if any(not s.call_seen for s in steps):
        return "rows of the layers' input (the model's own call was not seen: equal weights assumed)"
    counted = [(s.n_tokens, s.n_examples) for s in steps if s.n_tokens is not None]
    if not counted or len(counted) < len(steps):
        return "examples"
    tokens, examples = (sum(column) for column in zip(*counted, strict=True))
    return f"examples (mean {tokens / examples:.0f} tokens)"
