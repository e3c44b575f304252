"""A noise scale that moves is noticed, one that holds is not accused."""

import numpy as np

from gns.drift import drift
from gns.estimate import MIN_STEPS
from gns.report.text import movement, render
from gns.sums import StepSums


def steps(scales, n=16, d=32, seed=0):
    """One step a noise scale: Gaussian per-example gradients around a mean of the fitting length."""
    rng = np.random.default_rng(seed)
    made = []
    for k, b in enumerate(scales):
        g = np.sqrt(1 / b) + rng.normal(size=(n, d))  # tr Σ = d, |G|² = d/b
        made.append(StepSums(k, n, float((g**2).sum(1).mean()), float((g.mean(0) ** 2).sum())))
    return made


def test_a_rise_and_a_fall_are_noticed_and_said():
    up = drift(steps(np.linspace(4, 100, 120)))
    assert up.moved and "rose" in str(up)
    assert up.first.steps == (0, 39) and up.last.steps == (80, 119)
    down = drift(steps(np.linspace(100, 4, 120)))
    assert down.moved and "fell" in str(down)
    assert "go by the later part" in movement(up)
    assert "moved during the run" in render(up.first, change=up)


def test_a_rise_out_of_sight_is_noticed():
    assert drift(steps([4] * 40 + [4] * 40 + [1e9] * 40)).moved


def test_a_constant_noise_scale_is_accused_in_fewer_than_one_run_in_fifty():
    accused = sum(drift(steps([20] * 90, seed=s)).moved for s in range(100))
    assert accused <= 4  # at 1 % the chance of more is 0.3 %, and seeds are fixed
    held = drift(steps([20] * 90))
    assert movement(held) is None and "held" in str(held)


def test_too_short_a_run_says_nothing():
    assert drift(steps([4] * (3 * MIN_STEPS - 1))) is None
    assert movement(None) is None
