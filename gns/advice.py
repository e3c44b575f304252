"""What batch size and learning rate a noise scale speaks for: from an estimate with its interval. Pure.

B_simple stands in for the critical batch size B_crit and for the B_noise of the learning-rate laws; every
text that uses it says so. Every figure is a band, one end for each end of the confidence interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gns.advising import wording
from gns.advising.capacity import Capacity, StepCost
from gns.advising.epoch import EpochPlan, epoch_plan
from gns.advising.goodput import Goodput, Soonest, goodputs, soonest
from gns.advising.ranges import BatchRange, batch_ranges
from gns.advising.rates import RateCurve, rate_curves
from gns.advising.tradeoff import EQUAL, LAWS, Price, band, examples_ratio, positive, steps_ratio
from gns.advising.wording import Section
from gns.estimate import MIN_STEPS, Estimate
from gns.statistics.drift import Drift

CAVEATS = (
    "B_simple is not the critical batch size itself: where both were measured, their ratio ran from "
    "0.05 (autoencoders) to 8 (SVHN). Take the range as a place to start, and try half and double.",
    "it is not established that the noise scale predicts the best batch size of LoRA: runs of ours on small "
    "models are the only published evidence on it that we know of.",
    "the noise scale moves with the learning rate and along training: a reading belongs to its settings.",
)

TIME = (
    "fewer steps save time only as far as a larger batch does not take longer a step: on more devices, or on "
    "one that is not yet full. `gns throughput` measures it."
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
class Advice:
    """What follows from an estimate; `str(advice)` says it in a few lines.

    Args:
        status: of the estimate.
        low: lower end of its interval, examples.
        high: upper end; `inf` where none is known.
        batch_size: in use, examples a step.
        headline: the verdict in one sentence.
        sections: the rest in words, by subject, most important first.
        table: trade-off at powers of two; empty while it is too early.
        ranges: of batch sizes, one a price, the one for time and examples last; empty while it is too early.
        rates: learning rate against batch size, one curve a law; empty without a learning rate to start from.
        plan: one epoch of the data; None without a data size.
        goodput: one a measured throughput; empty without one.
        soonest: the timed batch that is soonest at a given loss, or None.
        capacity: of the adapters against the data, as it was given.
        cost: of a step, LoRA against full fine-tuning, as it was given.
        warnings: what does not fit together.
        estimate_warnings: those of the estimate itself, which a reporter may have shown already.
        caveats: what the reader must not forget.
        span: the part of the run that all this is about, if not the whole of it.
        moved: how the noise scale moved along the run, if it did.
    """

    status: str
    low: float
    high: float
    batch_size: int
    headline: str
    sections: tuple[Section, ...] = ()
    table: tuple[Row, ...] = ()
    ranges: tuple[BatchRange, ...] = ()
    rates: tuple[RateCurve, ...] = ()
    plan: EpochPlan | None = None
    goodput: tuple[Goodput, ...] = ()
    soonest: Soonest | None = None
    capacity: Capacity | None = None
    cost: StepCost | None = None
    warnings: tuple[str, ...] = ()
    estimate_warnings: tuple[str, ...] = ()
    caveats: tuple[str, ...] = CAVEATS
    span: str | None = None
    moved: str | None = None

    @property
    def sentences(self) -> tuple[str, ...]:
        """All sections in one row, without their titles."""
        return tuple(line for section in self.sections for line in section.sentences)

    @property
    def best_goodput(self) -> tuple[int, int] | None:
        """Batch sizes of most goodput at `low` and at `high`, the smaller first; None without throughput."""
        return self.soonest.ends if self.soonest else None

    def __str__(self) -> str:
        marked = [f"Warning: {w}" for w in (*self.estimate_warnings, *self.warnings)]
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
    time_price: float | None = None,
    step_price: float | None = None,
    examples_needed: float | None = None,
    capacity: Capacity | None = None,
    cost: StepCost | None = None,
) -> Advice:
    """Turn an estimate with its interval into ranges of batch sizes and what they mean.

    Args:
        estimate: of the noise scale.
        batch_size: B₀ in use, examples an optimizer step (all micro-batches, all ranks).
        dataset_size: examples in the data set.
        throughput: measured examples a second at some batch sizes, e.g.
            `gns.advising.throughput.read(file).speeds`.
        learning_rate: in use at `batch_size`.
        change: from `gns.statistics.drift.drift`. Where the noise scale moved, the advice is for the last
            third of the run instead of its average.
        time_price: what the fewest possible steps cost, relative to what the fewest possible examples cost;
            1, the default, means that time and examples matter equally, 3 that time matters more.
        step_price: instead of `time_price`: how many examples the time of one optimizer step is worth.
        examples_needed: examples that the loss aimed at takes at `batch_size`, as seen in an earlier run.
        capacity: from `gns.advising.capacity`; it is shown beside the rest.
        cost: from `gns.advising.capacity.step_cost`; it is shown beside the rest.

    Returns:
        The advice; without table and ranges while the estimate is still collecting.

    Raises:
        TypeError: `estimate` is not an `Estimate`.
        ValueError: another argument is out of range, or both prices are given.
    """
    if not isinstance(estimate, Estimate):
        raise TypeError(
            f"estimate is a {type(estimate).__name__}; an Estimate is needed, e.g. monitor.estimate()"
        )
    given = _Given(batch_size, dataset_size, throughput, learning_rate, examples_needed, capacity, cost)
    given.check()
    price = EQUAL if time_price is None and step_price is None else Price(time_price, step_price)
    moved = change if change and change.moved and estimate.status != "collecting" else None
    if moved:
        estimate = replace(moved.last, coverage=estimate.coverage)
    nothing_known = estimate.low == 0 and math.isinf(estimate.high)
    if estimate.status == "collecting" or math.isnan(estimate.low) or nothing_known:
        return _too_early(estimate, given)
    advice = _advise(estimate, given, price)
    if not moved:
        return advice
    headline = wording.headline(estimate, moved.span)
    return replace(advice, headline=headline, span=moved.span, moved=wording.movement(moved))


@dataclass(frozen=True)
class _Given:
    """What the user told beside the estimate; see `advise`."""

    batch: int
    data: int | None
    throughput: Mapping[int, float] | None
    rate: float | None
    needed: float | None
    capacity: Capacity | None
    cost: StepCost | None

    def check(self) -> None:
        """Require numbers in range.

        Raises:
            ValueError: one is not.
        """
        positive("batch_size", self.batch, whole=True)
        if self.data is not None:
            positive("dataset_size", self.data, whole=True)
            if self.data < self.batch:
                raise ValueError(
                    f"batch_size is {self.batch} with a dataset_size of {self.data}; at most that is needed"
                )
        if self.rate is not None:
            positive("learning_rate", self.rate)
        if self.needed is not None:
            positive("examples_needed", self.needed)
        if self.throughput is not None and not self.throughput:
            raise ValueError("throughput is empty; batch size → examples a second is needed, or None")
        for batch, speed in (self.throughput or {}).items():
            positive("a batch size in throughput", batch, whole=True)
            positive(f"throughput at batch {batch}", speed)


def _too_early(estimate: Estimate, given: _Given) -> Advice:
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
    return Advice(
        estimate.status,
        estimate.low,
        estimate.high,
        given.batch,
        headline,
        sections=wording.beside(given.capacity, given.cost),
        capacity=given.capacity,
        cost=given.cost,
    )


def _advise(estimate: Estimate, given: _Given, price: Price) -> Advice:
    ends = (estimate.low, estimate.high)
    batch, data, rate = given.batch, given.data, given.rate
    ranges = batch_ranges(*ends, price=price, dataset_size=data)
    sizes = _powers_of_two(batch, *ends, data)
    timed = goodputs(given.throughput or {}, batch, ends, given.needed)
    plan = None if data is None else epoch_plan(data, batch, ends, sizes, given.needed)
    table = tuple(_row(b, batch, ends, data, rate) for b in sizes)
    advice = Advice(
        status=estimate.status,
        low=estimate.low,
        high=estimate.high,
        batch_size=batch,
        headline=wording.headline(estimate),
        table=table,
        ranges=ranges,
        rates=() if rate is None else rate_curves(rate, batch, ends, sizes[0], sizes[-1]),
        plan=plan,
        goodput=timed,
        soonest=soonest(timed, batch),
        capacity=given.capacity,
        cost=given.cost,
        warnings=tuple(wording.remarks(estimate, batch, table, data)),
        estimate_warnings=estimate.warnings,
        caveats=(*CAVEATS, *(() if timed else (TIME,)), *wording.plan_caveats(plan)),
    )
    return replace(advice, sections=wording.sections(estimate, advice, rate))


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
