"""Which batch reaches a loss soonest on a machine of measured speed. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gns.advising.tradeoff import band


@dataclass(frozen=True)
class Goodput:
    """Useful examples a second at one batch size: throughput × (φ + B₀)/(φ + B), φ the noise scale.

    The time to a given loss is E(B)/throughput(B) ∝ (1 + B/φ)/throughput(B), so the batch of most goodput is
    the one that gets there soonest.

    Args:
        batch_size: B, examples a step.
        examples_per_second: measured.
        useful: goodput at the two ends of the interval, (at low, at high).
        seconds: time to the target as a band, or None where the examples it takes are unknown.

    Source: Qiao et al. 2021 (Pollux, OSDI), eq. (4)–(6), B₀ the batch in use.
    """

    batch_size: int
    examples_per_second: float
    useful: tuple[float, float]
    seconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Soonest:
    """The batch, among those timed, that is soonest at the given loss.

    Args:
        batch_size: whose worst delay over the interval is the least.
        delay: the most by which it is later than the best timed batch, over the interval; 0.03 is 3 %.
        ends: the soonest at the interval's two ends, rising.
        in_use: by how much the batch in use is later than the best, as a band; None where it was not timed.
        at_edge: "smallest" or "largest" if the pick is the first or last of several that were timed, where a
            batch beyond might be sooner still; else None.
    """

    batch_size: int
    delay: float
    ends: tuple[int, int]
    in_use: tuple[float, float] | None
    at_edge: str | None


def goodputs(
    speeds: Mapping[int, float],
    reference: int,
    ends: tuple[float, float],
    examples_needed: float | None = None,
) -> tuple[Goodput, ...]:
    """Work out goodput at each timed batch, smallest first.

    Args:
        speeds: batch size → examples a second.
        reference: B₀ in use.
        ends: interval of the noise scale, examples.
        examples_needed: examples that the target takes at B₀; then the seconds follow.
    """
    found = []
    for batch, speed in sorted(speeds.items()):
        low, high = (speed if math.isinf(b) else speed * (b + reference) / (b + batch) for b in ends)
        seconds = None if examples_needed is None else band([examples_needed / low, examples_needed / high])
        found.append(Goodput(int(batch), float(speed), (low, high), seconds))
    return tuple(found)


def soonest(timed: tuple[Goodput, ...], reference: int) -> Soonest | None:
    """Choose the batch whose worst delay over the interval is least; None without a timed batch.

    The ratio of two batches' goodputs is monotone in φ. The delay of a batch is the largest of such
    ratios, so over an interval it is largest at one of the ends.
    """
    if not timed:
        return None
    best = [max(g.useful[end] for g in timed) for end in (0, 1)]
    delays = {g.batch_size: [best[end] / g.useful[end] - 1 for end in (0, 1)] for g in timed}
    pick = min(delays, key=lambda b: (max(delays[b]), b))
    first = [max(timed, key=lambda g: g.useful[end]).batch_size for end in (0, 1)]
    in_use = band(delays[reference]) if reference in delays else None
    edge = None
    if len(timed) > 1:
        edge = {timed[0].batch_size: "smallest", timed[-1].batch_size: "largest"}.get(pick)
    return Soonest(pick, max(delays[pick]), (min(first), max(first)), in_use, edge)
