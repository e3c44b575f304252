"""Right answers that a rule for the batch size gives away: exact matches, paired item by item."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from experiments.analysis.cells import Floats
from experiments.analysis.curves import Curve, Estimated
from experiments.analysis.resampling import LEVEL


def answers_lost(found: Sequence[Curve], chosen: Sequence[float], level: float = LEVEL) -> Estimated:
    """Price a rule: share of right answers at the batch best on validation loss less that at its choice.

    Both at the learning rate that is best on validation loss. A choice between two batch sizes is read off a
    line in log₂ B, one beyond the grid at its edge. The best batch and the choice are taken as they are.

    Args:
        found: [K], a curve for each configuration.
        chosen: [K], batch sizes that the rule gives.
        level: of the interval.

    Returns:
        Mean over the configurations that have answers, −1 … 1, with a note where some have none; NaN where
        none has. The interval is Student's, of configurations and items as crossed random effects: all
        answer the same items. What seeds do is in the spread of configurations.

    Raises:
        ValueError: there is not one choice for each configuration, or one is NaN.
    """
    if len(found) != len(chosen) or any(math.isnan(batch) for batch in chosen):
        raise ValueError(f"a rule needs a number for each configuration; seen {chosen} for {len(found)}")
    lost = [own for c, b in zip(found, chosen, strict=True) if (own := _lost(c, b)) is not None]
    if not lost:
        return Estimated(math.nan, -math.inf, math.inf)
    value = float(np.mean([np.nanmean(own) for own in lost]))
    variance, free = _variance(lost)
    half = math.sqrt(variance) * float(stats.t.ppf((1 + level) / 2, free)) if free else math.inf
    note = f"{len(lost)} of {len(found)} configurations" if len(lost) < len(found) else ""
    return Estimated(value, max(-1.0, value - half), min(1.0, value + half), note)


def _variance(lost: Sequence[Floats]) -> tuple[float, float]:
    """Give the variance of the mean of K means, and its degrees of freedom (Satterthwaite); 0: unknown.

    With x = μ + configuration + item + rest: s²(means of configurations)/K holds the configurations and the
    rest, s²(means of items)/I the items and the rest once more, which is taken out.
    """
    if len(lost) == 1:
        own = lost[0][~np.isnan(lost[0])]
        return (float(own.var(ddof=1)) / len(own), len(own) - 1.0) if len(own) > 1 else (math.inf, 0.0)
    n, asked = len(lost), min(map(len, lost))
    shared = ~np.isnan(np.array([own[:asked] for own in lost])).any(axis=0)
    parts = [(float(np.var([np.nanmean(own) for own in lost], ddof=1)) / n, n - 1.0)]
    if (n_items := int(shared.sum())) > 1:
        x = np.array([own[:asked][shared] for own in lost])
        rest = x - x.mean(axis=1, keepdims=True) - x.mean(axis=0) + x.mean()
        each = (rest**2).sum() / ((n - 1) * (n_items - 1)) / n
        parts.append((max(0.0, float(x.mean(axis=0).var(ddof=1) - each) / n_items), n_items - 1.0))
    total = sum(part for part, _ in parts)
    return total, total**2 / sum(part**2 / free for part, free in parts) if total else n - 1.0


def _lost(found: Curve, batch: float) -> Floats | None:
    """[I], right answers at the best batch less those at another, means over seeds; None without any.

    NaN: an item that a seed was not asked in one of the runs.
    """
    right = np.array([found.cell.right[found.place(b)].mean(axis=-1) for b in found.batches])  # [J, I]
    (low,), (high,), (share,) = found.between(np.array([batch]))
    between = right[low] if not share else right[low] + share * (right[high] - right[low])
    lost = right[int(found.validation.argmin())] - between
    return None if np.isnan(lost).all() else lost
