"""A noise scale that moves is noticed, one that holds is not accused."""

import math
from dataclasses import replace

import numpy as np
import pytest

from gns.advice import advise
from gns.estimate import MIN_STEPS, estimate, format_count
from gns.report.text import movement, render, verdict
from gns.statistics.drift import drift
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


def test_the_verdict_of_a_run_that_moved_does_not_rest_on_its_average():
    moving, still = steps(np.linspace(4, 100, 120)), steps([20] * 120)
    result, change = estimate(moving), drift(moving)
    said = verdict(result, change)
    assert said.title == f"Noise scale ≈ {format_count(result.b_simple)} examples on average, and rising"
    assert said.tone == "open" and said.sure == movement(change) and "95 % sure that" not in said.sure
    assert "the last third of the run, steps 80–119" in said.meaning
    assert verdict(estimate(moving[::-1]), drift(moving[::-1])).title.endswith("and falling")
    assert verdict(estimate(still), drift(still)) == verdict(estimate(still))


@pytest.mark.parametrize("status", ["lower bound", "not detectable"])
def test_a_bound_that_moved_says_so_too(status):
    change = drift(steps([4] * 40 + [4] * 40 + [1e9] * 40))
    said = verdict(replace(change.last, status=status, high=math.inf), change)
    assert said.title.endswith("on average, and rising") and said.sure == movement(change)
    assert "at least" in said.meaning


def test_thirds_too_uneven_to_trust_accuse_nobody():
    change = drift(steps(np.linspace(4, 100, 120)))
    assert change.moved
    assert not replace(change, last=replace(change.last, status="collecting")).moved


def test_advice_goes_by_the_last_third_of_a_run_that_moved():
    moving = steps(np.linspace(4, 100, 120))
    result, change = replace(estimate(moving), coverage=0.5), drift(moving)
    advice = advise(result, batch_size=16, change=change)
    plain = advise(replace(change.last, coverage=0.5), batch_size=16)
    assert (advice.table, advice.ranges, advice.sentences) == (plain.table, plain.ranges, plain.sentences)
    assert (advice.low, advice.high, advice.warnings) == (plain.low, plain.high, plain.warnings)
    assert advice.span == "the last third of the run, steps 80–119" and plain.span is None
    assert str(advice).splitlines()[1] == movement(change) == advice.moved
    held = drift(steps([20] * 90))
    assert advise(held.last, batch_size=16, change=held) == advise(held.last, batch_size=16)
    early = replace(result, status="collecting")
    assert advise(early, batch_size=16, change=change) == advise(early, batch_size=16)


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
