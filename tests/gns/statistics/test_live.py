"""The live set: its looks, its spending, and that what it shows at any step is the set of the last look."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, stats

from gns.estimate import estimate
from gns.statistics.live import BEFORE, HORIZON, bounds, level_at, live, looks, spending
from gns.sums import Layout, StepSums, from_rows
from tests.reference import estimators as slow
from tests.reference.tolerances import close

SPECTRUM = 1 / np.arange(1, 65)


def simulated(seed: int, b: float, k: int) -> list[StepSums]:
    m, q = slow.gaussian_steps(np.random.default_rng(seed), SPECTRUM, b, 16, k)
    return [StepSums(i, 16, float(a), float(c)) for i, (a, c) in enumerate(zip(m, q, strict=True))]


def test_looks_grow_by_a_quarter():
    assert looks(19) == [] and looks(20) == [20]
    assert looks(100) == [20, 25, 32, 40, 50, 63, 79, 99]
    assert len(looks(HORIZON)) == 28
    assert all(1.2 < b / a < 1.3 for a, b in zip(looks(10**6)[:-1], looks(10**6)[1:], strict=True))


def test_the_error_is_spent_once():
    spent = spending(0.05, 10_000)
    assert all(s > 0 for s in spent)
    assert sum(spent) == pytest.approx(0.05, rel=1e-4) and sum(spent) < 0.05
    assert sum(spent[:28]) == pytest.approx(0.05 * BEFORE)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_a_random_walk_leaves_its_bounds_as_often_as_is_spent(level):
    """100,000 walks to the last look before 10,000 steps, step by step between looks: another route.

    For 95 %: 0.0475 are to leave, standard error 0.0007; the control, one normal quantile at every look, is
    far.
    """
    ks, runs = np.array(looks(HORIZON)), 100_000
    rng = np.random.default_rng(1)
    steps = rng.standard_normal((runs, len(ks))) * np.sqrt(np.diff(ks, prepend=0))
    z = np.abs(np.cumsum(steps, axis=1)) / np.sqrt(ks)
    out = z > bounds(level, len(ks))
    first = [(out[:, j] & ~out[:, :j].any(axis=1)).mean() for j in range(len(ks))]
    spent = np.array(spending(1 - level, len(ks)))
    assert np.all(np.abs(np.array(first) - spent) < 4.5 * np.sqrt(spent / runs))
    left = out.any(axis=1).mean()
    assert abs(left - BEFORE * (1 - level)) < 4.5 * math.sqrt((1 - level) / runs)
    assert (z > stats.norm.ppf((1 + level) / 2)).any(axis=1).mean() > 3 * (1 - level) * BEFORE * 0.9


def test_bounds_do_not_depend_on_how_many_are_asked_for():
    assert bounds(0.95, 3) == bounds(0.95, 28)[:3]
    assert bounds(0.95, 1)[0] == pytest.approx(stats.norm.isf(0.05 * BEFORE / 28 / 2))
    assert len(bounds(0.95, 31)) == 31 and min(bounds(0.95, 31)[28:]) > bounds(0.95, 31)[27]
    close(level_at(2, 0.95), 2 * stats.norm.cdf(bounds(0.95, 3)[2]) - 1, rtol=1e-12)


def test_bounds_are_worked_out_once(monkeypatch):
    """A training asks for one more at each look, in the user's loop."""
    asked, true = [], optimize.brentq
    monkeypatch.setattr(optimize, "brentq", lambda *a, **k: asked.append(1) or true(*a, **k))
    assert [len(bounds(0.8125, number)) for number in (1, 2, 5, 3, 12)] == [1, 2, 5, 3, 12]
    assert len(asked) == 12


def test_between_looks_the_last_set_stands():
    steps = simulated(0, 20, 60)
    for k in range(20, 61):
        made, look = live(steps[:k]), max(each for each in looks(k))
        same = estimate(steps[:look], level=level_at(len(looks(k)) - 1, 0.95))
        assert (made.low, made.high, made.b_simple, made.n_steps) == (
            same.low,
            same.high,
            same.b_simple,
            look,
        )
        assert made.level == 0.95 and made.status == same.status
        assert made.view == f"ratio of averages, as of the look at {look} steps"


def test_the_set_is_wider_than_that_of_a_single_look():
    steps = simulated(0, 20, 50)
    once, any_time = estimate(steps), live(steps)
    assert any_time.low < once.low and any_time.high > once.high
    assert any_time.high - any_time.low < 2.2 * (once.high - once.low)


@pytest.mark.parametrize("k", [0, 1, 2, 19])
def test_before_the_first_look_no_claim_is_made(k):
    made = live(simulated(0, 5, k))
    assert (made.status, made.low, made.high, made.n_steps) == ("collecting", 0.0, math.inf, k)


def test_only_usable_steps_count_and_groups_are_of_the_same_look():
    layout = Layout(("l.lora_A.w", "l.lora_B.w"))
    pairs = zip(simulated(1, 10, 30), simulated(2, 300, 30), strict=True)
    steps = [
        from_rows(
            np.array([[s.mean_sq_norm, s.sq_norm_of_mean] for s in pair]), layout, step=i, n_examples=16
        )
        for i, pair in enumerate(pairs)
    ]
    steps[3] = replace(steps[3], reason="overflow")
    made = live(steps)
    assert (made.n_steps, made.n_skipped, made.steps) == (25, 1, (0, 25))
    assert {name: group.n_steps for name, group in made.groups.items()} == {"A": 25, "B": 25}
    assert made.groups["A"].b_simple == estimate(steps[:26]).groups["A"].b_simple


def test_arguments_are_checked_as_those_of_estimate():
    steps = simulated(0, 5, 30)
    with pytest.raises(ValueError, match=r"level is 95; a coverage in \(0, 1\)"):
        live(steps, level=95)
    with pytest.raises(ValueError, match="2 metrics"):
        live([*steps, replace(steps[0], metric="adam")])
    with pytest.raises(TypeError, match="steps holds int"):
        live([3])


def test_the_outlook_is_on_the_set_that_is_shown():
    for k in looks(130):
        made = live(simulated(3, 10, k))
        width = (made.high - made.low) / 2 / made.b_simple
        assert (made.more_examples(width * 1.01), made.more_examples(width * 0.9) > 0) == (0, True), k
        assert "no wider" not in made.outlook(width * 0.9)


def test_a_group_that_some_steps_lack_is_as_of_the_same_look():
    both, alone = Layout(("l.lora_A.w", "l.lora_B.w")), Layout(("l.lora_B.w",))

    def step(s):
        layout = alone if s.step < 10 else both
        return from_rows(
            np.array([[s.mean_sq_norm, s.sq_norm_of_mean]] * len(layout.names)),
            layout,
            step=s.step,
            n_examples=16,
        )

    steps = [step(s) for s in simulated(4, 10, 49)]
    made = [live(steps[:k]).groups["A"] for k in range(40, 50)]
    assert {(e.low, e.high, e.n_steps, e.steps) for e in made} == {(made[0].low, made[0].high, 30, (10, 39))}
