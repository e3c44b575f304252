"""The simulated sums: equal to examples added up one by one, equal in law to them, unbiased."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.coverage import noise as module
from experiments.coverage.noise import DIMENSIONS, DIRECTIONS, LAWS, SPECTRA, simulate
from gns.sums import StepSums
from tests.reference.tolerances import close

FALSE_ALARM = 1e-5  # of each comparison below; the seeds are fixed, so that it is spent once


def drawn(rng, law, count):
    """[count, d] centred examples of unit covariance, in float64, drawn without the module's samplers."""
    if law == "gaussian":
        return rng.standard_normal((count, DIMENSIONS))
    if law == "t5":  # one call for all: SciPy takes its matrix apart anew in each
        shape = np.eye(DIMENSIONS) * 3 / 5
        return stats.multivariate_t.rvs(np.zeros(DIMENSIONS), shape, 5, size=count, random_state=rng)
    return (rng.lognormal(0, 1, (count, DIMENSIONS)) - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)


def one_by_one(examples, spectrum, direction, b_simple):
    """(m, q) of one step, its examples' gradients added up one after the other."""
    lam, g = SPECTRA[spectrum], DIRECTIONS[direction] / math.sqrt(b_simple)
    total, squares = np.zeros(DIMENSIONS), 0.0
    for e in examples:
        example = g + np.sqrt(lam) * e
        total += example
        squares += float(example @ example)
    return squares / len(examples), float(total @ total) / len(examples) ** 2


def slow_sums(rng, law, spectrum, n, direction, b_simple):
    """[2, 1,000], m and q of as many steps."""
    steps = drawn(rng, law, 1_000 * n).reshape(1_000, n, DIMENSIONS)
    return np.array([one_by_one(examples, spectrum, direction, b_simple) for examples in steps]).T


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("spectrum", ["1/j", "1/j^2"])
@pytest.mark.parametrize("law", LAWS)
def test_the_sums_have_the_law_of_examples_added_up_one_by_one(law, spectrum, direction):
    rng, n, b = np.random.default_rng(7), 4, 3.0
    slow = slow_sums(rng, law, spectrum, n, direction, b)
    m, q = (v.ravel() for v in simulate(law, spectrum, n, 2_000, 5, seed=8).recorded(b, direction))
    # the two sums, and what ties them together
    for name, mine, theirs in (("m", m, slow[0]), ("q", q, slow[1]), ("m − q", m - q, slow[0] - slow[1])):
        found = stats.ks_2samp(mine, theirs)
        assert found.pvalue > FALSE_ALARM, (name, found)


def test_control_a_degree_of_freedom_too_many_is_noticed(monkeypatch):
    """The comparison above, with Σχ²ₙ where Σχ²ₙ₋₁ is right."""
    right = module._short_cut

    def wrong(rng, steps, n, scale):
        mean, _ = right(rng, steps, n, scale)
        scatter = 2 * (rng.standard_gamma(n / 2, mean.shape, dtype=np.float32) @ scale**2)
        return mean, (mean**2).sum(1) + scatter / n

    monkeypatch.setattr(module, "_short_cut", wrong)
    rng = np.random.default_rng(7)
    slow = slow_sums(rng, "gaussian", "1/j", 4, "even", 3.0)
    m, _ = simulate("gaussian", "1/j", 4, 2_000, 5, seed=8).recorded(3.0, "even")
    assert stats.ks_2samp(m.ravel(), slow[0]).pvalue < FALSE_ALARM


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("b_simple", [0.5, 2_000])
def test_given_examples_the_sums_are_theirs(monkeypatch, direction, b_simple):
    """No randomness between: m, q and both estimates of planted examples, G added to each."""
    n, z = 3, np.random.default_rng(1).standard_normal((2, 3, DIMENSIONS)).astype(np.float32)
    monkeypatch.setitem(module.LAWS, "planted", lambda rng, shape: z.copy())
    made = simulate("planted", "1/j", n, 1, 2, seed=0)
    (m,), (q,) = made.recorded(b_simple, direction)
    (x,), (y,) = made.unbiased(b_simple, direction)
    for step in range(2):
        g = DIRECTIONS[direction] / math.sqrt(b_simple) + np.sqrt(SPECTRA["1/j"]) * z[step].astype(float)
        record = StepSums(0, n, float((g**2).sum(1).mean()), float((g.mean(0) ** 2).sum()))
        close([m[step], q[step]], [record.mean_sq_norm, record.sq_norm_of_mean], rtol=1e-5, what="sums")
        close(x[step], record.trace_sigma, rtol=1e-5, what="tr Σ")
        assert (
            abs(y[step] - record.grad_sq_norm) < 1e-6
        )  # a difference of sums near 1, kept in float32 before


