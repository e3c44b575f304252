"""The primary analysis: does a predictor follow the measured batch size, within a factor of two?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from experiments.analysis.agreement import calibration, spearman
from experiments.analysis.curves import Estimated
from experiments.analysis.resampling import LEVEL

WANTED = 0.8  # share of configurations within a factor of two at which a predictor predicts


@dataclass(frozen=True)
class Judged:
    """A predictor beside a measured batch size, over configurations.

    Args:
        predictor: in words.
        correlation: Spearman's; NaN where the predictor is one number.
        constant: c in measured = c · predicted, fitted to all.
        share: of the configurations within a factor of two of c · predicted, c fitted to the others.
        pairs: configurations with two finite numbers.
        of: configurations.
    """

    predictor: str
    correlation: Estimated
    constant: Estimated
    share: Estimated
    pairs: int
    of: int

    @property
    def verdict(self) -> str:
        """Say "predicts", "does not" or "undecided", by the rule of PREREGISTRATION.md."""
        if math.isnan(self.share.value):
            return "undecided"
        if self.share.high < WANTED:
            return "does not"
        follows = self.correlation.low > 0
        return "predicts" if self.share.value >= WANTED and follows else "undecided"

    @property
    def needed(self) -> float:
        """Configurations at which the rule would decide, were share and correlation to stay as they are.

        By the normal interval of a share, and by Fisher's z with the spread of Bonett and Wright (2000) of a
        rank correlation; infinite where no number would decide, NaN without a share.
        """
        share, z = self.share.value, stats.norm.ppf((1 + LEVEL) / 2)
        if math.isnan(share):
            return math.nan
        if share < WANTED:
            return max(self.pairs, math.ceil(z**2 * share * (1 - share) / (WANTED - share) ** 2))
        r = self.correlation.value
        if not r > 0:
            return math.inf
        return max(self.pairs, 3 + math.ceil(z**2 * (1 + r**2 / 2) / math.atanh(min(r, 0.999)) ** 2))


def judge(
    predictor: str,
    predicted: Sequence[Estimated],
    measured: Sequence[Estimated],
    groups: Sequence[str] | None = None,
) -> Judged:
    """Set a predictor beside what was measured.

    Args:
        predictor: in words.
        predicted: [K].
        measured: [K].
        groups: [K]; pairs of one group are left out and resampled together. None: each is its own.
    """
    pairs = [
        (p, m, g)
        for p, m, g in zip(
            predicted, measured, groups or [str(i) for i in range(len(predicted))], strict=True
        )
        if 0 < p.value < math.inf and 0 < m.value < math.inf
    ]
    nothing = Estimated(math.nan, -math.inf, math.inf)
    if len({g for *_, g in pairs}) < 3:
        return Judged(predictor, nothing, nothing, nothing, len(pairs), len(predicted))
    x, y, kept = ([pair[i] for pair in pairs] for i in range(3))
    constant, share = calibration(x, y, groups=kept)
    correlation = nothing
    if len(set(kept)) >= 4 and len({each.value for each in x}) > 1:
        correlation = spearman(x, y, groups=kept)
    return Judged(predictor, correlation, constant, share, len(pairs), len(predicted))
