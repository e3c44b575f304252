"""The primary analysis: does a predictor follow the measured batch size, within a factor of two?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from experiments.analysis.agreement import calibration, spearman
from experiments.analysis.curves import Estimated
from experiments.analysis.resampling import LEVEL, interval

NOTHING = Estimated(math.nan, -math.inf, math.inf)
_Z = stats.norm.ppf((1 + LEVEL) / 2)
WANTED = 0.8  # share of configurations within a factor of two at which a predictor predicts


@dataclass(frozen=True)
class Judged:
    """A predictor beside a measured batch size, over configurations.

    Args:
        predictor: in words.
        correlation: Spearman's, of pairs that are no bounds; NaN where the predictor is one number.
        constant: c in measured = c · predicted, fitted to all.
        share: of the pairs within a factor of two of c · predicted, c fitted to the other configurations.
        off: factor by which that is off, the geometric mean.
        ceiling: the share that a predictor without error would show at these uncertainties; NaN: not known.
        pairs: with two finite numbers that are no bounds.
        bounds: pairs whose measured number is a lower bound.
        of: all pairs.
    """

    predictor: str
    correlation: Estimated
    constant: Estimated
    share: Estimated
    off: Estimated
    ceiling: float
    pairs: int
    bounds: int
    of: int

    @property
    def verdict(self) -> str:
        """Say "predicts", "does not" or "undecided", by the rule of PREREGISTRATION.md.

        A predictor without error would miss as often as the ceiling says, and is not told from one that does
        not predict by a share that is no lower.
        """
        if math.isnan(self.share.value):
            return "undecided"
        if self.share.high < self._bar:
            return "does not"
        follows = self.correlation.low > 0
        return "predicts" if self.share.value >= WANTED and follows else "undecided"

    @property
    def needed(self) -> Estimated:
        """Configurations at which the rule would decide in half of the cases, were all to stay as it is.

        By the normal interval of a share, and by Fisher's z with the spread of Bonett and Wright (2000) of a
        rank correlation; infinite where no number would decide, NaN without a share. The interval is that
        over the interval of what decides: often from a few to no number.
        """
        if math.isnan(self.share.value):
            return NOTHING
        if self.share.value < WANTED:
            of = [self._by_share(share) for share in (self.share.value, self.share.low, self.share.high)]
        else:
            r = self.correlation
            of = [self._by_correlation(each) for each in (r.value, r.high, r.low)]
        return Estimated(of[0], of[1], of[2])

    def _by_share(self, share: float) -> float:
        """Configurations at which the normal interval of a share lies below what it is judged by."""
        if share >= self._bar:
            return math.inf
        return max(self.pairs, math.ceil(_Z**2 * share * (1 - share) / (self._bar - share) ** 2))

    @property
    def _bar(self) -> float:
        """What the interval of the share must lie below: what is wanted, and what error alone would give."""
        return WANTED if math.isnan(self.ceiling) else min(WANTED, self.ceiling)

    def _by_correlation(self, r: float) -> float:
        """Configurations at which the interval of a rank correlation lies above 0."""
        if not r > 0:
            return math.inf
        r = min(r, 0.999)
        return max(self.pairs, 3 + math.ceil(_Z**2 * (1 + r**2 / 2) / math.atanh(r) ** 2))


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
        measured: [K]; of lower bounds only the share speaks, at its worst and at its best.
        groups: [K]; pairs of one group are left out and resampled together. None: each is its own.
    """
    names = list(groups or [str(i) for i in range(len(predicted))])
    both = zip(predicted, measured, names, strict=True)
    pairs = [(p, m, g) for p, m, g in both if 0 < p.value < math.inf and 0 < m.value < math.inf]
    exact = [(p, m, g) for p, m, g in pairs if not m.at_least]
    if len({g for *_, g in exact}) < 3:
        of = len(exact), len(pairs) - len(exact), len(predicted)
        return Judged(predictor, NOTHING, NOTHING, NOTHING, NOTHING, math.nan, *of)
    found = calibration([p for p, *_ in pairs], [m for _, m, _ in pairs], groups=[g for *_, g in pairs])
    x, y, kept = ([pair[i] for pair in exact] for i in range(3))
    correlation = NOTHING
    if len(set(kept)) >= 4 and len({each.value for each in x}) > 1:
        correlation = spearman(x, y, groups=kept)
    return Judged(
        predictor,
        correlation,
        found.constant,
        found.share,
        found.off,
        found.ceiling,
        found.exact,
        found.bounds,
        len(predicted),
    )


def gain(
    predicted: Sequence[Estimated],
    rival: Sequence[Estimated],
    measured: Sequence[Estimated],
    groups: Sequence[str] | None = None,
) -> Estimated:
    """Say by which factor a predictor is off where a rival is off by one, in the same configurations.

    Both are calibrated by one constant, fitted to the other configurations; below 1 the predictor is nearer.

    Args:
        predicted: [K].
        rival: [K].
        measured: [K]; pairs with a bound or without a finite number are left out.
        groups: as of `judge`.

    Returns:
        The ratio of the two geometric means, with a bootstrap interval over configurations.
    """
    names = list(groups or [str(i) for i in range(len(predicted))])
    every = list(zip(predicted, rival, measured, names, strict=True))
    kept = [each for each in every if all(0 < e.value < math.inf for e in each[:3]) and not each[2].at_least]
    if len({g for *_, g in kept}) < 3:
        return NOTHING
    (one, other) = (
        calibration([each[i] for each in kept], [each[2] for each in kept], groups=[each[3] for each in kept])
        for i in (0, 1)
    )
    draws = one.off.draws / other.off.draws  # of the same resampled configurations
    return Estimated(one.off.value / other.off.value, *interval(draws), "", draws)
