"""The noise scale of sign-like optimizers: coordinate by coordinate, and what it bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gns.frozen import probe
from gns.probing.calling import ProbeError
from gns.probing.signs import sign_scale
from gns.statistics.moments import Moments
from tests.gns.test_frozen import mean_loss, plain, rows, state
from tests.reference import signs as slow
from tests.reference.per_example import contributions, flat, trainable
from tests.reference.tolerances import close


def drawn(seed: int, k: int, n: int, mean: np.ndarray, sigma: np.ndarray) -> torch.Tensor:
    """[K, d], batch gradients of n Gaussian examples."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(mean + rng.standard_normal((k, len(mean))) * sigma / np.sqrt(n))


@given(st.integers(6, 12), st.integers(1, 4), st.integers(0, 10**6))
def test_equals_the_sums_over_coordinates(k, n, seed):
    rng = np.random.default_rng(seed)
    g = drawn(seed, k, n, rng.standard_normal(5), rng.random(5) + 0.1)
    found = sign_scale([g[:, :2], g[:, 2:]], np.full(k, n), level=0.95)
    noise, signal, l1 = slow.sign_scale(g.tolist(), n)
    close([found.noise, found.signal, found.noise / found.floor], [noise, signal, l1**2])


def test_the_spread_is_that_of_the_jackknife():
    g = drawn(1, 14, 4, np.ones(6), np.ones(6))
    found, half = sign_scale([g], np.full(14, 4), level=0.95), 7
    x, y, left = found.noise, found.signal, []
    for out in range(half):
        kept = [i for i in range(14) if i != half + out]
        # a half of seven signs as before: the twin halves what it is given
        first, second = g[:half].tolist(), [g[i].tolist() for i in kept[half:]]
        left.append(slow.sign_scale(first[: half - 1] + second, 4)[:2])
    same = torch.equal(g[: half - 1].sum(0).sign(), g[:half].sum(0).sign())
    assert same, "the twin's signs, from one batch fewer, are the same here"
    pseudo = half * np.array([x, y]) - (half - 1) * np.array(left)
    twin = Moments.of(*pseudo.T, np.ones(half), np.ones(half))
    close(np.array(found.moments.second) / found.moments.x**2, np.array(twin.second) / x**2, rtol=1e-8)


def test_an_upper_bound_tight_where_the_signs_are_known():
    """Means far from zero: every sign is right, and (Σσ)²/‖G‖₁² is in the set of level 99.99 %."""
    mean, sigma = np.array([1.0, -2.0, 0.5, 3.0]), np.array([1.0, 3.0, 0.5, 2.0])
    truth = sigma.sum() ** 2 / np.abs(mean).sum() ** 2
    found = sign_scale([drawn(0, 400, 8, mean, sigma)], np.full(400, 8), level=0.9999)
    assert found.low < truth < found.high and found.high / found.low < 1.8
    assert abs(found.floor / found.b_simple - 1) < 0.01
    lost = np.concatenate([mean, np.zeros(40)])  # coordinates of noise alone
    noisy = np.concatenate([sigma, np.full(40, 2.0)])
    truth = noisy.sum() ** 2 / np.abs(lost).sum() ** 2
    found = sign_scale([drawn(0, 60, 8, lost, noisy)], np.full(60, 8), level=0.95)
    assert found.floor < truth < found.b_simple * 1.5


def test_control_signs_of_the_same_batches_would_see_a_gradient_in_noise():
    """With G = 0 the plug-in gives a finite scale always; signs of other batches give none, half the time."""
    zero, one = np.zeros(200), np.ones(200)
    found = [sign_scale([drawn(s, 40, 4, zero, one)], np.full(40, 4), level=0.95) for s in range(40)]
    assert all(np.isfinite(f.floor) and f.floor < 200 for f in found)
    assert np.mean([np.isinf(f.high) for f in found]) > 0.8
    assert 0.2 < np.mean([f.signal < 0 for f in found]) < 0.9


@pytest.mark.parametrize("n", [[4] * 5, [4] * 6 + [3]])
def test_too_few_or_unequal_batches_are_refused(n):
    with pytest.raises(ValueError, match='metric="sign" needs 6 or more, all of one size'):
        sign_scale([torch.ones(len(n), 2)], np.array(n), level=0.95)


def test_through_the_probe():
    model, batches = plain(), rows(*[4] * 44)
    found = probe(model, batches, loss=mean_loss, metric="sign")
    each = [
        flat(contributions(trainable(model), [lambda x=x: mean_loss(model, x)]))[0].tolist() for x in batches
    ]
    noise, signal, _ = slow.sign_scale(each, 4)
    close([found.trace_sigma, found.grad_sq_norm, found.b_simple], [noise, signal, noise / signal])
    assert found.metric == "sign" and found.n_steps == 44 and found.status == "measured"
    assert any("upper bound: the signs are those of the first 22 batches" in w for w in found.warnings)
    assert found.p_value < 0.001 and "ℓ₁" in found.target
    assert state(model, torch.optim.SGD(model.parameters()))["modes"][""] is True


def test_a_last_batch_that_is_smaller_is_left_out():
    found = probe(plain(), rows(*[4] * 8, 3), loss=mean_loss, metric="sign")
    assert found.n_steps == 8 and "it has 3 examples, the first 4" in found.warnings[0]
    assert probe(plain(), rows(4, 4, 4), loss=mean_loss, metric="sign").status == "collecting"


def test_gradients_that_do_not_fit_are_refused_at_once():
    seen = []

    def loss(model, x):
        seen.append(1)
        return mean_loss(model, x)

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2000).double()
    with pytest.raises(ProbeError, match='metric="sign" needs them whole'):
        probe(model, rows(*[4] * 44), loss=loss, metric="sign", max_bytes=200_000, sketch=400)
    assert len(seen) == 3
