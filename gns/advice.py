"""What batch size and learning rate a noise scale speaks for: from an estimate with its interval. Pure.

B_simple stands in for the critical batch size B_crit and for the B_noise of the learning-rate laws; every
text that uses it says so. Every figure is a band, one end for each end of the confidence interval.

Trade-off law: (S/S_min − 1)(E/E_min − 1) = 1 with S optimizer steps and E examples to reach one loss, so

    E/E_min = 1 + B/B_crit        S/S_min = 1 + B_crit/B

Source: McCandlish et al. 2018, arXiv:1812.06162, eq. (2.11), for the law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gns.estimate import MIN_STEPS, Estimate, format_count

WASTE = 0.05  # "about as cheap as it gets": within 5 % of the cheapest
# x + 1/x ≤ 2 + 4·WASTE, the solution for equal prices of time and examples: 0.64 … 1.56, 2.4× wide
_HALF = 1 + 2 * WASTE
NEAR = (_HALF - math.sqrt(_HALF**2 - 1), _HALF + math.sqrt(_HALF**2 - 1))
DISAGREE = 1.5
CAVEATS = (
    "B_simple is not the critical batch size itself: where both were measured, their ratio ran from 0.05 "
    "(autoencoders) to 4.5 (MNIST). Take the range as a place to start, and try half and double.",
    "no published evidence ties the best batch size of LoRA to its gradient noise scale yet.",
    "the noise scale moves with the learning rate and along training: a reading belongs to its settings.",
)


def examples_ratio(batch: float, b_crit: float) -> float:
    """E/E_min = 1 + B/B_crit: examples to reach a loss, relative to the fewest possible."""
    return 1 + (batch / b_crit if b_crit else math.inf)


def steps_ratio(batch: float, b_crit: float) -> float:
    """S/S_min = 1 + B_crit/B: optimizer steps to reach a loss, relative to the fewest possible."""
    return 1 + b_crit / batch


def dearer(batch: float, b_crit: float) -> float:
    """Cost above the cheapest, 0 = cheapest, where S_min steps and E_min examples cost the same.

    (S/S_min + E/E_min)/4 − 1, least at B = B_crit.
    """
    return (steps_ratio(batch, b_crit) + examples_ratio(batch, b_crit)) / 4 - 1


def sgd(batch: float, reference: float, noise_scale: float) -> float:
    """ε(B)/ε(B₀) = (1 + B_noise/B₀)/(1 + B_noise/B): linear far below B_noise, flat far above.

    Source: McCandlish et al. 2018, arXiv:1812.06162, eq. (2.7).
    """
    if math.isinf(noise_scale):
        return batch / reference
    return (1 + noise_scale / reference) / (1 + noise_scale / batch)


def adam_square_root(batch: float, reference: float, noise_scale: float) -> float:
    """ε(B)/ε(B₀) = √(B/B₀), whatever the noise scale."""
    return math.sqrt(batch / reference)


def adam_surge(batch: float, reference: float, noise_scale: float) -> float:
    """ε(B) = 2ε_max/(√(B_n/B) + √(B/B_n)): like √B below B_n, falling above it.

    Source: Li et al. 2024, arXiv:2405.14578; its B_n is fitted from steps and examples, not measured so.
    """
    rise = math.sqrt(batch / reference)
    return rise if math.isinf(noise_scale) else rise * (noise_scale + reference) / (noise_scale + batch)


LAWS: dict[str, Callable[[float, float, float], float]] = {
    "SGD law": sgd,
    "Adam square-root law": adam_square_root,
    "Adam surge law": adam_surge,
}


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
        pick_dearer: the most that `pick` can cost above the cheapest, over the whole interval.
    """

    priced: str
    waste: float
    low: float
    high: float
    sure: tuple[float, float] | None
    pick: int | None = None
    pick_dearer: float | None = None


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

    def __str__(self) -> str:
        marked = [f"Warning: {w}" for w in self.warnings]
        return "\n".join([self.headline, *self.sentences, *marked, *(f"Note: {c}" for c in self.caveats)])


