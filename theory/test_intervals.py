"""How sure: Fieller's three shapes, Hall's correction, coverage, detection limits."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from theory import montecarlo as mc
from theory.intervals import t_quantile
from theory.laws import (
    RatioSet,
    delta_interval,
    detection_limit,
    effective_rank,
    fieller,
    hall_hull,
    hull_accepts,
    planned_detection_limit,
    power_law_spectrum,
    ratio_statistics,
    step_variances,
)

THETAS = (-1e6, -300.0, -20.0, -3.0, -0.5, 0.0, 0.7, 2.0, 9.0, 40.0, 500.0, 1e6)


def steps(signal: float, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """K values with a skewed numerator around 5 and a denominator around `signal`."""
    rng = np.random.default_rng(seed)
    return rng.gamma(5, 1.0, k), signal + rng.gamma(2, 0.5, k) - 1.0


SAMPLES = st.builds(steps, st.floats(-0.5, 4), st.integers(5, 80), st.integers(0, 10**6))


def test_golden_planning_limits() -> None:
    """B = 16, K = 50, r_eff = 13.8: 175; the same 800 examples pooled: 1,277."""
    assert round(planned_detection_limit(16, 50, 13.8)) == 175
    assert round(planned_detection_limit(800, 1, 13.8)) == 1277


@pytest.mark.parametrize(
    ("signal", "shape"), [(4.0, "interval"), (0.1, "two rays"), (-4.0, "interval"), (None, "whole line")]
)
def test_three_shapes(signal: float | None, shape: str) -> None:
    """Significant denominator, insignificant denominator, and neither mean significant."""
    x, y = steps(0.0, 30, 61)
    x, y = (x, y - y.mean() + signal) if signal is not None else (x - x.mean(), y - y.mean())
    assert fieller(x, y).shape == shape and hall_hull(x, y).shape == shape


@given(SAMPLES)
def test_fieller_is_unbounded_exactly_when_the_denominator_is_not_significant(sample) -> None:
    """A > 0 iff |ȳ|/se(ȳ) > t: the set and the t-test never disagree."""
    x, y = sample
    t = abs(y.mean()) / (y.std(ddof=1) / np.sqrt(y.size))
    assert (fieller(x, y).shape == "interval") == (t > t_quantile(y.size))


@given(SAMPLES)
def test_fieller_set_is_the_inverted_t_test(sample) -> None:
    """θ is inside iff |T(θ)| <= t: the quadratic against the test itself."""
    x, y = sample
    result, t = fieller(x, y), t_quantile(x.size)
    for theta in THETAS:
        stat = float(ratio_statistics(x, y, theta)[0])
        assume(abs(abs(stat) - t) > 1e-6)
        assert result.contains(theta) == (abs(stat) <= t)


@given(SAMPLES)
def test_hull_contains_fieller_and_agrees_with_its_own_test(sample) -> None:
    """The hull never shrinks Fieller's set, and accepts what T and H do not both reject."""
    x, y = sample
    hull, plain = hall_hull(x, y), fieller(x, y)
    inside = sum(bool(hull_accepts(x, y, theta)) and not hull.contains(theta) for theta in THETAS)
    assert inside == 0
    for theta in THETAS:
        assert hull.contains(theta) or not plain.contains(theta) or theta == 0


@given(SAMPLES, st.integers(-150, 150), st.integers(-150, 150))
def test_sets_scale_with_the_units(sample, i: int, j: int) -> None:
    """X → ax, y → by moves the set by a/b, over 300 decades: tiny gradients and a loss scale cost nothing."""
    (x, y), a, b = sample, 10.0**i, 10.0**j
    for method in (fieller, hall_hull):
        one, two = method(x, y), method(a * x, b * y)
        assert one.shape == two.shape
        if one.shape != "whole line":
            assert (two.low, two.high) == pytest.approx((one.low * a / b, one.high * a / b), rel=1e-6)


@given(SAMPLES)
def test_estimate_is_always_inside(sample) -> None:
    """x̄/ȳ belongs to its own set, whatever the shape."""
    x, y = sample
    theta = float(x.mean() / y.mean())
    assert fieller(x, y).contains(theta) and hall_hull(x, y).contains(theta)


