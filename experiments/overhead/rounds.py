"""Interleaved timing: U a U b U c U …, every step of an arm between two untouched ones.

An arm's time is divided by the mean of the untouched step before and the one after it, so that a machine
that gets slower or faster in between hardly shows. The order of the arms is drawn anew for each round: none
always follows the same other one. Python's collector is off while the clock runs, and runs between rounds.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from experiments.overhead.arms import Arm

LEAST = 5  # rounds, however long a step takes


@dataclass
class Times:
    """What was seen of one arm.

    Args:
        arm: seconds of its steps.
        untouched: of each, the mean of the untouched step before and after it.
        peak: on CUDA, most bytes allocated during a step of it.
        error: why it has been left out since, if it has.
    """

    arm: list[float] = field(default_factory=list)
    untouched: list[float] = field(default_factory=list)
    peak: int = 0
    error: Exception | None = None


@dataclass
class Found:
    """Times of each arm, and all untouched steps in their order."""

    arms: list[Times]
    plain: list[float] = field(default_factory=list)
    peak: int = 0

    def itself(self) -> Times:
        """The untouched steps beside themselves: each beside the mean of the one before and the one after it.

        Needs no steps of its own. What lies between them is an arm's step each, so that it scatters at least
        as much as a loop of its own would.
        """
        around = zip(self.plain, self.plain[2:], strict=False)
        return Times(self.plain[1:-1], [(before + after) / 2 for before, after in around], self.peak)


def rounds(
    base: Arm,
    arms: Sequence[Arm],
    data: Sequence[torch.Tensor],
    *,
    pairs: int,
    least: int = LEAST,
    seconds: float = math.inf,
    slots: Mapping[int, int] | None = None,
) -> Found:
    """Time every arm between untouched steps, round after round.

    Args:
        base: the untouched loop, warm.
        arms: warm; one that raises is left out from then on.
        data: batches.
        pairs: rounds.
        least: so many of them, however long they take.
        seconds: no further round starts of which less than a half would lie within them.
        slots: place of an arm → times that it comes in a round, if not once.

    Returns:
        Seconds of each step.
    """
    drawn, found = random.Random(0), Found([Times() for _ in arms])
    places = [place for place in range(len(arms)) for _ in range((slots or {}).get(place, 1))]
    until = time.monotonic() + seconds
    with _collector_off():
        before = _untouched(base, data[0], found)
        start = time.monotonic()
        for i in range(pairs):
            ids = data[i % len(data)]
            for place in drawn.sample(places, len(places)):
                times = found.arms[place]
                if times.error is not None:
                    continue
                try:
                    spent, peak = timed(arms[place], ids)
                except Exception as error:  # a peer that cannot do it is a result
                    times.error = error
                    continue
                after = _untouched(base, ids, found)
                times.arm.append(spent)
                times.untouched.append((before + after) / 2)
                times.peak = max(times.peak, peak)
                before = after
            gc.collect()
            now = time.monotonic()
            if i + 1 >= least and now + (now - start) / (i + 1) / 2 > until:
                break
    return found


def timed(arm: Arm, ids: torch.Tensor) -> tuple[float, int]:
    """Seconds of one step, and on CUDA the most bytes allocated during it."""
    cuda = ids.is_cuda
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    arm.step(ids)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() if cuda else 0


def _untouched(base: Arm, ids: torch.Tensor, found: Found) -> float:
    seconds, peak = timed(base, ids)
    found.plain.append(seconds)
    found.peak = max(found.peak, peak)
    return seconds


@contextmanager
def _collector_off() -> Generator[None]:
    """What is alive now is not looked at again, so that a collection between rounds is short."""
    was = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was:
            gc.enable()
