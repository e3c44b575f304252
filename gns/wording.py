"""Advice in sentences: what `gns.advice` worked out, for a reader. No figure is made here but differences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gns.drift import Drift
from gns.estimate import Estimate, format_count
from gns.tradeoff import LAWS, band, examples_ratio, steps_ratio

if TYPE_CHECKING:
    from gns.advice import BatchRange, Row

DISAGREE = 1.5  # learning-rate laws further apart than this are warned about
LAWS_CAVEAT = (
    "B_simple stands in for the noise scales of the laws, which are other quantities (that of the surge law "
    "is fitted from many training runs), and the ranges show only how sure B_simple is"
)


def movement(change: Drift | None) -> str | None:
    """Warn that the noise scale moved along the run, or None where it did not or cannot be told."""
    if change is None or not change.moved:
        return None
    return (
        f"The noise scale moved during the run: {change}. The number over the whole run leans towards the "
        "part where the gradient was largest; for what comes next, go by the later part."
    )


def headline(estimate: Estimate, span: str | None = None) -> str:
    """Say what is known of the noise scale, in one sentence; `span` names the part of a run it is about."""
    said = _known(estimate)
    return said if span is None else f"In {span}, {said[0].lower()}{said[1:]}"


def _known(estimate: Estimate) -> str:
    sure = f"{100 * estimate.level:g} % sure"
    if math.isinf(estimate.high):
        bound = format_count(estimate.low)
        return f"The noise scale is at least {bound} examples ({sure}); no upper end is known."
    ends = f"{format_count(estimate.low)} … {format_count(estimate.high)}"
    value = "" if math.isnan(estimate.b_simple) else f" about {format_count(estimate.b_simple)} examples,"
    return f"The noise scale is{value} between {ends} ({sure})."


def _percent(x: float) -> str:
    """Write a share as a percentage; from ten times on, as a multiple."""
    return f"{format_count(x)} ×" if x >= 10 else f"{100 * x:.0f} %" if x >= 0.01 else f"{100 * x:.1g} %"


def _whole(batch: float) -> str:
    """Write a batch size: no less than 1 exists."""
    return format_count(max(1.0, float(round(batch))) if math.isfinite(batch) else batch)


def sentences(
    estimate: Estimate,
    batch: int,
    ranges: tuple[BatchRange, ...],
    data: int | None,
    rate: float | None,
    best: tuple[int, int] | None,
) -> list[str]:
    """Say what follows for the batch size, the learning rate and the epoch.

    Args:
        estimate: with a confidence set.
        batch: in use, examples a step.
        ranges: of batch sizes, the one for equal prices last.
        data: examples in the data set, or None.
        rate: learning rate in use, or None.
        best: batches with the best goodput at the two ends of the interval, or None.
    """
    ends = (estimate.low, estimate.high)
    lines = [_both_cost(ranges[-1]), _only_examples_cost(ranges), _batch_in_use(batch, ends)]
    if best is not None:
        which = f"{best[0]}" if best[0] == best[1] else f"{best[0]} … {best[1]}"
        lines.append(f"On this machine the soonest in wall-clock time among the batches timed: {which}.")
    target = ranges[-1].pick or max(1, round(estimate.low))
    if rate is not None and target != batch:
        lines.append(_transfer(rate, batch, target, ends))
    if data is not None:
        steps = math.ceil(data / target)
        share = _percent(target / data)
        lines.append(
            f"One epoch of {data:,} examples at batch {target} is {steps:,} optimizer steps of {share} each."
        )
    if math.isinf(estimate.high):
        lines.append(
            "To know more, measure with a larger batch or more steps: the largest noise scale that can be "
            f"seen, now {format_count(estimate.detection_limit)} examples, doubles with twice the batch or "
            "four times the steps."
        )
    return lines


def _both_cost(near: BatchRange) -> str:
    """Say the range where time and examples matter equally."""
    start = "If time and examples matter equally:"
    if math.isinf(near.high):
        return f"{start} a batch of at least {_whole(near.low)}; where it stops paying is not known."
    if round(near.high) <= 1:
        return f"{start} batch 1, the smallest there is."
    text = f"{start} a batch of {_whole(near.low)} … {_whole(near.high)}"
    if near.pick is None or near.pick_extra_cost is None:
        return f"{text}; the lower end is not resolved."
    more = _percent(near.pick_extra_cost)
    return f"{text}; {near.pick} costs at most {more} more than the best batch would."


def _only_examples_cost(ranges: tuple[BatchRange, ...]) -> str:
    """Say the upper ends where only examples matter."""
    sure = [(r.waste, r.sure[1]) for r in ranges if r.priced == "examples" and r.sure]
    parts = [f"{_whole(math.floor(top))} wastes at most {_percent(w)}" for w, top in sure if top >= 1]
    if not parts:
        return "If only examples matter, not time: batch 1; no larger one is sure to waste less than 20 %."
    return f"If only examples matter, not time: a small batch; up to {', up to '.join(parts)}."


def _batch_in_use(batch: int, ends: tuple[float, float]) -> str:
    more = band([examples_ratio(batch, b) - 1 for b in ends])
    steps = band([steps_ratio(batch, b) for b in ends])
    waste = f"{_percent(more[0])} … {_percent(more[1])}" if more[0] > 0 else f"at most {_percent(more[1])}"
    many = f"{format_count(steps[0])} … {format_count(steps[1])}"
    if math.isinf(steps[1]):
        many = f"at least {format_count(steps[0])}"
    return (
        f"The batch of {batch} in use takes {waste} more examples than the fewest, {many} × the fewest steps."
    )


def _transfer(rate: float, batch: int, target: int, ends: tuple[float, float]) -> str:
    """Say what each learning-rate law makes of the step from one batch to another."""
    parts = []
    for name, law in LAWS.items():
        low, high = band([rate * law(target, batch, b) for b in ends])
        value = f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} … {high:.2g}"
        parts.append(f"{value} ({name})")
    apart = format_count(_spread(target, batch, ends))
    return (
        f"Learning rate {rate:g} at batch {batch} becomes at batch {target}: {', '.join(parts)}. "
        f"{LAWS_CAVEAT}; the laws differ from each other by up to {apart}×."
    )


def _spread(batch: int, reference: int, ends: tuple[float, float]) -> float:
    """How far apart the learning-rate laws are at one batch, largest over smallest, at the worse end."""
    at_each_end = [[law(batch, reference, b) for law in LAWS.values()] for b in ends]
    return max(max(ratios) / min(ratios) for ratios in at_each_end)


def remarks(estimate: Estimate, batch: int, table: tuple[Row, ...]) -> list[str]:
    """Say what makes this advice less certain than it looks."""
    found = []
    ends = (estimate.low, estimate.high)
    spread = {row.batch_size: _spread(row.batch_size, batch, ends) for row in table if row.learning_rates}
    if spread and max(spread.values()) > DISAGREE:
        agree = [b for b, s in spread.items() if s <= DISAGREE]
        where = f"outside batch {agree[0]} … {agree[-1]}" if agree else "at every batch in the table"
        worst = max(spread, key=lambda b: spread[b])
        found.append(
            f"the learning-rate laws disagree by more than {DISAGREE:g}× {where} (up to "
            f"{format_count(spread[worst])}× at {worst}): there, try several learning rates instead of "
            "trusting one law."
        )
    if batch > estimate.high:
        found.append(
            f"the batch of {batch} in use is above the whole interval: readings taken so far above the "
            "critical batch size calibrate badly. Measure again with a smaller batch."
        )
    if estimate.coverage is not None and estimate.coverage < 1:
        found.append(f"only {100 * estimate.coverage:.3g} % of the trainable numbers are in the sums.")
    return found
