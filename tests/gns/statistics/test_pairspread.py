"""The score set of all pairs: its parts against simulation, its coverage where the jackknife's fails."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from gns.estimate import Moments
from gns.statistics.pairs import Batches, jackknife
from gns.statistics.pairspread import MIN_BATCHES, ScoreMoments, noise_along, score, spectrum
from gns.statistics.sets import detection_limit, honest_set
from tests.reference.tolerances import close

STEEP = 1 / np.arange(1, 33.0) ** 2
STEEP = STEEP / STEEP.sum()  # tr Σ = 1, r_eff 2.5


def probe(rng: np.random.Generator, b_simple: float, sizes, direction: int = 0, lam=STEEP) -> Batches:
    """Gaussian batches of these sizes with tr Σ/|G|² = b_simple, G along one eigenvector of Σ."""
    sizes = np.asarray(sizes)
    g = np.zeros(len(lam))
    g[direction] = math.sqrt(lam.sum() / b_simple)
    means = g + rng.standard_normal((len(sizes), len(lam))) * np.sqrt(lam / sizes[:, None])
    scatter = rng.chisquare(sizes[:, None] - 1.0, (len(sizes), len(lam))) @ lam  # Σ‖gᵢ − ḡ‖²
    norms = ((means**2).sum(1) * sizes + scatter) / sizes**2  # Σ‖cᵢ‖², cᵢ = gᵢ/n
    return Batches(means @ means.T, sizes, norms, 1 / sizes, sizes)


def test_the_trace_of_sigma_squared_is_unbiased():
    rng = np.random.default_rng(1)
    found = np.array([spectrum(probe(rng, 10, [4] * 7).gram, 1 / 4)[0] for _ in range(3_000)])
    z = (found.mean() - (STEEP**2).sum()) / (found.std() / math.sqrt(len(found)))
    assert abs(z) < 4.5, (found.mean(), (STEEP**2).sum(), z)


def test_the_mean_gradient_does_not_enter_the_spectrum():
    rng = np.random.default_rng(2)
    e, g = rng.standard_normal((6, 5)), 100 * rng.standard_normal(5)
    close(spectrum((e + g) @ (e + g).T, 0.25), spectrum(e @ e.T, 0.25), rtol=1e-6)


def test_the_largest_eigenvalue_is_that_of_the_batches_covariance():
    e = np.random.default_rng(3).standard_normal((9, 4)) * [5, 1, 1, 1]
    expected = np.linalg.eigvalsh(np.cov(e.T))[-1]
    close(spectrum(e @ e.T, 0.25)[1], expected / 0.25, rtol=1e-9)


@pytest.mark.parametrize("sizes", [[16] * 20, [8, 24] * 10, [16] * 19 + [2]])
def test_without_signal_the_spread_is_the_true_one_and_the_jackknifes_is_twice_that(sizes):
    """Var Y = 2 tr(Σ²)/(N(N − 1)) exactly, however the examples are divided into batches."""
    rng, total = np.random.default_rng(4), sum(sizes)
    probes = [probe(rng, 1e12, sizes) for _ in range(1_000)]
    true = 2 * (STEEP**2).sum() / (total * (total - 1))
    null = np.array([score(b).se_y() ** 2 for b in probes]) / true
    assert abs(null.mean() - 1) < 4.5 * null.std() / math.sqrt(len(null)) + 0.05  # uneven: approximate
    assert np.mean([jackknife(b).se_y() ** 2 for b in probes]) / true > 1.6


@pytest.mark.parametrize(("direction", "low", "high"), [(0, 0.9, 1.25), (7, 1.0, 4.5)])
def test_with_signal_the_spread_under_the_truth_is_the_true_one_or_larger(direction, low, high):
    """G in the noisiest direction: right. In a quiet one, which is not known for sure: on the safe side."""
    rng, b, a = np.random.default_rng(5), 20.0, 1 / 400
    true = 4 * STEEP[direction] / b * a + 2 * (STEEP**2).sum() * a * a
    found = []
    for _ in range(600):
        m = score(probe(rng, b, [16] * 25, direction))
        assert isinstance(m, ScoreMoments)
        found.append((m.linear * m.x / b + m.null) / true)
    assert low < np.mean(found) < high


def misses(make, b: float, repeats: int, level: float = 0.95) -> int:
    rng, missed = np.random.default_rng(6), 0
    for _ in range(repeats):
        low, high, _ = honest_set(make(probe(rng, b, [16] * 50)), level)
        missed += not low <= b <= high
    return missed


def test_it_holds_its_level_where_the_jackknife_does_not():
    """G in the noisiest direction, just beyond reach: 14 % of the jackknife's sets miss at nominal 5 %."""
    found, control = misses(score, 300, 300), misses(jackknife, 300, 300)
    assert found <= 30, found  # 15 expected, 4 standard errors
    assert control >= 30, control  # 42 expected


