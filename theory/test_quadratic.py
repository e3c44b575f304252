"""The noisy quadratic and the one-epoch law: exact recursions, then what data size does to the batch."""

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from theory import montecarlo as mc
from theory.laws import (
    NoisyQuadratic,
    TradeOff,
    critical_batch,
    growth_exponent,
    largest_batch,
    loss_table,
    one_epoch_batches,
    run_averages,
)

MODELS = {"1/j": 1.0, "j^-2": 2.0}
SIZES = 2.0 ** np.arange(8, 14)
BATCHES = np.geomspace(1, 2**11, 34)


def model(name: str) -> NoisyQuadratic:
    """32 directions with the named curvature, noise proportional to it."""
    return NoisyQuadratic.power_law(32, MODELS[name], 1.0, 160)


@given(st.integers(1, 200), st.floats(0.5, 500), st.floats(0.001, 1.8))
def test_closed_form_is_the_recursion(steps: int, batch: float, rate: float) -> None:
    """aˢm₀ + (ε²c/B)(1-aˢ)/(1-a) against the step-by-step second moment."""
    q = NoisyQuadratic.power_law(5, 1.0)
    second = q.start.copy()
    for _ in range(steps):
        second = (1 - rate * q.curvature) ** 2 * second + rate**2 * q.noise / batch
    np.testing.assert_allclose(q.after_constant(steps, batch, rate), second, rtol=1e-9)


def test_second_moment_by_running_sgd(agree) -> None:
    """E[wⱼ²] after 25 steps of real SGD on the model."""
    q = NoisyQuadratic.power_law(3, 1.0, 2.0)
    exact = q.after_constant(25, 4.0, 0.3)
    runs = mc.simulate_columns(
        mc.sgd_second_moment(q.curvature, q.noise, q.start, 0.3, 4.0, 25), 60_000, 71, 75
    )
    for j, (estimate, truth) in enumerate(zip(runs, exact, strict=True)):
        agree(f"SGD second moment, direction {j}", estimate, float(truth))


def test_cosine_recursion_by_a_slow_twin() -> None:
    """Vectorised over rates against one rate, one direction, one step at a time."""
    q = NoisyQuadratic.power_law(2, 1.0)
    fast = q.after_cosine(12, 3.0, [0.1, 0.9])
    for i, peak in enumerate((0.1, 0.9)):
        for j in range(2):
            m = 1.0
            for k in range(12):
                eps = 0.5 * peak * (1 + np.cos(np.pi * k / 12))
                m = (1 - eps * q.curvature[j]) ** 2 * m + eps**2 * q.noise[j] / 3
            assert fast[i, j] == pytest.approx(m, rel=1e-12)


def test_noise_scales_of_a_state() -> None:
    """trΣ/|G|² and tr(HΣ)/GᵀHG written out."""
    q = NoisyQuadratic(np.array([2.0, 1.0]), np.array([3.0, 5.0]), np.ones(2), np.array([0.1, 0.2]))
    assert q.b_simple([1.0, 4.0]) == pytest.approx(8 / (4 + 4))
    assert q.b_noise([1.0, 4.0]) == pytest.approx((6 + 5) / (8 + 4))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_rate_search_is_fine_enough(schedule: str) -> None:
    """160 rates and a parabola against 1,500: within 0.5 % at every batch, edge of stability included."""
    coarse, fine = NoisyQuadratic.power_law(32, 1.0, 1.0, 160), NoisyQuadratic.power_law(32, 1.0, 1.0, 1500)
    for batch in np.geomspace(8, 1024, 9):
        a, b = (q.best_loss(4096.0, float(batch), schedule) for q in (coarse, fine))
        assert a == pytest.approx(b, rel=5e-3)


@pytest.mark.parametrize("name", MODELS)
def test_steps_to_a_target_reach_it(name: str) -> None:
    """At the reported number of steps the best rate's loss is the target; fewer do not suffice."""
    q = model(name)
    target = 0.1 * float(q.loss(q.start))
    for batch in (1.0, 30.0):
        s = q.steps_to(target, batch)
        assert float(q.loss(q.after_constant(s, batch, q.rates)).min()) == pytest.approx(target, rel=2e-3)
        assert float(q.loss(q.after_constant(0.98 * s, batch, q.rates)).min()) > target


@pytest.mark.parametrize("name", MODELS)
def test_both_definitions_of_the_critical_batch(name: str) -> None:
    """Twice the examples lies within a factor 1.5 of the fitted hyperbola, 20 % about a fifth of it."""
    q = model(name)
    for share in (0.3, 0.05):
        c = critical_batch(q, share * float(q.loss(q.start)), np.geomspace(0.2, 1e5, 50), 1.0)
        assert 1 / 1.5 < c.twice_examples / c.law.b_crit < 1.5
        assert 0.1 < c.twenty_percent / c.law.b_crit < 0.4


@pytest.mark.parametrize("name", MODELS)
def test_where_the_run_averages_land(name: str) -> None:
    """Averages of one run differ among themselves by 1.5 to 3, and lie 0.3 to 1.6 of B_crit for B_simple."""
    q = model(name)
    c = critical_batch(q, 0.05 * float(q.loss(q.start)), np.geomspace(0.2, 1e5, 50), 1.0)
    shares = [c.averages[f"{k}, B_simple"] / c.law.b_crit for k in AVERAGES]
    assert shares == sorted(shares)
    assert 0.3 < shares[0] < shares[-1] < 1.6 and shares[-1] / shares[0] > 1.4


