"""The learning rate of each step, and the steps that evaluate: one definition for all engines."""

from __future__ import annotations

import math

from experiments.configs import RunConfig


def warmup_steps(config: RunConfig) -> int:
    """Steps of the warm-up: its share of all steps, to the nearest whole step."""
    return round(config.warmup * config.n_steps)


def lr_at(config: RunConfig, step: int) -> float:
    """Give the learning rate of one optimizer step, see `scheduled`.

    Args:
        config: of the run; a run that stops at a target has the schedule of the whole run.
        step: from 0; the run has `config.n_steps`.

    Returns:
        The rate; 0 or more also for steps after the last.
    """
    return scheduled(config.schedule, config.lr, step, warmup_steps(config), config.n_steps)


def scheduled(kind: str, lr: float, step: int, warm: int, steps: int) -> float:
    """Give the learning rate of step s of S with a warm-up of w: lr · (s + 1)/w, then what the kind says.

    With u = (s − w)/(S − w): lr for "constant", lr · (1 − u) for "linear", lr · (1 + cos πu)/2 for "cosine".
    So the first step after the warm-up has the full rate, and no step has none: the value at u = 1 would be
    that of step S, which is not made.

    Args:
        kind: "constant", "linear" or "cosine".
        lr: the peak.
        step: s, from 0.
        warm: w.
        steps: S.
    """
    if step < warm:
        return lr * (step + 1) / warm
    if kind == "constant":
        return lr
    done = min(1.0, (step - warm) / max(1, steps - warm))
    if kind == "linear":
        return lr * (1 - done)
    if kind == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * done))
    raise ValueError(f"schedule {kind!r} has no rule; add one to `scheduled`")


def evaluation_steps(config: RunConfig) -> list[int]:
    """Say after how many steps the validation split is evaluated: evenly spread, the last after all steps.

    Without those before the first step; fewer than `config.evals` where the run has fewer steps.
    """
    return sorted({math.ceil(k * config.n_steps / config.evals) for k in range(1, config.evals + 1)})