@pytest.mark.parametrize("n", [4, 16])
@pytest.mark.parametrize("law", LAWS)
def test_both_estimates_are_unbiased(law, n):
    made = simulate(law, "1/j^2", n, 500, 40, seed=3)
    for b in (5.0, 500.0):
        for direction in DIRECTIONS:
            for values, truth in zip(made.unbiased(b, direction), (1, 1 / b), strict=True):
                z = (values.mean() - truth) / (values.std() / math.sqrt(values.size))
                assert abs(z) < stats.norm.isf(FALSE_ALARM / 2), (b, direction, values.mean(), truth, z)


@pytest.mark.parametrize("law", LAWS)
def test_laws_have_mean_zero_and_unit_covariance(law):
    draws = LAWS[law](np.random.default_rng(5), (4_000, 4, 8)).reshape(-1, 8).astype(float)
    assert LAWS[law](np.random.default_rng(5), (1, 2, 3)).dtype == np.float32
    for values, truth in (
        (draws.mean(1), 0.0),
        ((draws**2).mean(1), 1.0),
        (draws[:, :4].sum(1) * draws[:, 4:].sum(1), 0.0),
    ):
        z = (values.mean() - truth) / (values.std() / math.sqrt(len(values)))
        assert abs(z) < stats.norm.isf(FALSE_ALARM / 2), (values.mean(), truth, z)


def test_a_t5_example_is_loud_as_a_whole_and_a_lognormal_one_is_not():
    def shared(law):
        d = LAWS[law](np.random.default_rng(6), (5_000, 4, 2)).reshape(-1, 2)
        return stats.spearmanr(np.abs(d[:, 0]), np.abs(d[:, 1])).statistic

    assert shared("t5") > 0.1
    assert abs(shared("lognormal")) < 0.05
    assert abs(shared("gaussian")) < 0.05


def test_noise_is_a_function_of_its_seed_alone(monkeypatch):
    one, same, other = (simulate("t5", "flat", 4, 3, 5, seed=s) for s in (1, 1, 2))
    assert np.array_equal(one.sq_mean, same.sq_mean)
    assert not np.array_equal(one.sq_mean, other.sq_mean)


def test_chunks_leave_no_gap(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3 * 4 * DIMENSIONS)  # 3 steps of 4 examples at a time, 20 in all
    made = simulate("lognormal", "flat", 4, 4, 5, seed=1)
    values = np.concatenate([made.sq_mean, made.mean_sq, *made.along.values()])
    assert np.isfinite(values).all()
    assert len(np.unique(values)) == values.size


def test_spectra_and_directions_are_as_stated():
    expected = {"flat": 64, "1/j": 13.8, "1/j^2": 2.45}
    for name, lam in SPECTRA.items():
        assert lam.sum() == pytest.approx(1)
        assert 1 / (lam**2).sum() == pytest.approx(expected[name], rel=0.01)
    along = {name: u @ (SPECTRA["1/j^2"] * u) for name, u in DIRECTIONS.items()}
    assert along == {"even": pytest.approx(1 / 64), "top": pytest.approx(0.61, abs=0.01)}
    assert all(u @ u == pytest.approx(1) for u in DIRECTIONS.values())


def test_one_example_a_step_is_refused():
    with pytest.raises(ValueError, match="1 example"):
        simulate("gaussian", "flat", 1, 2, 2, seed=0)
