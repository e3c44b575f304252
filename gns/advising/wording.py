"""Advice in sentences: what `gns.advice` worked out, for a reader. No figure is made here but differences.

What a batch costs and which learning rate goes with it; the rest of a run is in `gns.advising.phrases`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gns.advising import phrases
from gns.advising.calibration import calibrations
from gns.advising.phrases import counts, percent, percents, span, whole
from gns.advising.ranges import BatchRange
from gns.advising.rates import spread
from gns.advising.tradeoff import LAWS, Price, band, examples_ratio, steps_ratio
from gns.estimate import Estimate, format_count, in_metric
from gns.statistics.drift import Drift

if TYPE_CHECKING:
    from gns.advice import Advice, Row
    from gns.advising.capacity import Capacity, StepCost
    from gns.advising.epoch import EpochPlan
    from gns.advising.goodput import Soonest

BATCH_SIZE, LEARNING_RATE = "Batch size", "Learning rate"  # titles of sections that tables belong to
CHECKED, IN_USE, EPOCH = "Where both were measured", "The batch in use", "One epoch"
AS_IF = " and the noise scale is the critical batch size"
DISAGREE = 1.5  # learning-rate laws further apart than this are warned about
START = (
    "A place to start, to be tried with half and double: the noise scale stands in for the critical batch "
    "size."
)
LAWS_CAVEAT = (
    "B_simple stands in for the noise scales of the laws, which are other quantities (that of the surge law "
    "is fitted from many training runs), and the ranges show only how sure B_simple is"
)


@dataclass(frozen=True)
class Section:
    """Some sentences on one subject.

    Args:
        title: the subject, a few words.
        sentences: most important first.
        brief: those of them, or shorter ones, that a summary holds.
    """

    title: str
    sentences: tuple[str, ...]
    brief: tuple[str, ...] = ()

    def without_brief(self) -> Section:
        """Give what a summary leaves out."""
        return Section(self.title, tuple(line for line in self.sentences if line not in self.brief))


def euclidean(estimate: Estimate) -> bool:
    """Whether norms are the plain ones, which all that was checked is about."""
    return estimate.metric == "euclidean"


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
    scale = "The noise scale" + ("" if euclidean(estimate) else f" {in_metric(estimate.metric)}")
    if math.isinf(estimate.high):
        bound = format_count(estimate.low)
        return f"{scale} is at least {bound} examples ({sure}); no upper end is known."
    ends = f"{format_count(estimate.low)} and {format_count(estimate.high)}"
    value = "" if math.isnan(estimate.point) else f" about {format_count(estimate.point)} examples,"
    return f"{scale} is{value} between {ends} ({sure})."


def sections(estimate: Estimate, advice: Advice, rate: float | None) -> tuple[Section, ...]:
    """Say what follows for the batch size, the time, the epoch and the learning rate.

    Args:
        estimate: with a confidence set.
        advice: its figures; words are not looked at.
        rate: learning rate in use, or None.
    """
    ends = (estimate.low, estimate.high)
    batch, near = advice.batch_size, advice.ranges[-1]
    data = advice.plan.dataset_size if advice.plan else None
    target = _target(near, estimate.low, data) or batch
    speed, epoch, transfer = [], [], []
    if advice.soonest is not None:
        speed = [*phrases.soonest(advice.soonest, advice.goodput, batch), _against(advice.soonest, near)]
    if advice.plan is not None:
        epoch = phrases.one_epoch(advice.plan, target, ends)
    if rate is not None and target != batch:
        transfer = [_transfer(rate, batch, target, ends)]
    worth = _worth_it(near, ends, data)
    cost, checked = _only_examples_cost(advice.ranges, data), calibrations() if euclidean(estimate) else ()
    found = [
        (BATCH_SIZE, [*worth, _why(near), cost], [*worth, cost]),
        (IN_USE, [used := _batch_in_use(batch, ends, near)], [used]),
        (CHECKED, [each.sentence(ends) for each in checked], [each.brief(ends) for each in checked]),
        (EPOCH, epoch, epoch if advice.plan and advice.plan.largest else epoch[:-1]),
        ("Wall-clock time", speed, []),
        (LEARNING_RATE, transfer, []),
    ]
    told = [Section(title, _there(lines), _there(brief)) for title, lines, brief in found if lines]
    more = phrases.know_more(estimate, sure=near.sure is not None or _smallest(near))
    return (*told, *beside(advice.capacity, advice.cost), *([Section("To know more", more)] if more else []))


def _there(lines: Sequence[str | None]) -> tuple[str, ...]:
    """Give the lines that there are."""
    return tuple(line for line in lines if line)


def beside(capacity: Capacity | None, cost: StepCost | None) -> tuple[Section, ...]:
    """Say what does not depend on the noise scale: what the adapters hold, and what a step costs."""
    lines = [phrases.room(capacity)] if capacity is not None else []
    lines += [phrases.step_cost(cost)] if cost is not None else []
    return (Section("Capacity and cost of LoRA", tuple(lines)),) if lines else ()


def plan_caveats(plan: EpochPlan | None) -> tuple[str, ...]:
    """Name what the plan of an epoch assumes."""
    return () if plan is None else (f"the plan of one epoch assumes: {'; '.join(plan.assumptions)}.",)


def priced(price: Price | None) -> str:
    """Name a price of time against examples."""
    if price is None or price.time == 1:
        return "If time and examples matter equally"
    if price.step is not None:
        return f"If the time of one step is worth {format_count(price.step)} examples"
    time = price.time or 1.0
    if time > 1:
        return f"If time matters {format_count(time)} × as much as examples"
    return f"If examples matter {format_count(1 / time)} × as much as time"


def _target(near: BatchRange, low: float, data: int | None) -> int | None:
    """Choose the batch that epoch and learning rate are worked out for; None where none is proposed.

    It is the one picked; where only a lower bound is known, the best batch if that were the noise scale.
    """
    if near.pick is not None or low == 0 or near.price is None:
        return near.pick or (1 if _smallest(near) else None)
    best = max(1, round(near.price.best(low)))
    return best if data is None else min(best, data)


def _smallest(near: BatchRange) -> bool:
    """Whether no batch is worth its price but 1."""
    return near.high < 1.5


def _against(best: Soonest, near: BatchRange) -> str | None:
    """Set the batch that is soonest on this machine against the range for a price of time."""
    if _shown(near)[0] <= best.batch_size <= _shown(near)[1]:
        return None
    where = "below" if best.batch_size < near.low else "above"
    return (
        f"That is {where} the range under “{BATCH_SIZE}”, which takes every step to last as long as any "
        "other. If what counts is the time on this machine, go by what was timed here."
    )


def _shown(near: BatchRange) -> tuple[float, float]:
    """Give the range in whole batches, as it is written."""
    return max(1, round(near.low)), max(1, round(near.high)) if math.isfinite(near.high) else near.high


def _worth_it(near: BatchRange, ends: tuple[float, float], data: int | None) -> list[str | None]:
    """Say which batches are worth their price, and how sure that is."""
    return [_both_cost(near, data), _sureness(near, ends, data)]


def _both_cost(near: BatchRange, data: int | None) -> str:
    """Say the range for a price of time."""
    start = f"{priced(near.price)}{AS_IF}:"
    if math.isinf(near.high):
        least = f"{start} a batch of at least {whole(near.low)}; where it stops paying is not known."
        return f"{least} {_more_than_all(data)}" if data is not None and near.low > data else least
    if _smallest(near):
        return f"{start} batch 1, the smallest there is."
    text = f"{start} a batch of {whole(near.low)} … {whole(near.high)}"
    if data is not None and near.low > data:
        return f"{text}. {_more_than_all(data)}"
    if data is not None and near.high > data:
        text = f"{text} (no more than the {data:,} examples of the data)"
    if near.pick is None or near.pick_extra_cost is None:
        return f"{text}; the lower end is not resolved."
    more = percent(near.pick_extra_cost)
    return f"{text}; {near.pick} costs at most {more} more than the best batch would."


def _more_than_all(data: int) -> str:
    """Say that the range lies beyond the data."""
    return (
        f"That is more than the {data:,} examples of the data: no batch of them is too large at this price."
    )


def _why(near: BatchRange) -> str | None:
    """Say why the range lies where it lies."""
    if near.price is None or _smallest(near):
        return None
    if near.price.step is not None:
        best = f"√({format_count(near.price.step)} × the noise scale)"
    else:
        factor = math.sqrt(near.price.time or 1.0)
        best = "the noise scale itself" if factor == 1 else f"{format_count(factor)} × the noise scale"
    return (
        "Why: far below the noise scale, twice the batch takes half the steps for hardly any more examples; "
        "far above it, twice the batch takes twice the examples and saves hardly a step. At this price the "
        f"best batch is {best}."
    )


def _sureness(near: BatchRange, ends: tuple[float, float], data: int | None) -> str | None:
    """Say how sure the range is."""
    if math.isinf(ends[1]) or _smallest(near) or (data is not None and near.low > data):
        return None
    close = percent(near.waste)
    least, most = (0, -1) if near.sure is None else (math.ceil(near.sure[0]), math.floor(near.sure[1]))
    least, most = max(1, least), min(most, data or most)
    if least <= most:
        inside = counts((least, most))
        return (
            f"Sure: {inside} is within {close} of the least cost wherever in {span(ends)} the noise scale is."
        )
    return f"Not sure: in {span(ends)} no batch is within {close} of the least cost everywhere."


def _only_examples_cost(ranges: tuple[BatchRange, ...], data: int | None) -> str:
    """Say the upper ends where only examples matter."""
    tops = [(r.waste, min(r.sure[1], data or math.inf)) for r in ranges if r.priced == "examples" and r.sure]
    sure = list({top: (w, top) for w, top in reversed(tops)}.values())[::-1]  # all the data: once will do
    parts = [f"{whole(math.floor(top))} wastes at most {percent(w)}" for w, top in sure if top >= 1]
    if not parts:
        return "If only examples matter, not time: batch 1; no larger one is sure to waste less than 20 %."
    return f"If only examples matter, not time: a small batch; up to {', up to '.join(parts)}."


def _batch_in_use(batch: int, ends: tuple[float, float], near: BatchRange) -> str:
    more = band([examples_ratio(batch, b) - 1 for b in ends])
    steps = band([steps_ratio(batch, b) for b in ends])
    waste = percents(more) if more[0] > 0 else f"at most {percent(more[1])}"
    if math.isinf(more[1]):
        waste = f"at least {percent(more[0])}"
    many = counts(steps)
    if math.isinf(steps[1]):
        many = f"at least {format_count(steps[0])}"
    text = (
        f"The batch of {batch} in use takes {waste} more examples than the fewest, {many} × the fewest steps."
    )
    exchange = f"From there, 1 % fewer steps cost {_exchange(more)} more examples."
    return f"{text} {_place(batch, near)} {exchange}"


def _place(batch: int, near: BatchRange) -> str:
    """Say where the batch in use lies against the range for the stated price."""
    low, high = _shown(near)
    if _smallest(near) and batch == 1:
        return "It is the smallest there is: no need to change it."
    if batch < low:
        return "It is below the range above: a larger one would pay at that price."
    if batch > high:
        return "It is above the range above: a smaller one would pay at that price."
    if near.sure is not None and near.sure[0] <= batch <= near.sure[1]:
        return "It is well within the range above: no need to change it at that price."
    if math.isinf(near.high):
        return "It is above the lower end of the range above; whether it is too large is not known."
    return "It is within the range above."


def _exchange(waste: tuple[float, float]) -> str:
    """Give the price of steps in examples at a batch, d ln E / d ln S = −B/B_crit: percent for a percent."""
    low, high = (f"{format_count(x)} %" for x in waste)
    if math.isinf(waste[1]):
        return f"at least {low}"
    return f"at most {high}" if waste[0] == 0 else high if low == high else f"{low} … {high}"


def _transfer(rate: float, batch: int, target: int, ends: tuple[float, float]) -> str:
    """Say what each learning-rate law makes of the step from one batch to another."""
    parts = []
    for name, law in LAWS.items():
        low, high = band([rate * law(target, batch, b) for b in ends])
        value = f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} … {high:.2g}"
        parts.append(f"{value} ({name})")
    apart = format_count(spread(target, batch, ends))
    return (
        f"Learning rate {rate:.3g} at batch {batch} becomes at batch {target}: {', '.join(parts)}. "
        f"{LAWS_CAVEAT}; the laws differ from each other by up to {apart}×."
    )


def remarks(estimate: Estimate, batch: int, table: tuple[Row, ...], data: int | None = None) -> list[str]:
    """Say what makes this advice less certain than it looks."""
    found = []
    seen = 0.0 if estimate.steps is None else (estimate.steps[1] + 1) * estimate.examples_per_step
    if data is not None and seen >= data + estimate.examples_per_step:
        found.append(
            f"by the last of these steps {format_count(seen)} examples had been seen, of {data:,} in the "
            "data: what comes again is no new draw, and the number is of these examples, not of new ones. "
            "Measure in the first epoch, or probe with fresh data."
        )
    ends = (estimate.low, estimate.high)
    apart = {row.batch_size: spread(row.batch_size, batch, ends) for row in table if row.learning_rates}
    if apart and max(apart.values()) > DISAGREE:
        agree = [b for b, s in apart.items() if s <= DISAGREE]
        where = "at every batch in the table"
        if agree:
            where = f"outside batch {counts((agree[0], agree[-1]))}"
        worst = max(apart, key=lambda b: apart[b])
        found.append(
            f"the learning-rate laws disagree by more than {DISAGREE:g}× {where} (up to "
            f"{format_count(apart[worst])}× at {worst}): there, try several learning rates instead of "
            "trusting one law."
        )
    if not euclidean(estimate):
        found.append(
            f"this noise scale is {in_metric(estimate.metric)}: the ranges take it as if it were the plain "
            "one. What was found beside measured critical batch sizes is of the plain one, and is left out."
        )
    if batch > estimate.high:
        found.append(
            f"the batch of {batch} in use is above the whole interval, and readings taken above the critical "
            "batch size calibrate badly."
            f"{' For a surer reading, not for training, take a smaller batch.' if batch > 1 else ''}"
        )
    if estimate.coverage is not None and estimate.coverage < 1:
        found.append(f"only {100 * estimate.coverage:.3g} % of the trainable numbers are in the sums.")
    return found
