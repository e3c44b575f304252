"""Whether the noise scale moved along a run, so that one average over it would mislead."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gns.estimate import MIN_STEPS, Estimate, estimate, format_count
from gns.sums import StepSums


@dataclass(frozen=True)
class Drift:
    """The first and the last third of a run, measured apart.

    Args:
        first: estimate over the first third of the usable steps.
        last: over the last third.
    """

    first: Estimate
    last: Estimate

    @property
    def moved(self) -> bool:
        """Whether the two confidence sets do not meet: at 95 % each, under 1 % by chance alone.

        Sets over too few or too uneven steps ("collecting") are not trusted to say so.
        """
        trusted = "collecting" not in (self.first.status, self.last.status)
        return trusted and (self.first.high < self.last.low or self.last.high < self.first.low)

    @property
    def direction(self) -> str | None:
        """Give "rising" or "falling"; None where it did not move."""
        if not self.moved:
            return None
        return "rising" if self.first.high < self.last.low else "falling"

    @property
    def span(self) -> str:
        """Name the part of the run that speaks for what comes next."""
        steps = self.last.steps
        return "the last third of the run" + (f", steps {steps[0]}–{steps[1]}" if steps else "")

    def __str__(self) -> str:
        word = {"rising": "rose", "falling": "fell", None: "held"}[self.direction]
        return f"it {word}, from {_span(self.first)} to {_span(self.last)}"


def _span(part: Estimate) -> str:
    where = "" if part.steps is None else f" in steps {part.steps[0]}–{part.steps[1]}"
    return f"{format_count(part.low)} … {format_count(part.high)}{where}"


def drift(steps: Iterable[StepSums], *, level: float = 0.95) -> Drift | None:
    """Compare the first with the last third of a run.

    The ratio of averages over a whole run is a mean of B weighted by |G|², so it leans towards the part where
    the gradient is largest, as a rule the beginning.

    Args:
        steps: records of steps, oldest first.
        level: nominal coverage of each third's set.

    Returns:
        The comparison, or None with fewer than `MIN_STEPS` usable steps in a third.
    """
    usable = [step for step in steps if step.usable]
    third = len(usable) // 3
    if third < MIN_STEPS:
        return None
    return Drift(estimate(usable[:third], level=level), estimate(usable[-third:], level=level))
