"""What one epoch of a given size can afford: the trade-off law with the examples held fixed. Pure.

One epoch fixes the examples, E = N. Put into the trade-off law for a fixed target loss this gives the largest
batch that still reaches it, B_max(N) = (N − E_min)/S_min = B_crit (N/E_min − 1). A gradient noise scale says
nothing about E_min. But whoever once reached the target, with E examples at batch B₀, knows
E = E_min (1 + B₀/B_crit), and then

    B_max(N) = B_crit (N/E − 1) + B₀·N/E

which is B₀ at N = E, and the law above as B₀ → 0. Without a target, what can be said is how much of the epoch
a batch uses: it gets as far as N/(1 + B/B_crit) examples would in small batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gns.advising.tradeoff import band, examples_ratio

ASSUMPTIONS = (
    "every batch size has its own best learning rate and schedule",
    "the noise scale holds over the whole epoch, and B_simple stands in for the critical batch size",
    "no example is seen twice, and one target loss is meant throughout (not the best loss at each data size)",
)


@dataclass(frozen=True)
class EpochRow:
    """One batch size in one epoch.

    Args:
        batch_size: B, examples a step.
        steps: optimizer steps in the epoch, N/B rounded up.
        useful: 1/(1 + B/B_crit) as a band: share of the epoch's examples that small batches would have needed
            to get as far. The rest is averaged away inside large batches.
    """

    batch_size: int
    steps: int
    useful: tuple[float, float]


@dataclass(frozen=True)
class EpochPlan:
    """One epoch of N examples.

    Args:
        dataset_size: N.
        batch_size: B₀ in use, examples a step.
        rows: at powers of two.
        examples_needed: E, examples that the target took at B₀, or None where unknown.
        largest: B_max(N) as a band over the interval, examples a step; `inf` where no upper end is known;
            zero or less where N examples do not reach the target at any batch. None without E.
        largest_doubled: the same for twice the data.
        assumptions: of the plan.
    """

    dataset_size: int
    batch_size: int
    rows: tuple[EpochRow, ...]
    examples_needed: float | None = None
    largest: tuple[float, float] | None = None
    largest_doubled: tuple[float, float] | None = None
    assumptions: tuple[str, ...] = ASSUMPTIONS


def largest_batch(n: float, needed: float, reference: float, b_crit: float) -> float:
    """Largest batch with which `n` examples reach a target that took `needed` at batch `reference`.

    B_max = B_crit (N/E − 1) + B₀·N/E. Zero or less: no batch does.

    Args:
        n: N, examples to spend.
        needed: E, examples it took.
        reference: B₀, the batch it took them at.
        b_crit: critical batch size, examples; may be `inf`.

    Source: the trade-off law, McCandlish et al. 2018, arXiv:1812.06162, eq. (2.11), at E = N.
    """
    if math.isinf(b_crit):
        return reference if n == needed else math.copysign(math.inf, n - needed)
    return b_crit * (n / needed - 1) + reference * n / needed


def epoch_plan(
    dataset_size: int,
    batch_size: int,
    ends: tuple[float, float],
    batches: Iterable[int],
    examples_needed: float | None = None,
) -> EpochPlan:
    """Plan one epoch.

    Args:
        dataset_size: N, examples.
        batch_size: B₀ in use, examples a step.
        ends: interval of the noise scale, examples.
        batches: batch sizes of the rows.
        examples_needed: examples that the target took at `batch_size`, or None.

    Returns:
        The plan.
    """
    rows = tuple(
        EpochRow(b, math.ceil(dataset_size / b), band([1 / examples_ratio(b, end) for end in ends]))
        for b in batches
    )
    if examples_needed is None:
        return EpochPlan(dataset_size, batch_size, rows)
    once, twice = (
        band([largest_batch(n, examples_needed, batch_size, end) for end in ends])
        for n in (dataset_size, 2 * dataset_size)
    )
    return EpochPlan(dataset_size, batch_size, rows, examples_needed, once, twice)
