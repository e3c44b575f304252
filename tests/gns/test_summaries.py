"""A monitor's own summaries: what it says live stands between looks, and is forgotten with the sums."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from gns import GNSMonitor, views
from gns import live as looking
from gns.estimate import estimate


def trained(steps: int, **options) -> GNSMonitor:
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 2)
    monitor = GNSMonitor(model, **options)
    with monitor:
        train(model, steps)
    return monitor


def train(model, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for x in torch.randn(steps, 8, 6):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def test_live_is_the_live_set_of_the_history_with_its_coverage():
    monitor = trained(30)
    made, bare = monitor.live(), looking.live(monitor.history)
    assert (made.low, made.high, made.n_steps, made.coverage) == (bare.low, bare.high, 25, 1.0)
    assert monitor.estimate().n_steps == 30 and monitor.estimate(last=7).n_steps == 7
    assert monitor.estimate().low == estimate(monitor.history).low


def test_between_looks_nothing_is_computed_anew(monkeypatch):
    monitor, asked = trained(30), []
    true = looking.live
    monkeypatch.setattr(looking, "live", lambda *a, **k: asked.append(1) or true(*a, **k))
    first = monitor.live()
    assert monitor.live() is first and len(asked) == 1
    assert monitor.live(level=0.9).level == 0.9 and len(asked) == 2
    with monitor:
        train(monitor.model, 3)
    assert monitor.live(level=0.9).n_steps == 32 and len(asked) == 3


def test_before_the_first_look_it_is_asked_each_time():
    monitor = trained(5)
    assert (monitor.live().n_steps, monitor.live().high) == (5, math.inf)
    with monitor:
        train(monitor.model, 1)
    assert monitor.live().n_steps == 6


def test_a_full_history_lets_the_last_set_stand():
    monitor = trained(26, history=26)
    first = monitor.live()
    with monitor:
        train(monitor.model, 20)
    assert len(monitor.history) == 26
    assert monitor.live() is first


def test_parameters_left_out_since_and_a_loaded_state_make_a_new_set():
    monitor = trained(30)
    first = monitor.live()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monitor._exclude({"weight": "left out here"})
    second = monitor.live()
    assert second is not first and second.b_simple == looking.live(monitor.history).b_simple != first.b_simple
    other = trained(40)
    monitor.load_state_dict(other.state_dict())
    assert monitor.live().n_steps == 40


def test_progress_weighted_is_that_view_of_the_history():
    monitor = trained(30)
    mine, bare = (
        monitor.progress_weighted(batch_size=4),
        views.progress_weighted(monitor.history, batch_size=4),
    )
    assert (mine.b_simple, mine.low, mine.view) == (
        bare.b_simple,
        bare.low,
        "progress-weighted mean of B at batch 4",
    )
    assert mine.coverage == 1.0 and bare.coverage is None
    assert monitor.progress_weighted().view.endswith("at batch 8")
    with pytest.raises(ValueError, match="batch_size is -1"):
        monitor.progress_weighted(batch_size=-1)
