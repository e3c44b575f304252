"""A monitor's own summaries: what it says live stands between looks, and is forgotten with the sums."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch

from gns import GNSMonitor
from gns.estimate import estimate
from gns.monitor import GNSWarning
from gns.packing import pack_estimate, unpack_estimate
from gns.statistics import live as looking
from gns.statistics import views


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


def test_a_full_history_makes_no_look_however_many_of_its_steps_are_usable():
    """The first steps are not usable: as they are let go of, more and more of those held are."""
    monitor = trained(48, history=48)
    held = list(monitor._history)
    monitor._history.clear()
    monitor._history.extend([replace(s, reason="not usable") if s.step < 10 else s for s in held])
    first = monitor.live()
    assert first.n_steps == 32
    with monitor:
        train(monitor.model, 20)
    assert looking.live(monitor.history).n_steps == 40
    assert monitor.live() is first


def test_each_level_has_a_set_that_stands():
    monitor = trained(26, history=26)
    sets = [monitor.live(level=level) for level in (0.9, 0.95)]
    with monitor:
        train(monitor.model, 20)
    assert all(monitor.live(level=e.level) is e for e in sets)
    late = monitor.live(level=0.8)
    with monitor:
        train(monitor.model, 5)
    assert monitor.live(level=0.8) is late, "asked for late, it is made once"


@pytest.mark.parametrize("history", [26, 60])
def test_a_resumed_training_goes_on_with_the_set_that_stands(history):
    """A look at the steps that a full history happens to hold at each resume would spend the error anew."""
    monitor = trained(26, history=history)
    first = monitor.live()
    with monitor:
        train(monitor.model, 20)
    state = json.loads(json.dumps(monitor.state_dict()))
    full = history == 26
    assert (bool(state["looks"]), state["let_go"]) == (full, full)
    resumed = GNSMonitor(monitor.model, history=history)
    resumed.load_state_dict(state)
    made = resumed.live()
    assert made == (first if full else replace(monitor.live(), coverage=None))
    if full:
        assert made.moments == first.moments and made.outlook() == first.outlook()
    smaller = GNSMonitor(monitor.model, history=21)
    smaller.load_state_dict(state)
    assert smaller._let_go


def test_fields_of_a_later_version_are_left_out_of_a_packed_estimate():
    found = looking.live(trained(25).history)
    packed = json.loads(json.dumps(pack_estimate(found)))
    packed["unheard"] = packed["moments"]["unheard"] = [1.0]
    read = unpack_estimate(packed)
    assert read == found and read.moments == found.moments is not None


def test_a_state_of_before_there_were_looks_is_read():
    monitor = trained(30)
    state = monitor.state_dict()
    assert state.pop("looks") == [] and state.pop("let_go") is False
    resumed = GNSMonitor(monitor.model)
    resumed.load_state_dict(state)
    assert resumed.live().low == monitor.live().low


def test_resuming_in_another_metric_leaves_the_old_steps_out_and_says_so():
    """Sums in two metrics do not add: a log of the training would raise in the user's loop."""
    monitor = trained(30)
    resumed = GNSMonitor(monitor.model, metric="adam")
    with pytest.warns(GNSWarning, match="30 of the 30 steps in the loaded state are not in metric 'adam'"):
        resumed.load_state_dict(monitor.state_dict())
    assert resumed.history == [] and resumed.estimate().n_steps == resumed.live().n_steps == 0
    with resumed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GNSWarning)
            train(resumed.model, 2)
    assert [s.step for s in resumed.history] == [30, 31]


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