def advise(
    estimate: Estimate,
    *,
    batch_size: int,
    dataset_size: int | None = None,
    throughput: Mapping[int, float] | None = None,
    learning_rate: float | None = None,
) -> Advice:
    """Turn an estimate with its interval into ranges of batch sizes and what they mean.

    Args:
        estimate: of the noise scale.
        batch_size: B₀ in use, examples an optimizer step (all micro-batches, all ranks).
        dataset_size: examples in the data set.
        throughput: measured examples a second at some batch sizes.
        learning_rate: in use at `batch_size`.

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
    nothing_known = estimate.low == 0 and math.isinf(estimate.high)
    if estimate.status == "collecting" or math.isnan(estimate.low) or nothing_known:
        return _too_early(estimate, batch_size)
    return _advise(estimate, batch_size, dataset_size, throughput or {}, learning_rate)


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
        headline=_headline(estimate),
        sentences=tuple(_sentences(estimate, batch, ranges, data, rate, best)),
        table=table,
        ranges=ranges,
        goodput=goodput,
        best_goodput=best,
        warnings=tuple(_warnings(estimate, batch, table)),
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


def _band(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def _row(batch: int, reference: int, ends: tuple[float, float], data: int | None, rate: float | None) -> Row:
    rates = {}
    if rate is not None:
        rates = {name: _band([rate * law(batch, reference, b) for b in ends]) for name, law in LAWS.items()}
    return Row(
        batch,
        _band([steps_ratio(batch, b) for b in ends]),
        _band([examples_ratio(batch, b) for b in ends]),
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
        None if pick is None else max(dearer(pick, low), dearer(pick, high)),
    )
    return (*cheap, near)


def _headline(estimate: Estimate) -> str:
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


def _sentences(
    estimate: Estimate,
    batch: int,
    ranges: tuple[BatchRange, ...],
    data: int | None,
    rate: float | None,
    best: tuple[int, int] | None,
) -> list[str]:
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
    """Say the range where time and examples cost alike."""
    start = "If time and examples both cost (alike):"
    if math.isinf(near.high):
        return f"{start} a batch of at least {_whole(near.low)}; where it stops paying is not known."
    if round(near.high) <= 1:
        return f"{start} batch 1, the smallest there is."
    text = f"{start} a batch of {_whole(near.low)} … {_whole(near.high)}"
    if near.pick is None or near.pick_dearer is None:
        return f"{text}; the lower end is not resolved."
    return f"{text}; {near.pick} is at most {_percent(near.pick_dearer)} dearer than the cheapest there is."


def _only_examples_cost(ranges: tuple[BatchRange, ...]) -> str:
    """Say the upper ends where only examples cost."""
    sure = [(r.waste, r.sure[1]) for r in ranges if r.priced == "examples" and r.sure]
    parts = [f"{_whole(math.floor(top))} wastes at most {_percent(w)}" for w, top in sure if top >= 1]
    if not parts:
        return "If only examples cost (time is free): batch 1; no larger one is sure to waste less than 20 %."
    return f"If only examples cost (time is free): small; a batch of up to {', up to '.join(parts)}."


def _batch_in_use(batch: int, ends: tuple[float, float]) -> str:
    more = _band([examples_ratio(batch, b) - 1 for b in ends])
    steps = _band([steps_ratio(batch, b) for b in ends])
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
        low, high = _band([rate * law(target, batch, b) for b in ends])
        value = f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} … {high:.2g}"
        parts.append(f"{value} ({name})")
    return f"Learning rate {rate:g} at batch {batch} becomes at batch {target}: {', '.join(parts)}."


def _spread(batch: int, reference: int, ends: tuple[float, float]) -> float:
    """How far apart the learning-rate laws are at one batch, largest over smallest, at the worse end."""
    at_each_end = [[law(batch, reference, b) for law in LAWS.values()] for b in ends]
    return max(max(ratios) / min(ratios) for ratios in at_each_end)


def _warnings(estimate: Estimate, batch: int, table: tuple[Row, ...]) -> list[str]:
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
