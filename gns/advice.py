"""What batch size and learning rate a noise scale speaks for: from an estimate with its interval. Pure.

B_simple stands in for the critical batch size B_crit and for the B_noise of the learning-rate laws; every
text that uses it says so. Every figure is a band, one end for each end of the confidence interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gns import wording
from gns.drift import Drift
from gns.estimate import MIN_STEPS, Estimate
from gns.tradeoff import LAWS, band, examples_ratio, extra_cost, steps_ratio

WASTE = 0.05  # "about as cheap as it gets": within 5 % of the cheapest
# x + 1/x ≤ 2 + 4·WASTE, the solution for equal prices of time and examples: 0.64 … 1.56, 2.4× wide
_HALF = 1 + 2 * WASTE
NEAR = (_HALF - math.sqrt(_HALF**2 - 1), _HALF + math.sqrt(_HALF**2 - 1))
CAVEATS = (
    "B_simple is not the critical batch size itself: where both were measured, their ratio ran from "
    "0.05 (autoencoders) to 8 (SVHN). Take the range as a place to start, and try half and double.",
    "no published evidence ties the best batch size of LoRA to its gradient noise scale yet.",
    "the noise scale moves with the learning rate and along training: a reading belongs to its settings.",
)


@dataclass(frozen=True)
class Row:
    """One batch size of the trade-off table. A pair is a band, (lower, upper) over the interval.

    Args:
        batch_size: B, examples a step.
        steps: S/S_min.
        examples: E/E_min.
        learning_rates: law → learning rate; empty without one to start from.
        steps_per_epoch: optimizer steps that one pass over the data takes, or None.
        share_of_data: share of the data set in one step, or None.
    """

    batch_size: int
    steps: tuple[float, float]
    examples: tuple[float, float]
    learning_rates: Mapping[str, tuple[float, float]]
    steps_per_epoch: int | None = None
    share_of_data: float | None = None


@dataclass(frozen=True)
class BatchRange:
    """Batch sizes that are worth their price.

    "examples": only examples cost; wasting at most w of them means B ≤ w·B_crit, so [0, w·high], of which
    [0, w·low] holds whatever B_crit in the interval is the true one.
    "time and examples": S_min steps and E_min examples cost the same; at most w above the cheapest means
    0.64 … 1.56 × B_crit at w = 5 %. The range is [0.64·low, 1.56·high], never less than 2.4× wide;
    [0.64·high, 1.56·low], where not empty, holds whatever B_crit in the interval is the true one.

    Args:
        priced: "examples" or "time and examples".
        waste: w, share above the cheapest that is accepted.
        low: lower end, in examples a step.
        high: upper end; `inf` where none is known.
        sure: the part that holds over the whole interval, or None.
        pick: for "time and examples", the power of two nearest √(low·high); None where an end is missing.
        pick_extra_cost: the most that `pick` can cost above the cheapest, over the whole interval.
    """

    priced: str
    waste: float
    low: float
    high: float
    sure: tuple[float, float] | None
    pick: int | None = None
    pick_extra_cost: float | None = None


@dataclass(frozen=True)
class Goodput:
    """Useful examples a second at one batch size: throughput × (φ + B₀)/(φ + B), φ the noise scale.

    Source: Qiao et al. 2021 (Pollux, OSDI), eq. (4)–(6), B₀ the batch in use.
    """

    batch_size: int
    examples_per_second: float
    useful: tuple[float, float]


@dataclass(frozen=True)
class Advice:
    """What follows from an estimate; `str(advice)` says it in a few lines.

    Args:
        status: of the estimate.
        low: lower end of its interval, examples.
        high: upper end; `inf` where none is known.
        batch_size: in use, examples a step.
        headline: the verdict in one sentence.
        sentences: the rest in words, most important first.
        table: trade-off at powers of two; empty while it is too early.
        ranges: of batch sizes, one a price; empty while it is too early.
        goodput: one a measured throughput; empty without one.
        best_goodput: batch sizes of most goodput at `low` and at `high`, or None.
        warnings: what does not fit together.
        caveats: what the reader must not forget.
        span: the part of the run that all this is about, if not the whole of it.
        moved: how the noise scale moved along the run, if it did.
    """

    status: str
    low: float
    high: float
    batch_size: int
    headline: str
    sentences: tuple[str, ...] = ()
    table: tuple[Row, ...] = ()
    ranges: tuple[BatchRange, ...] = ()
    goodput: tuple[Goodput, ...] = ()
    best_goodput: tuple[int, int] | None = None
    warnings: tuple[str, ...] = ()
    caveats: tuple[str, ...] = CAVEATS
    span: str | None = None
    moved: str | None = None

    def __str__(self) -> str:
        marked = [f"Warning: {w}" for w in self.warnings]
        moved = [self.moved] if self.moved else []
        return "\n".join(
            [self.headline, *moved, *self.sentences, *marked, *(f"Note: {c}" for c in self.caveats)]
        )


def advise(
    estimate: Estimate,
    *,
    batch_size: int,
    dataset_size: int | None = None,
    throughput: Mapping[int, float] | None = None,
    learning_rate: float | None = None,
    change: Drift | None = None,
) -> Advice:
    """Turn an estimate with its interval into ranges of batch sizes and what they mean.

    Args:
        estimate: of the noise scale.
        batch_size: B₀ in use, examples an optimizer step (all micro-batches, all ranks).
        dataset_size: examples in the data set.
        throughput: measured examples a second at some batch sizes.
        learning_rate: in use at `batch_size`.
        change: from `gns.drift.drift`. Where the noise scale moved, the advice is for the last third of the
            run instead of its average.

    Returns:
        The advice; without table and ranges while the estimate is still collecting.

    Raises:
        TypeError: `estimate` is not an `Estimate`.
        ValueError: another argument is out of range.
    """
    if not isinstance(estimate, Estimate):
        raise TypeError(
            f"estimate is a {type(estimate).__name__}; an Estimate is needed, e.g. monitor.estimate()"
        )
    _check("batch_size", batch_size, whole=True)
    if dataset_size is not None:
        _check("dataset_size", dataset_size, whole=True)
        if dataset_size < batch_size:
            raise ValueError(
                f"batch_size is {batch_size} with a dataset_size of {dataset_size}; at most that is needed"
            )
    if learning_rate is not None:
        _check("learning_rate", learning_rate)
    if throughput is not None and not throughput:
        raise ValueError("throughput is empty; batch size → examples a second is needed, or None")
    for batch, speed in (throughput or {}).items():
        _check("a batch size in throughput", batch, whole=True)
        _check(f"throughput at batch {batch}", speed)
    moved = change if change and change.moved and estimate.status != "collecting" else None
    if moved:
        estimate = replace(moved.last, coverage=estimate.coverage)
    nothing_known = estimate.low == 0 and math.isinf(estimate.high)
    if estimate.status == "collecting" or math.isnan(estimate.low) or nothing_known:
        return _too_early(estimate, batch_size)
    advice = _advise(estimate, batch_size, dataset_size, throughput or {}, learning_rate)
    if not moved:
        return advice
    headline = wording.headline(estimate, moved.span)
    return replace(advice, headline=headline, span=moved.span, moved=wording.movement(moved))


def _check(name: str, value: Any, *, whole: bool = False) -> None:
    """Require a finite positive number.

    Raises:
        ValueError: it is none.
    """
    value = value.item() if isinstance(value, np.generic) else value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0 or (whole and value != int(value)):
        kind = "a whole number, 1 or more," if whole else "a finite number > 0"
        raise ValueError(f"{name} is {value!r}; {kind} is needed")


def _too_early(estimate: Estimate, batch_size: int) -> Advice:
    headline = "Too early for advice: these steps say nothing about the noise scale yet. Measure on."
    if estimate.n_steps < MIN_STEPS:
        headline = (
            f"Too early for advice: {estimate.n_steps} usable step(s) so far, {MIN_STEPS} are needed. "
            "Measure on."
        )
    elif estimate.status == "collecting":
        headline = (
            f"Too early for advice: {estimate.n_steps} usable steps, but of so unequal size that they count "
            f"for fewer than the {MIN_STEPS} needed. Measure on."
        )
    return Advice(estimate.status, estimate.low, estimate.high, batch_size, headline)


def _advise(
    estimate: Estimate,
    batch: int,
    data: int | None,
    throughput: Mapping[int, float],
    rate: float | None,
) -> Advice:
    ends = (estimate.low, estimate.high)
    ranges = _ranges(*ends, data)
    table = tuple(_row(b, batch, ends, data, rate) for b in _powers_of_two(batch, *ends, data))
    goodput = tuple(_goodput(b, v, batch, ends) for b, v in sorted(throughput.items()))
    best = None
    if goodput:
        low, high = (max(goodput, key=lambda g: g.useful[end]).batch_size for end in (0, 1))
        best = (min(low, high), max(low, high))
    return Advice(
        status=estimate.status,
        low=estimate.low,
        high=estimate.high,
        batch_size=batch,
        headline=wording.headline(estimate),
        sentences=tuple(wording.sentences(estimate, batch, ranges, data, rate, best)),
        table=table,
        ranges=ranges,
        goodput=goodput,
        best_goodput=best,
        warnings=tuple(wording.remarks(estimate, batch, table)),
    )


def _powers_of_two(batch: int, low: float, high: float, data: int | None) -> list[int]:
    """Give the table's batch sizes: the batch in use and the interval, with three doublings around."""
    middle = [float(batch)] + [x for x in (low, high) if x > 0 and math.isfinite(x)]
    first = max(0, math.floor(math.log2(min(middle))) - 3)
    last = max(first + 6, math.ceil(math.log2(max(middle))) + 3)
    if data is not None:
        last = min(last, int(math.log2(data)))
        first = min(first, last)
    return [2**i for i in range(first, min(last, first + 23) + 1)]


