"""The course of one run: its losses, its evaluations, and whether it is over, for whatever engine makes it.

An engine tells it of every optimizer step and of every evaluation, and asks whether an evaluation is due and
whether to go on. So all engines agree on what a diverged run is and where a target is reached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from experiments.configs import RunConfig
from experiments.schedules import evaluation_steps

# Times the validation loss of the start: a choice, no level is sharp. A run this far up has unlearned the
# base and loses its sweep whatever it does later; a lower level would cut off those that overshoot at first.
DIVERGED = 3.0


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on the validation split.

    Args:
        step: optimizer steps before it.
        examples: examples seen before it.
        loss: nats per token.
    """

    step: int
    examples: int
    loss: float


@dataclass
class Course:
    """What is known of a run on its way.

    Args:
        config: of the run.
        train_loss: of each step, nats per token over all its examples, before the step.
        evaluations: so far, the first one before the first step.
        examples: seen so far, repeats included.
        tokens: seen so far with a loss, repeats included.
        diverged: a loss was not finite, or an evaluation above `DIVERGED` times the first.
    """

    config: RunConfig
    train_loss: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    examples: int = 0
    tokens: int = 0
    diverged: bool = False

    def __post_init__(self) -> None:
        self._due = frozenset(evaluation_steps(self.config))

    @property
    def steps(self) -> int:
        """Optimizer steps made."""
        return len(self.train_loss)

    @property
    def due(self) -> bool:
        """Whether the validation split is to be evaluated now; after a loss that is not finite, no more."""
        return not self.diverged and (self.steps == 0 or self.steps in self._due)

    @property
    def over(self) -> bool:
        """Whether to make no further step."""
        return self.diverged or self.crossing is not None or self.steps >= self.config.n_steps

    def stepped(self, loss: float, examples: int, tokens: int) -> None:
        """Hear of an optimizer step: its loss, its examples and their tokens with a loss."""
        self.train_loss.append(loss)
        self.examples += examples
        self.tokens += tokens
        self.diverged |= not math.isfinite(loss)

    def evaluated(self, loss: float) -> None:
        """Hear of the validation loss after the steps so far."""
        self.evaluations.append(Evaluation(self.steps, self.examples, loss))
        limit = DIVERGED * self.evaluations[0].loss
        self.diverged |= not math.isfinite(loss) or loss > limit

    @property
    def crossing(self) -> tuple[float, float] | None:
        """(steps, examples) at which the target was reached, interpolated; None: not yet, or no target."""
        target = self.config.target_loss
        return None if target is None else crossing(self.evaluations, target)

    def row(self) -> dict[str, Any]:
        """Give what a row says of the course; five digits of a training loss, all of an evaluation."""
        step, examples = self.crossing or (None, None)
        return {
            "status": "diverged" if self.diverged else "done",
            "steps_done": self.steps,
            "examples_seen": self.examples,
            "tokens_seen": self.tokens,
            "train_loss": [float(f"{loss:.5g}") for loss in self.train_loss],
            "validation": [
                {"step": e.step, "examples": e.examples, "loss": e.loss} for e in self.evaluations
            ],
            "target_step": step,
            "target_examples": examples,
        }


def crossing(evaluations: list[Evaluation], target: float) -> tuple[float, float] | None:
    """Say where the lowest loss so far reaches a target.

    Between two evaluations the running minimum is taken as linear in the logarithm of the examples; from the
    start, which has no logarithm, as linear in the examples.

    Args:
        evaluations: of one run, in their order.
        target: nats per token.

    Returns:
        (steps, examples), not whole numbers as a rule; None where it is not reached.
    """
    lowest = math.inf
    for before, now in zip([None, *evaluations], evaluations, strict=False):
        if now.loss <= target:
            if before is None:
                return float(now.step), float(now.examples)
            share = (lowest - target) / (lowest - now.loss)
            return _between(before.step, now.step, share), _between(before.examples, now.examples, share)
        lowest = min(lowest, now.loss)
    return None


def _between(low: int, high: int, share: float) -> float:
    """Interpolate, in the logarithm where there is one."""
    return low * (high / low) ** share if low > 0 else high * share