AVERAGES = ("ratio of means", "progress-weighted", "plain mean", "last")


def test_ratio_of_means_is_not_the_mean() -> None:
    """FACTS §3: with |G|² falling, the ratio of means reads far below the mean and the last value."""
    b = np.geomspace(20, 600, 200)
    seen = run_averages(b, 1.0)
    assert seen["ratio of means"] < 0.45 * seen["plain mean"] < 0.2 * seen["last"]
    assert seen["ratio of means"] == pytest.approx(run_averages(b, 1e-9)["progress-weighted"], rel=1e-6)
    assert run_averages(b, 1e12)["progress-weighted"] == pytest.approx(seen["plain mean"], rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_exponents_of_the_one_epoch_batch(name: str, schedule: str) -> None:
    """B_max(N) ~ N^p: p is 1 to 1.5 for a fixed target, smaller for a tolerance, smallest for a relative one.

    FACTS §2 found 0.98-1.15, 0.43-0.90, 0.17-0.55; the ranges depend on spectrum, schedule and tolerance, and
    the order does not.
    """
    table = loss_table(model(name), SIZES, BATCHES, schedule)
    best = np.nanmin(table, axis=1)
    target = growth_exponent(SIZES[1:], one_epoch_batches(table[1:], BATCHES, "target", float(best[0])))
    absolute = growth_exponent(SIZES, one_epoch_batches(table, BATCHES, "absolute", 0.5 * float(best[3])))
    relative = growth_exponent(SIZES, one_epoch_batches(table, BATCHES, "relative", 0.05))
    assert 0.98 < target < 1.45
    assert 0.35 < absolute < target
    assert 0.1 < relative < 0.8 and relative < absolute


def test_target_exponent_is_the_law_not_proportionality() -> None:
    """Near E_min growth is faster than N: the quadratic's local slope falls towards 1 as the law says."""
    q = model("1/j")
    table = loss_table(q, SIZES, BATCHES, "constant")
    b = one_epoch_batches(table, BATCHES, "target", float(np.nanmin(table[0])) * 0.98)
    slopes = np.diff(np.log(b[1:])) / np.diff(np.log(SIZES[1:]))
    assert slopes[0] > 1.2 and np.all(np.diff(slopes) < 0)
    assert (
        np.log(
            TradeOff(10.0, 250.0).one_epoch_batch_max(512) / TradeOff(10.0, 250.0).one_epoch_batch_max(256)
        )
        > 1
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_smallest_batch_is_best_on_decaying_curvature(name: str, schedule: str) -> None:
    """No interior optimum at equal examples, to 0.2 % (the resolution of the rate grid)."""
    table = loss_table(model(name), [512.0, 4096.0], BATCHES[:14], schedule)
    assert np.all(table[:, 0] <= np.nanmin(table, axis=1) * 1.002)


def test_nearly_flat_curvature_has_a_shallow_interior_optimum() -> None:
    """No theorem in general: hⱼ = j^-0.3 under a cosine prefers B = 64 to B = 1 by 3 % at N = 512."""
    h = np.arange(1, 33.0) ** -0.3
    q = NoisyQuadratic(h, h, np.ones(32), np.geomspace(1e-2, 1.95, 120))
    losses = np.array([q.best_loss(512, b, "cosine") for b in (1, 16, 64, 256)])
    assert losses.argmin() == 2 and 1.02 < losses[0] / losses[2] < 1.05


def test_one_direction_prefers_the_larger_batch_exactly() -> None:
    """One step of 2B injects (1+a)²/(2(1+a²)) <= 1 times the noise of two steps of B, contraction equal."""
    for a in (0.2, 0.7, 0.99):
        eps_small, eps_large = 1 - a, 1 - a**2
        small = eps_small**2 * (1 + a**2)
        large = eps_large**2 / 2
        assert large / small == pytest.approx((1 + a) ** 2 / (2 * (1 + a**2)))
        assert large <= small


def test_largest_batch_interpolates_and_says_when_it_cannot() -> None:
    """Power-law losses are interpolated exactly; no answer is nan, not the edge of the table."""
    b = np.array([1.0, 2.0, 4.0, 8.0])
    assert largest_batch(b**0.5, b, 3.0**0.5) == pytest.approx(3.0)
    assert np.isnan(largest_batch(b, b, 0.5)) and np.isnan(largest_batch(b, b, 100.0))
    assert growth_exponent([10.0, 100.0, 1000.0], [1.0, 10.0, 100.0]) == pytest.approx(1.0)
    assert np.isnan(growth_exponent([10.0, 100.0, 1000.0], [1.0, np.nan, 100.0]))


@pytest.mark.parametrize("rate", [1e-20, 1e-12, 1e-6, 0.3, 1.0, 1.999])
def test_closed_form_from_vanishing_rates_to_the_edge(rate: float) -> None:
    """ε(1-aˢ)/(1-a) has no cancellation: against 60 digits, where 1-εh is 1 in floats and where it is 0."""
    q = NoisyQuadratic.power_law(3, 1.0)
    with mpmath.workdps(60):
        for j, value in enumerate(q.after_constant(50.0, 4.0, rate)):
            a = (1 - mpmath.mpf(rate) * mpmath.mpf(float(q.curvature[j]))) ** 2
            noise = mpmath.mpf(rate) ** 2 * mpmath.mpf(float(q.noise[j])) / 4
            exact = a**50 + noise * (1 - a**50) / (1 - a)
            assert value == pytest.approx(float(exact), rel=1e-12)
