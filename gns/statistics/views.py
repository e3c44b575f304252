"""Other averages of the same recorded steps, each named: windows, exponential weights, progress weights.

`estimate` gives the ratio of averages over all steps, a mean of B weighted by |G|². Where B moves during a
run, that leans towards the part with the largest gradient, as a rule the beginning. These views say other
things about the same steps, after the fact; each has a set and a status of its own, made in the same way,
with the effective number of steps (Kish, 1/Σw²) in its degrees of freedom.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from gns.estimate import Estimate, format_count, groups_of, summarise, usable_of, with_groups
from gns.sums import StepSums

# steps on each side, or 1/20 of the run if that is more, that tell the progress weight of one
NEIGHBOURS = 10


def windows(
    steps: Iterable[StepSums], size: int, *, every: int | None = None, level: float = 0.95
) -> list[tuple[int, Estimate]]:
    """Estimate each window of so many usable steps.

    Each set holds for its window alone, not for all of them together.

    Args:
        steps: records of steps, oldest first; those that carry a `reason` are left out.
        size: usable steps in a window; `MIN_STEPS` or more for a status other than "collecting".
        every: usable steps from one window to the next; by default `size`, so that windows do not overlap.
        level: nominal coverage of each set.

    Returns:
        (number of the window's last step, its estimate), oldest first. The windows are laid from the end, so
        that the last one ends with the last step; up to `every` − 1 early steps are in none.

    Raises:
        ValueError: `size` or `every` is below 1, `level` outside (0, 1), or the metrics are mixed.
        TypeError: `steps` holds something else than `StepSums`.
    """
    every = size if every is None else every
    for name, value in (("size", size), ("every", every)):
        if value < 1:
            raise ValueError(f"{name} is {value}; 1 or more steps are needed")
    usable, _ = usable_of(steps, level)
    ends = range(len(usable), size - 1, -every)
    view = f"ratio of averages in a window of {size} steps"
    return [
        (
            usable[end - 1].step,
            with_groups(usable[end - size : end], 0, lambda part: summarise(part, level=level, view=view)),
        )
        for end in reversed(ends)
    ]


def exponential(steps: Iterable[StepSums], half_life: float, *, level: float = 0.95) -> Estimate:
    """Estimate with weights that halve every so many steps into the past.

    Numerator and denominator are averaged with the same weights 2^(−age/half_life), then divided; averages
    are normalised by the sum of their weights, so that a short run is not pulled to 0. The effective number
    of steps is at most 2.9 half-lives: from a half-life of 7 on, a status other than "collecting" is
    possible.

    Args:
        steps: records of steps, oldest first; those that carry a `reason` are left out.
        half_life: in usable steps.
        level: nominal coverage of the set.

    Returns:
        The estimate; `trace_sigma` and `grad_sq_norm` are the weighted averages of both, in
        (loss / parameter)².

    Raises:
        ValueError: `half_life` is not positive, `level` outside (0, 1), or the metrics are mixed.
        TypeError: `steps` holds something else than `StepSums`.
    """
    if not half_life > 0:
        raise ValueError(f"half_life is {half_life}; a number of steps above 0 is needed")
    usable, skipped = usable_of(steps, level)

    def weighted(part: list[StepSums]) -> Estimate:
        weights = 0.5 ** (np.arange(len(part))[::-1] / half_life)
        view = f"ratio of averages weighted by half every {half_life:g} steps"
        return summarise(part, level=level, weights=weights, view=view)

    return with_groups(usable, skipped, weighted)


def progress_weighted(
    steps: Iterable[StepSums], *, batch_size: float | None = None, level: float = 0.95
) -> Estimate:
    """Estimate the run's mean of B_k, weighted by the progress of step k, to set beside a critical batch.

    A step at batch B_train makes 1/(1 + B_k/B_train) of the progress of one without noise, so that is the
    weight ω_k of B_k. With E q_k = |G_k|² + tr Σ_k / B_train, the expected squared norm of a gradient over
    B_train examples, ω_k = |G_k|² / E q_k, and so

        Σ ω_k B_k / Σ ω_k = Σ (tr Σ_k / E q_k) / Σ (|G_k|² / E q_k):

    again a ratio of averages, with weights 1/E q_k; no B_k of a single step is formed. E q_k comes from the
    `NEIGHBOURS` on each side of step k without k itself, so that its errors are not those of the step it
    weighs; what they do to the sums is in the variance, to first order.

    Simulated (400 runs a cell, 1/j, steps of 16): where B_simple grows 3 or 30 times from 5, 20 or 100 over
    100 or 300 steps, the 95 % set covers the weighted mean of the true B_k in 94–98 % of runs; where it falls
    30 times, 92–97 %, but 78 % from 5 over 100 steps, and less where the whole run is hardly longer than the
    neighbours: |G|² must not change much over 20 steps.

    Args:
        steps: records of steps, oldest first; those that carry a `reason` are left out.
        batch_size: B_train, examples; by default the mean of the steps.
        level: nominal coverage of the set.

    Returns:
        The estimate; `trace_sigma` and `grad_sq_norm` are the weighted averages of both, in the unit of
        (loss / parameter)². A group whose E q_k is not resolved, or that has no gradient, is left out.

    Raises:
        ValueError: `batch_size` is not positive, or so large that E q_k is not resolved: its estimate is
            negative somewhere; `level` outside (0, 1), or the metrics are mixed.
        TypeError: `steps` holds something else than `StepSums`.

    Source: McCandlish et al. 2018, arXiv:1812.06162, eq. (2.7) and appendix D.
    """
    if batch_size is not None and not batch_size > 0:
        raise ValueError(f"batch_size is {batch_size}; a number of examples above 0 is needed")
    usable, skipped = usable_of(steps, level)
    size = batch_size or float(np.mean([s.n_examples for s in usable] or [1]))

    def weighted(part: list[StepSums]) -> Estimate:
        view = f"progress-weighted mean of B at batch {format_count(size)}"
        if len(part) < 2:
            return summarise(part, level=level, view=view)
        expected, influence = _expected_sq_norm(part, size)
        return summarise(part, level=level, weights=1 / expected, influence=influence, view=view)

    found, groups = weighted(usable), {}
    for name, part in groups_of(usable).items():
        with contextlib.suppress(ValueError):  # E q_k of this group is not resolved
            groups[name] = weighted(part)
    return replace(found, groups=groups, n_skipped=skipped)


def _expected_sq_norm(
    steps: list[StepSums], batch_size: float
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Give Q_k, the smoothed E q_k of each step, [K], and the influence of each step on Σ x/Q and Σ y/Q.

    Q_k = ȳ_k + x̄_k/B of the neighbours. An error δq of one step moves the weights of its neighbours, and so
    Σ x/Q by −(x̄/Q²) δq to first order: its influence is that of x'_k = x_k − (x̄_k/Q_k)(q_k − Q_k) with
    q_k = y_k + x_k/B, and y' likewise. (Averaging x' and y' themselves would bias |G|² by Var ȳ_k / Q_k.)
    """
    n = np.array([s.n_examples for s in steps], dtype=np.float64)
    x, y = np.array([s.trace_sigma for s in steps]), np.array([s.grad_sq_norm for s in steps])
    reach = min(max(NEIGHBOURS, len(steps) // 20), len(steps) - 1)
    near_x, near_y = (_neighbours(v, w, reach) for v, w in ((x, n - 1), (y, n * (n - 1))))
    expected = near_y + near_x / batch_size
    if not (expected > 0).all():
        worst = int(np.argmin(expected))
        raise ValueError(
            f"batch_size is {batch_size:g}: the squared gradient norm expected at that batch around step "
            f"{steps[worst].step} is estimated as {expected[worst]:.3g}, and above 0 is needed. |G|² is not "
            f"resolved well enough for so large a batch; the steps' own size is {format_count(n.mean())}"
        )
    excess = (y + x / batch_size) / expected - 1
    return expected, (x - near_x * excess, y - near_y * excess)


def _neighbours(values: np.ndarray, weights: np.ndarray, reach: int) -> np.ndarray:
    """Weighted mean over up to `reach` entries before and after each one, [K], without that one."""
    kernel = np.ones(2 * reach + 1)
    kernel[reach] = 0
    total = np.convolve(values * weights, kernel)[reach : reach + len(values)]
    return total / np.convolve(weights, kernel)[reach : reach + len(values)]