@given(SAMPLES)
def test_more_confidence_is_a_larger_set(sample) -> None:
    """The 95 % set contains the 80 % set."""
    x, y = sample
    wide, narrow = fieller(x, y, 0.95), fieller(x, y, 0.8)
    assert all(wide.contains(t) for t in THETAS if narrow.contains(t))


def test_symmetric_values_leave_fieller_as_it_is() -> None:
    """Without skewness Hall's correction vanishes."""
    base = np.array([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0] * 5)
    x, y = 5 + base, 3 + base[::-1] * 0
    assert hall_hull(x, y + 1e-3 * base).low == pytest.approx(fieller(x, y + 1e-3 * base).low, rel=2e-3)


def test_zero_variance_denominator_is_an_ordinary_mean() -> None:
    """Y constant: the set is x's t interval divided by y."""
    x, y = steps(1.0, 20, 62)[0], np.full(20, 2.0)
    half = t_quantile(20) * x.std(ddof=1) / np.sqrt(20)
    result = fieller(x, y)
    assert (result.low, result.high) == pytest.approx(((x.mean() - half) / 2, (x.mean() + half) / 2))


def test_ray_set_membership() -> None:
    """Two rays contain what lies outside (low, high)."""
    rays = RatioSet("two rays", -5.0, 3.0)
    assert rays.contains(-6) and rays.contains(4) and not rays.contains(0)


def test_step_variances_by_simulation(agree) -> None:
    """Var and Cov of a step's estimates: closed forms against draws."""
    lam, mean, b = power_law_spectrum(6), np.linspace(0.1, 0.6, 6), 5
    truth = step_variances(lam, mean, b)
    centre = np.array([lam.sum(), (mean**2).sum()])
    draw = mc.gaussian_step(lam, mean, b)

    def products(rng: np.random.Generator, size: int) -> np.ndarray:
        d = draw(rng, size) - centre
        return np.stack([d[:, 0] ** 2, d[:, 1] ** 2, d[:, 0] * d[:, 1]], 1)

    for name, estimate, value in zip(
        ("Var trΣ", "Var |G|²", "Cov"), mc.simulate_columns(products, 300_000, 63, 12), truth, strict=True
    ):
        agree(f"step estimates: {name}", estimate, value)


def test_detection_limit_of_a_run_agrees_with_planning() -> None:
    """x̄/(t·se(ȳ)) over noise-only steps is √(b(b-1)K r_eff/2)/t on average."""
    lam = power_law_spectrum(64)
    z = mc.collect(mc.gaussian_step(lam, np.zeros(64), 16), 500 * 50, 64, 128).reshape(500, 50, 2)
    limits = [detection_limit(run[:, 0], run[:, 1]) for run in z]
    planned = planned_detection_limit(16, 50, effective_rank(lam), t_quantile(50))
    assert np.median(limits) == pytest.approx(planned, rel=0.04)