def _row(batch: int, reference: int, ends: tuple[float, float], data: int | None, rate: float | None) -> Row:
    rates = {}
    if rate is not None:
        rates = {name: band([rate * law(batch, reference, b) for b in ends]) for name, law in LAWS.items()}
    return Row(
        batch,
        band([steps_ratio(batch, b) for b in ends]),
        band([examples_ratio(batch, b) for b in ends]),
        rates,
        None if data is None else math.ceil(data / batch),
        None if data is None else batch / data,
    )


def _goodput(batch: int, speed: float, reference: int, ends: tuple[float, float]) -> Goodput:
    low, high = (speed if math.isinf(b) else speed * (b + reference) / (b + batch) for b in ends)
    return Goodput(int(batch), float(speed), (low, high))


def _ranges(low: float, high: float, data: int | None) -> tuple[BatchRange, ...]:
    cheap = [BatchRange("examples", w, 0, w * high, (0, w * low)) for w in (WASTE, 0.2)]
    sure = (NEAR[0] * high, NEAR[1] * low)
    pick = None
    if low > 0 and 1 <= high < math.inf:  # below 1 example there is no batch to choose
        pick = 2 ** max(0, round(math.log2(low * high) / 2))
        pick = pick if data is None else min(pick, 2 ** int(math.log2(data)))
    near = BatchRange(
        "time and examples",
        WASTE,
        NEAR[0] * low,
        NEAR[1] * high,
        sure if sure[0] <= sure[1] else None,
        pick,
        None if pick is None else max(extra_cost(pick, low), extra_cost(pick, high)),
    )
    return (*cheap, near)
