"""When a simulation agrees with a formula: one false-alarm rate for the whole suite, and what it can see.

Every comparison of a simulated mean with an exact value uses z = (mean - truth)/se and one bound. The bound
comes from a family-wise false-alarm rate shared equally by a fixed number of comparisons, so that adding
tests cannot quietly make the suite cry wolf, and it is not chosen per test. The price of the bound is
stated too: the smallest bias a test would still catch.
"""

from dataclasses import dataclass

from scipy import stats

from theory.domain import count, positive, probability

FAMILY_FALSE_ALARM = 1e-3
COMPARISONS = 500
POWER = 0.95


def alarm_level(family: float = FAMILY_FALSE_ALARM, comparisons: int = COMPARISONS) -> float:
    """False-alarm rate of one comparison: family/comparisons (Bonferroni, valid under any dependence).

    Args:
        family: probability that a correct suite raises any alarm, in (0, 1).
        comparisons: number of comparisons in the suite, >= 1.

    Returns:
        The rate of one; 2e-6 with the suite's own numbers.

    Raises:
        ValueError: if an argument is outside its domain.
    """
    return probability("family", family) / count("comparisons", comparisons)


def z_bound(family: float = FAMILY_FALSE_ALARM, comparisons: int = COMPARISONS) -> float:
    """Two-sided bound on |z|: 4.75 with the suite's own numbers. Arguments as in `alarm_level`."""
    return float(stats.norm.isf(alarm_level(family, comparisons) / 2))


@dataclass(frozen=True)
class Estimate:
    """A simulated mean.

    Attributes:
        value: the mean.
        se: its standard error.
        n: number of draws, fixed beforehand.
    """

    value: float
    se: float
    n: int

    def z(self, truth: float) -> float:
        """(mean - truth)/se."""
        return (self.value - truth) / positive("se", self.se)

    def agrees(self, truth: float) -> bool:
        """Whether |z| is within the suite's bound."""
        return abs(self.z(truth)) <= z_bound()

    def smallest_bias(self) -> float:
        """Bias caught with probability 0.95: (bound + 1.645) · se, in the units of the mean."""
        return (z_bound() + float(stats.norm.ppf(POWER))) * self.se


@dataclass(frozen=True)
class Comparison:
    """One row of the table that the test run prints.

    Attributes:
        name: what was compared.
        estimate: the simulation.
        truth: the exact value.
    """

    name: str
    estimate: Estimate
    truth: float

    def __str__(self) -> str:
        e = self.estimate
        share = e.smallest_bias() / abs(self.truth) if self.truth else float("nan")
        return (
            f"{self.name:<58.58} exact {self.truth:>12.6g}  simulated {e.value:>12.6g} ± {e.se:<9.2g}"
            f" z {e.z(self.truth):>+5.2f}  n {e.n:>8}  catches {100 * share:.2g} %"
        )