def coverage(
    b_simple: float, repeats: int, seed: int, k: int = 50, exponent: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coverage of Fieller, hull and delta: steps of 16, 64 directions, the gradient flat in them."""
    lam = power_law_spectrum(64, exponent)
    mean = np.full(64, np.sqrt(lam.sum() / b_simple / 64))
    z = mc.collect(mc.gaussian_step(lam, mean, 16), repeats * k, seed, 128).reshape(repeats, k, 2)
    x, y = z[..., 0], z[..., 1]
    t = t_quantile(k)
    t_true = ratio_statistics(x, y, b_simple)[0]
    theta = x.mean(1) / y.mean(1)
    half = t * np.std(x - theta[:, None] * y, axis=1, ddof=1) / np.sqrt(k) / np.abs(y.mean(1))
    return (
        np.abs(t_true) <= t,
        np.asarray(hull_accepts(x, y, b_simple)),
        np.abs(theta - b_simple) <= half,
    )


@pytest.mark.parametrize(
    ("b_simple", "golden_fieller", "golden_delta"), [(20, 95.0, 94.4), (200, 94.0, 87.8), (2000, 94.5, 40.1)]
)
def test_golden_coverage(b_simple: float, golden_fieller: float, golden_delta: float, record) -> None:
    """Nominal 95 %: Fieller holds at every B, the delta method falls to 40 %.

    FACTS §3 (2,000 repeats, ±0.5 and ±1.1) within 4.75 standard errors of the difference of two such runs.
    """
    names = ("Fieller", "Fieller and Hall", "delta method")
    hits = zip(names, coverage(b_simple, 2000, 65), strict=True)
    plain, hull, delta = (record(f"coverage of {name}, B = {b_simple}", hit, 0.95) for name, hit in hits)
    spread = 4.75 * 100 * np.sqrt(2 / 2000)
    assert abs(100 * plain - golden_fieller) < spread * np.sqrt(0.95 * 0.05)
    assert abs(100 * delta - golden_delta) < spread * np.sqrt(golden_delta / 100 * (1 - golden_delta / 100))
    assert 0.93 < hull < 0.975 and hull >= plain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "fieller_golden", "hull_golden"), [(10, 88.5, 92.1), (20, 91.0, 93.9), (50, 91.8, 95.0)]
)
def test_worst_cell_on_a_steep_spectrum(k: int, fieller_golden: float, hull_golden: float) -> None:
    """j⁻² spectrum: Hall's correction adds 2.5 to 4 points to the worst cell over B = 20, 200, 2,000."""
    cells = [[hit.mean() for hit in coverage(b, 4000, 66, k, 2.0)[:2]] for b in (5, 20, 200, 2000, 5000)]
    worst = 100 * np.min(cells, axis=0)
    assert worst[1] - worst[0] > 1.5
    assert abs(worst[1] - hull_golden) < 1.5
    assert abs(worst[0] - fieller_golden) < 2.5  # FACTS does not say where its gradient points


def test_delta_interval_is_always_bounded_and_wrong() -> None:
    """Control: it claims an interval where no denominator is visible."""
    x, y = steps(0.05, 30, 67)
    bounded = delta_interval(x, y)
    assert bounded.shape == "interval" and np.isfinite(bounded.high) and fieller(x, y).shape != "interval"


def test_t_quantile() -> None:
    """Two-sided."""
    assert t_quantile(50) == pytest.approx(stats.t.ppf(0.975, 49))


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(2, 60))
def test_identical_steps_leave_one_point(a: float, b: float, k: int) -> None:
    """No scatter at all: the set is the ratio itself; rounding must not turn it into the whole line."""
    x, y = np.full(k, a), np.full(k, b)
    for result in (fieller(x, y), hall_hull(x, y)):
        assert result.shape == "interval"
        assert (result.low, result.high) == pytest.approx((a / b, a / b), rel=1e-6)
    assert hull_accepts(np.ones(k), np.ones(k), 1.0) and not hull_accepts(np.ones(k), np.ones(k), 1.1)


@pytest.mark.parametrize("seed", range(12))
def test_hull_against_a_scan_of_its_own_test(seed: int) -> None:
    """Slow twin: θ on a fine grid of both signs, accepted one by one; the arc has the same ends."""
    rng = np.random.default_rng(700 + seed)
    k = int(rng.integers(8, 40))
    x, y = rng.gamma(3, 1, k), rng.uniform(-0.8, 1.5) + rng.gamma(1, 0.7, k)
    hull, unit = hall_hull(x, y), float(x.mean() / abs(y.mean()))
    grid = unit * np.concatenate([-np.geomspace(1e6, 1e-6, 1500), np.geomspace(1e-6, 1e6, 1500)])
    differ = [bool(hull_accepts(x, y, v)) != hull.contains(float(v)) for v in grid]
    assert sum(differ) == 0


@given(st.floats(0.01, 100), st.integers(8, 40), st.integers(0, 10**6))
def test_a_ratio_known_exactly_is_a_point(theta: float, k: int, seed: int) -> None:
    """X = θy in every step, y significant: Fieller's two roots coincide, whichever way they round."""
    y = 5 + np.random.default_rng(seed).standard_normal(k)
    result = fieller(theta * y, y)
    assert result.shape == "interval" and (result.low, result.high) == pytest.approx((theta, theta), rel=1e-6)
