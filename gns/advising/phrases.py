"""Advice in sentences on what surrounds the batch: wall-clock time, the epoch, the adapters, more data."""

from __future__ import annotations

import math

from gns.advising.capacity import BITS_PER_PARAMETER, WHOLE, Capacity, StepCost
from gns.advising.epoch import EpochPlan
from gns.advising.goodput import Goodput, Soonest
from gns.advising.tradeoff import band, examples_ratio
from gns.estimate import Estimate, format_count

POOLED = "all pairs"  # in the view of an estimate from `gns.probe`


def percent(x: float) -> str:
    """Write a share as a percentage; from ten times on, as a multiple."""
    return f"{format_count(x)} ×" if x >= 10 else f"{100 * x:.0f} %" if x >= 0.01 else f"{100 * x:.1g} %"


def percents(ends: tuple[float, float]) -> str:
    """Write a band of shares, as one where both ends read alike.

    >>> percents((0.163, 0.164)), percents((0.09, 0.16))
    ('16 %', '9 % … 16 %')
    """
    low, high = (percent(x) for x in ends)
    return low if low == high else f"{low} … {high}"


def counts(ends: tuple[float, float]) -> str:
    """Write a band of counts, as one where both ends read alike."""
    low, high = (format_count(x) for x in ends)
    return low if low == high else f"{low} … {high}"


def steps_of(count: int) -> str:
    """Write a number of optimizer steps."""
    return f"{count:,} optimizer step{'s' if count != 1 else ''}"


def whole(batch: float) -> str:
    """Write a batch size: no less than 1 exists."""
    return format_count(max(1.0, float(round(batch))) if math.isfinite(batch) else batch)


def span(ends: tuple[float, float]) -> str:
    """Write an interval of counts."""
    return f"{format_count(ends[0])} … {format_count(ends[1])}"


def duration(seconds: float) -> str:
    """Write a time with the digits a reader can use.

    >>> duration(41.6), duration(610), duration(9000), duration(400_000)
    ('42 s', '10 min', '2.5 h', '4.6 days')
    """
    for size, name in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {name}"
    return f"{seconds:.2g} s"


def bits(count: float) -> str:
    """Write a number of bits.

    >>> bits(310_000), bits(2.44e9)
    ('310 kbit', '2.4 Gbit')
    """
    for size, name in ((1e9, "Gbit"), (1e6, "Mbit"), (1e3, "kbit")):
        if count >= size:
            return f"{format_count(count / size)} {name}"
    return f"{format_count(count)} bit"


def soonest(best: Soonest, timed: tuple[Goodput, ...], batch: int) -> list[str]:
    """Say which of the timed batches reaches a given loss soonest."""
    which = f"{best.ends[0]}" if best.ends[0] == best.ends[1] else f"{best.ends[0]} … {best.ends[1]}"
    lines = [f"On this machine the soonest in wall-clock time among the batches timed: {which}."]
    if best.ends[0] != best.ends[1]:
        late = percent(best.delay)
        lines.append(
            f"{best.batch_size} is at most {late} later than the soonest, wherever the noise scale is."
        )
    if best.in_use is not None and best.batch_size != batch:
        late = percents(best.in_use)
        lines.append(f"The batch of {batch} in use takes {late} longer than the soonest to the same loss.")
    seconds = next((g.seconds for g in timed if g.batch_size == best.batch_size), None)
    if seconds is not None:
        least, most = (duration(x) for x in seconds)
        took = least if least == most else f"{least} … {most}"
        lines.append(f"The loss aimed at takes about {took} of training at batch {best.batch_size}.")
    if best.at_edge:
        beyond = {"smallest": "smaller", "largest": "larger"}[best.at_edge]
        lines.append(
            f"{best.batch_size} is the {best.at_edge} batch timed: a {beyond} one may be sooner still."
        )
    return lines


def one_epoch(plan: EpochPlan, target: int, ends: tuple[float, float]) -> list[str]:
    """Say what one epoch holds at the proposed batch and at the one in use, and which batch it can afford."""
    data, batch = plan.dataset_size, plan.batch_size
    steps = math.ceil(data / target)
    lines = [
        f"One epoch of {data:,} examples at batch {target} is {steps_of(steps)} of "
        f"{percent(target / data)}{' each' if steps > 1 else ''}. {_useful(target, ends)}"
    ]
    if target != batch:
        lines.append(f"At batch {batch} it is {steps_of(math.ceil(data / batch))}. {_useful(batch, ends)}")
    lines.append(_affordable(plan))
    return lines