def test_it_sees_further_than_the_jackknife():
    rng = np.random.default_rng(7)
    probes = [probe(rng, 100, [16] * 50) for _ in range(60)]
    bounded = {
        name: sum(math.isfinite(honest_set(make(p), 0.95)[1]) for p in probes)
        for name, make in (("score", score), ("jackknife", jackknife))
    }
    assert bounded["score"] > 50
    assert bounded["jackknife"] < 30


@pytest.mark.parametrize("b", [5, 300, 20_000])
def test_scale_and_order_of_the_batches_change_nothing(b):
    batches = probe(np.random.default_rng(8), b, [16] * 30)
    low, high, empty = honest_set(score(batches), 0.95)
    order = np.random.default_rng(9).permutation(30)
    shuffled = replace(
        batches,
        gram=batches.gram[np.ix_(order, order)],
        sum_sq_norms=batches.sum_sq_norms[order],
    )
    for other in (batches.scaled(2.0**-40), batches.scaled(3.0), shuffled):
        again = honest_set(score(other), 0.95)
        assert again[2] == empty
        assert again[0] == pytest.approx(low, rel=1e-6)
        assert again[1] == pytest.approx(high, rel=1e-6)


def test_infinity_is_rejected_exactly_when_y_exceeds_its_spread_without_signal():
    for seed in range(30):
        m = score(probe(np.random.default_rng(seed), 200, [16] * 20))
        t, _ = m.statistics(np.array(1.0), np.array(0.0))
        assert float(t) == pytest.approx(-m.y / m.se_y())
        assert detection_limit(m, 0.95) == pytest.approx(m.x / m.se_y() / 2.093, rel=1e-3)


def test_a_spread_that_is_the_jackknifes_changes_nothing():
    """linear = 0 and null = the jackknife's variance: the plain statistics."""
    plain = jackknife(probe(np.random.default_rng(10), 50, [16] * 20))
    same = ScoreMoments(
        plain.x, plain.y, plain.second, plain.third, plain.k, linear=0.0, null=plain.se_y() ** 2
    )
    theta, kappa = np.array([0.0, 1.0, 40.0, 1.0]), np.array([1.0, 1.0, 1.0, 0.0])
    for mine, theirs in zip(same.statistics(theta, kappa), plain.statistics(theta, kappa), strict=True):
        close(mine, theirs, rtol=1e-9)


def test_more_batches_sharpen_both_parts_of_the_spread():
    """Twice the batches: what they are expected to say, on average over probes."""
    rng = np.random.default_rng(14)
    few = [score(probe(rng, 50, [16] * 20)) for _ in range(300)]
    many = [score(probe(rng, 50, [16] * 40)) for _ in range(300)]
    half = few[0].scaled(2)
    assert isinstance(half, ScoreMoments)
    assert isinstance(few[0], ScoreMoments)
    assert (half.linear, half.null, half.k) == (few[0].linear / 2, few[0].null / 4, 2 * few[0].k)
    null = [np.mean([m.se_y() ** 2 for m in probes]) for probes in ([m.scaled(2) for m in few], many)]
    assert null[0] == pytest.approx(null[1], rel=0.1)  # N(N − 1) against N², and 3 standard errors


def test_where_the_direction_is_unknown_the_noisiest_is_assumed():
    plain = jackknife(probe(np.random.default_rng(11), 1e9, [16] * 20))
    a = 1 / 320
    assert noise_along(replace(plain, y=-plain.x * a * 2), a, 0.6) == 0.6
    assert noise_along(replace(plain, y=0.0), a, 0.6) == pytest.approx(0.6)
    known = replace(plain, y=1e6 * plain.x)
    assert noise_along(known, a, 0.6) < 1e-3
    assert noise_along(plain, a, 0.0) > 0  # never less than what was seen


def test_few_batches_keep_the_jackknife():
    for k in range(2, MIN_BATCHES):
        batches = probe(np.random.default_rng(12), 5, [16] * k)
        assert type(score(batches)) is Moments
        assert score(batches) == jackknife(batches)
    assert isinstance(score(probe(np.random.default_rng(12), 5, [16] * MIN_BATCHES)), ScoreMoments)
    with pytest.raises(ValueError, match="at least 2"):
        score(probe(np.random.default_rng(12), 5, [16]))


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_no_probe_makes_it_raise(level):
    """Small, uneven, hopeless and noiseless ones, and a Gram matrix that a sketch made indefinite."""
    rng = np.random.default_rng(13)
    for _ in range(60):
        k = int(rng.integers(4, 12))
        batches = probe(rng, float(rng.choice([0.1, 10, 1e9])), rng.integers(2, 20, k))
        noise = rng.standard_normal((k, k)) * rng.choice([0, 1])
        low, high, _ = honest_set(score(replace(batches, gram=batches.gram + noise + noise.T)), level)
        assert low <= high
    flat = Batches(np.ones((5, 5)), np.full(5, 4), np.full(5, 0.25), np.full(5, 0.25), np.full(5, 4))
    assert honest_set(score(flat), level) == honest_set(jackknife(flat), level)
