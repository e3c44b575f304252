"""Which batch sizes are worth their price, over the whole interval of a noise scale. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gns.advising.tradeoff import EQUAL, Price

WASTE = 0.05  # "about as cheap as it gets": within 5 % of the cheapest
LARGEST_POWER = 40  # no batch of 2⁴⁰ examples or more is proposed


@dataclass(frozen=True)
class BatchRange:
    """Batch sizes that are worth their price.

    "examples": only examples cost; wasting at most w of them means B ≤ w·B_crit, so [0, w·high], of which
    [0, w·low] holds whatever B_crit in the interval is the true one.
    "time and examples": at most w above the cheapest at the stated price, see `gns.advising.tradeoff.Price`.
    The range goes from the lower root at the interval's low end to the upper root at its high end; where the
    upper root at the low end lies above the lower root at the high end, the batches between hold whatever
    B_crit in the interval is the true one. At equal prices and w = 5 % the roots are 0.64 and 1.56 × B_crit,
    so the range is never less than 2.4 × wide.

    Args:
        priced: "examples" or "time and examples".
        waste: w, share above the cheapest that is accepted.
        low: lower end, in examples a step.
        high: upper end; `inf` where none is known.
        sure: the part that holds over the whole interval, or None.
        pick: for "time and examples", the power of two whose worst cost over the interval is least; None
            where an end is missing.
        pick_extra_cost: the most that `pick` can cost above the cheapest, over the whole interval.
        price: of time against examples; None where only examples cost.
    """

    priced: str
    waste: float
    low: float
    high: float
    sure: tuple[float, float] | None
    pick: int | None = None
    pick_extra_cost: float | None = None
    price: Price | None = None


def batch_ranges(
    low: float, high: float, *, price: Price = EQUAL, dataset_size: int | None = None
) -> tuple[BatchRange, ...]:
    """Ranges where only examples cost (5 % and 20 % waste), then the one for a price of time.

    Args:
        low: lower end of the noise scale's interval, examples.
        high: upper end; `inf` where none is known.
        price: of time against examples.
        dataset_size: examples in the data set, which bound `pick`.

    Returns:
        The three ranges, the priced one last.
    """
    cheap = [BatchRange("examples", w, 0, w * high, (0, w * low)) for w in (WASTE, 0.2)]
    (bottom, sure_top), (sure_bottom, top) = price.near(low, WASTE), price.near(high, WASTE)
    pick, more = None, None
    if low > 0 and 1 <= high < math.inf:  # below 1 example there is no batch to choose
        largest = LARGEST_POWER if dataset_size is None else int(math.log2(dataset_size))
        worst = {b: worst_cost(b, (low, high), price) for b in (2**i for i in range(largest + 1))}
        pick = min(worst, key=lambda b: worst[b])
        more = worst[pick]
    sure = (sure_bottom, sure_top) if sure_bottom <= sure_top else None
    near = BatchRange("time and examples", WASTE, bottom, top, sure, pick, more, price)
    return (*cheap, near)


def worst_cost(batch: float, ends: tuple[float, float], price: Price) -> float:
    """Most that a batch can cost above the cheapest while B_crit is within an interval.

    √(extra cost) is |B − B*| over a sum that grows with B_crit, so the most is at one of the ends.
    """
    return max(price.extra_cost(batch, b) for b in ends)