def _useful(batch: int, ends: tuple[float, float]) -> str:
    """Say how far an epoch gets at a batch, against small batches."""
    useful = band([1 / examples_ratio(batch, b) for b in ends])
    share = f"at least {percent(useful[0])}" if math.isinf(ends[1]) else percents(useful)
    return f"It gets as far as small batches would with {share} of the data."


def _affordable(plan: EpochPlan) -> str:
    """Say the largest batch with which one epoch reaches the target."""
    if plan.largest is None or plan.largest_doubled is None or plan.examples_needed is None:
        return (
            "How large a batch one epoch can afford depends on the loss aimed at: say how many examples that "
            f"loss takes at batch {plan.batch_size} (`examples_needed`, `--examples-needed`), and it is "
            "worked out."
        )
    data = plan.dataset_size
    start = (
        f"A loss that takes {format_count(plan.examples_needed)} examples at batch {plan.batch_size} is "
        f"reached in one epoch of {data:,}"
    )
    low, high = plan.largest
    if high < 1:
        return f"{start} at no batch: more data, or more than one epoch, is needed."
    if low < 1:
        return f"{start} with batches up to {_batch(high, data)} at best, and perhaps at none."
    top = _batch(low, data)
    if math.isinf(high):
        top = f"{top}, perhaps far larger ones"
    elif _batch(high, data) != top:
        top = f"{top}, perhaps up to {_batch(high, data)}"
    more = plan.largest_doubled[0] / low if math.isfinite(low) else math.nan
    grow = f" (twice the data: {format_count(more)} × that)" if more > 1 and low < data else ""
    return f"{start} with batches up to {top}{grow}."


def _batch(batch: float, data: int) -> str:
    """Write a largest batch; beyond the data there is none."""
    return whole(math.floor(batch)) if batch < data else "all the data at once"


def room(known: Capacity) -> str:
    """Say whether the adapters hold what the data teach."""
    held = f"{bits(known.adapter_bits)} ({BITS_PER_PARAMETER:g} for each of {known.parameters:,} parameters)"
    seen = "epoch"
    if known.share < WHOLE:
        seen = f"{percent(known.share)} of an epoch, as if the rest were like it"
    start = (
        f"The data carry at most {bits(known.data_bits)} (log-loss of the first {seen}); the adapters hold "
        f"about {held}, a rule of thumb (Schulman 2025)"
    )
    if known.fits:
        return f"{start}: they have room for {format_count(1 / known.load)} × as much."
    return (
        f"{start}: {format_count(known.load)} × too much. LoRA may fall behind full fine-tuning before the "
        "epoch is over; a larger rank holds more, in proportion."
    )


def step_cost(cost: StepCost) -> str:
    """Say what a step costs, LoRA against full fine-tuning."""
    return (
        f"A training step of LoRA takes {100 * cost.ratio:.0f} % of the multiply-adds of full fine-tuning in "
        f"the adapted matrices: {format_count(cost.lora)} against {format_count(cost.full)} a token "
        "(2·I·O + 3·R·(I + O) against 3·I·O for a matrix I×O with rank R)."
    )


def know_more(estimate: Estimate, *, sure: bool) -> tuple[str, ...]:
    """Say what to measure next; nothing where the range of batch sizes is sure.

    Args:
        estimate: with a confidence set.
        sure: whether some batch is worth its price wherever in the interval the noise scale is.
    """
    if math.isfinite(estimate.high):
        return () if sure else (f"To name a range that is sure, measure on. {estimate.outlook()}",)
    known = not math.isnan(estimate.detection_limit)
    limit = f", now {format_count(estimate.detection_limit)} examples," if known else ""
    if POOLED in estimate.view:
        return (
            f"To know more, give the probe more examples: the largest noise scale that it can see{limit} "
            f"grows in proportion. {estimate.outlook()}",
        )
    lines = [
        "To know more, measure with a larger batch or more steps: the largest noise scale that can be "
        f"seen{limit} doubles with twice the batch or four times the steps. {estimate.outlook()}"
    ]
    b = estimate.examples_per_step
    if b > 1 and math.isfinite(estimate.detection_limit):
        # all pairs at one point against pairs within steps: √(n²/2) against √(K·b(b − 1)/2)
        gain = math.sqrt(estimate.n_steps * b / (b - 1))
        lines.append(
            "Quicker, without training: `gns probe --adapter RUN` compares all examples with each other, so "
            f"that as many as here ({estimate.n_examples:,}) show noise scales up to about "
            f"{format_count(gain * estimate.detection_limit)}, {format_count(gain)} × as large."
        )
    return tuple(lines)
