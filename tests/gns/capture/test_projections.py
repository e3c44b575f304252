"""Random projections: linear, alike on all ranks, keeping norms as said; and the engine's factor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gns.capture.projections import SLACK, K, factor, project
from tests.reference.tolerances import close


def test_linear_and_the_same_for_the_same_seed(seed):
    x, y = torch.randn(2, 5, 7, dtype=torch.float64)
    one, two = project([x, y], 3)
    close(project([2 * x - 3 * y], 3)[0], 2 * one - 3 * two)
    assert not torch.equal(project([x], 4)[0], one)


@pytest.mark.parametrize("n", [1, 7, 8, 1001])
def test_squared_norms_are_kept_on_average(seed, n):
    """500 draws; one varies by √(2/K) of its mean at most, so 6 standard errors are 6·√(2/8/500) = 13 %."""
    x = torch.randn(n, dtype=torch.float64)
    found = [float(project([x], draw).square().sum()) for draw in range(500)]
    assert abs(np.mean(found) / float(x.square().sum()) - 1) < 6 * math.sqrt(2 / K / 500)


def test_differences_are_seen_at_the_size_that_the_slack_allows_for(seed):
    """Of 2,000 draws none passes twice the size (one in 10⁴), and about one in 50 falls below half."""
    x = torch.randn(4096, dtype=torch.float64)
    sizes = [float(project([x], draw).norm() / x.norm()) for draw in range(2000)]
    assert max(sizes) < SLACK
    assert 0.005 < np.mean(np.array(sizes) < 0.5) < 0.04


def test_float32_is_summed_in_float64(seed):
    x = torch.randn(100_000)
    close(project([x], 1), project([x.double()], 1), rtol=1e-12)


@pytest.mark.parametrize("true", [0.25, 1.0, 0.3])
def test_the_factor_is_found_though_some_parameters_are_wrong(true):
    draw = np.random.default_rng(0)
    sums = {str(i): draw.normal(size=K) for i in range(5)}
    pairs = {name: (a, true * a * (1 + 1e-7)) for name, a in sums.items()}
    pairs["1"], pairs["3"] = (sums["1"], 7 * sums["1"]), (sums["3"], 0 * sums["3"])
    found = factor(pairs, 4, rtol=1e-3)
    assert found == true if true != 0.3 else found == pytest.approx(0.3, rel=1e-6)


def test_no_factor_from_nothing():
    zero, inf, nan = np.zeros(K), np.full(K, np.inf), np.full(K, np.nan)
    assert factor({"a": (zero, zero), "b": (inf, inf), "c": (nan, zero)}, 2, rtol=1e-3) is None
