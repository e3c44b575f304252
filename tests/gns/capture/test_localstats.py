"""Where an engine hides `.grad`: what is measured instead, and that it says so everywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from gns.capture import localstats, ownership
from gns.capture.ownership import FOREIGN
from gns.capture.readings import Readings
from gns.estimate import estimate
from gns.monitor import GNSMonitor, GNSWarning
from gns.reasons import HIDDEN, HIDDEN_LARGE, NOT_OURS
from gns.stepsfile import read_steps, write_steps
from gns.sums import StepSums, unbiased
from tests.gns.hiding import Hiding
from tests.reference.per_example import contributions, joint, trainable
from tests.reference.tolerances import close

STEPS = FOREIGN + 4


@pytest.fixture
def model(seed):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def train(model, steps=STEPS, micros=2):
    """Yield each step's examples before they are used."""
    engine = Hiding(model, lr=0.1)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        xs = [torch.randn(3 + i, 3, generator=generator, dtype=torch.float64) for i in range(micros)]
        losses = [lambda x=x, i=i: model(x[i : i + 1]).square().sum() / 10 for x in xs for i in range(len(x))]
        yield joint(contributions(trainable(model), losses))
        for x in xs:
            (model(x).square().sum() / 10).backward()
        engine.step()


def test_one_process_measures_its_own_batch(model, tmp_path):
    with GNSMonitor(model, on_error="raise") as monitor, pytest.warns(GNSWarning) as caught:
        expected = list(train(model))
        history, coverage, result = monitor.history, monitor.coverage(), monitor.estimate()
    assert [str(w.message).split("estimate: ")[1] for w in caught] == [HIDDEN]
    assert [s.reason for s in history] == [HIDDEN] + [None] * 4
    assert [s.local for s in history] == [False] + [True] * 4
    assert coverage.share == 1 and not coverage.verified
    for sums, both in zip(history[1:], expected[FOREIGN:], strict=True):
        assert sums.n_examples == 7
        close([sums.mean_sq_norm, sums.sq_norm_of_mean], both)
    assert "local statistics" in result.unit and "local statistics" in str(result)
    write_steps(tmp_path / "steps.jsonl", history)
    assert [s.local for s in read_steps(tmp_path / "steps.jsonl")] == [s.local for s in history]


def test_weights_are_those_of_unmonitored_training(model, seed):
    import copy

    other = copy.deepcopy(model)
    with GNSMonitor(model, on_error="raise"), pytest.warns(GNSWarning):
        list(train(model))
    list(train(other))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_too_large_for_the_bound_is_refused(model, monkeypatch):
    monkeypatch.setattr(ownership, "LOCAL_BYTES", 10)
    scalars = sum(p.numel() for p in model.parameters())
    with GNSMonitor(model, on_error="raise") as monitor:
        with pytest.warns(GNSWarning) as caught:
            list(train(model))
        assert not monitor.history
    assert [str(w.message) for w in caught] == [HIDDEN_LARGE.format(size=4 * scalars)]


def test_a_foreign_optimizer_beside_visible_gradients_is_refused(model):
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with GNSMonitor(model, on_error="raise") as monitor:
        with pytest.warns(GNSWarning) as caught:
            for _ in range(STEPS):
                model(torch.randn(3, 3, dtype=torch.float64)).square().sum().backward()
                optimizer.step()
        assert not monitor.history
    assert [str(w.message) for w in caught] == [NOT_OURS]


def test_an_optimizer_of_ours_ends_local_statistics(model):
    with GNSMonitor(model, on_error="raise") as monitor, pytest.warns(GNSWarning):
        list(train(model))
        for p in model.parameters():
            p._post_accumulate_grad_hooks.clear()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.randn(3, 3, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        history = monitor.history
    assert [s.local for s in history[-3:]] == [True, False, False]
    assert [s.reason for s in history[-3:]] == [None] * 3


def test_an_emptied_parameter_is_refused_at_attach(model):
    model[0].weight.data = torch.empty(0, dtype=torch.float64)
    with pytest.raises(ValueError, match="`0.weight` is empty"):
        GNSMonitor(model).attach()


# the average over ranks


def readings(n, seed, squares=None):
    draw = np.random.default_rng(seed)
    s, q = draw.uniform(1, 2, 3), draw.uniform(0.5, 5, 3)
    w = (math.nan, 1.0, squares) if squares else (math.nan,) * 3
    return Readings(s, q, np.full(3, float(n)), n, totals=w, local=True)


def of(found, i):
    _, w, ww = found.totals
    a = 1 / found.n if math.isnan(w) else ww / w**2
    return unbiased(found.n, found.n * found.s[i], found.q[i], a)


@pytest.mark.parametrize("ns", [(4, 4), (2, 7, 3), (5, 1), (5, 0)])
def test_the_one_step_has_the_weighted_averages_of_all(ns):
    ranks = [readings(n, seed, squares=0.4 if seed else None) for seed, n in enumerate(ns)]
    each = [localstats.parts(r) for r in ranks]
    fields = ("pairs", "free", "grad", "trace")
    n, s, q = localstats.step(localstats.Parts(*(sum(getattr(p, f) for p in each) for f in fields)))
    good = [r for r in ranks if r.n > 1]
    for i in range(3):
        g, t = unbiased(n, n * s[i], q[i], 1 / n)
        close(g, np.average([of(r, i)[0] for r in good], weights=[r.n * (r.n - 1) for r in good]))
        close(t, np.average([of(r, i)[1] for r in good], weights=[r.n - 1 for r in good]))
    assert n == ns[0] or len(set(ns)) > 1


def test_no_rank_with_two_examples_gives_no_step():
    each = localstats.parts(readings(1, 0))
    assert localstats.step(each)[0] == 0 and not each.free


def test_the_unit_names_local_statistics():
    steps = [StepSums(i, 8, 2.0 + i, 1.0, local=True, n_tokens=80) for i in range(3)]
    assert estimate(steps).unit.startswith("examples (mean 10 tokens), local statistics")
    assert "local" not in estimate([StepSums(i, 8, 2.0 + i, 1.0) for i in range(3)]).unit
