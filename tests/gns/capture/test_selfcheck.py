"""The self-check: what it tolerates, what it looks at in which step, and what it keeps out of both sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from gns.capture import selfcheck
from gns.capture.plan import plan
from gns.capture.selfcheck import ROUND, SHOWN, TRIES, SelfCheck, tolerance
from gns.monitor import GNSMonitor, GNSWarning
from gns.reasons import UNSEEN
from gns.sums import StepSums
from tests.reference.per_example import contributions, joint, trainable
from tests.reference.tolerances import close


@pytest.fixture
def model(seed):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def step(model, x, optimizer=None, loss=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad()
    (model(x).square().sum() if loss is None else loss(model(x))).backward()
    optimizer.step()


# tolerances


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tolerances_grow_with_the_rounding_of_the_dtype(dtype):
    eps = torch.finfo(dtype).eps
    assert eps < tolerance(dtype, 1.0, 0.0) < 0.1
    assert eps / 4 < tolerance(dtype, 0.0, 1.0) < tolerance(dtype, 1.0, 0.0)
    assert tolerance(dtype, 3.0, 2.0) == pytest.approx(
        3 * tolerance(dtype, 1, 0) + 2 * tolerance(dtype, 0, 1)
    )


def test_an_unknown_dtype_is_treated_as_the_coarsest():
    assert tolerance(torch.float8_e4m3fn, 1.0, 1.0) >= tolerance(torch.bfloat16, 1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_missed_example_is_beyond_the_tolerance(dtype):
    """One of 100 equal examples is missing: ‖Σc − ḡ‖ = ‖ḡ‖/100 (one of 1,000 passes in float32)."""
    assert (1 / 100) > tolerance(dtype, 1.0, 1.0)


# rounds


@pytest.fixture
def no_early_rounds(monkeypatch):
    monkeypatch.setattr(selfcheck, "EARLY", ())


def test_early_rounds_begin_before_the_hundredth_step(model):
    check = SelfCheck(plan(model).entries)
    opened = []
    for measured in range(ROUND + 1):
        check.begin(measured)
        names = check.open_names()
        check.end()
        check.conclude(names, names, usable=True)
        opened += [measured] if names else []
    assert opened == [0, *selfcheck.EARLY, ROUND] and selfcheck.EARLY


@pytest.mark.usefixtures("no_early_rounds")
def test_rounds_open_all_parameters_again_every_hundredth_measured_step(model):
    check = SelfCheck(plan(model).entries)
    opened = []
    for measured in range(2 * ROUND + 1):
        check.begin(measured)
        opened.append(len(check.open_names()))
        names = check.open_names()
        check.end()
        check.conclude(names, names[:2] if measured % ROUND == 0 else (), usable=True)
    assert opened[:5] == [4, 2, 2, 0, 0]
    assert opened[ROUND : ROUND + 5] == [4, 2, 2, 0, 0]
    assert opened[2 * ROUND] == 4
    assert sum(opened) == 8 * 2 + 4
    assert TRIES == 3


@pytest.mark.usefixtures("no_early_rounds")
def test_steps_that_are_not_usable_are_no_tries_but_not_for_ever(model):
    check = SelfCheck(plan(model).entries)
    opened = []
    for measured in range(SHOWN + 5):
        check.begin(measured)
        names = check.open_names()
        opened.append(len(names))
        check.end()
        check.conclude(names, (), usable=False)
    assert opened == [4] * SHOWN + [0] * 5


def test_a_round_begins_where_a_run_is_resumed(model):
    check = SelfCheck(plan(model).entries)
    check.begin(37)
    assert len(check.open_names()) == 4


@pytest.mark.usefixtures("no_early_rounds")
def test_memory_is_bounded_and_the_round_goes_on(model, monkeypatch):
    monkeypatch.setattr(selfcheck, "BUDGET_BYTES", 4 * 16)  # 12 + 4 scalars
    check = SelfCheck(plan(model).entries)
    seen = []
    for measured in range(6):
        check.begin(measured)
        seen.append(check.open_names())
        check.end()
        check.conclude(seen[-1], seen[-1], usable=True)
    assert seen[:2] == [("0.weight", "0.bias"), ("2.weight", "2.bias")]
    assert seen[2:] == [()] * 4


def test_a_parameter_beyond_the_budget_is_checked_alone(model, monkeypatch):
    monkeypatch.setattr(selfcheck, "BUDGET_BYTES", 1)
    check = SelfCheck(plan(model).entries)
    check.begin(0)
    assert check.open_names() == ("0.weight",)


def test_nothing_is_kept_after_the_step(model):
    found = plan(model)
    check = SelfCheck(found.entries)
    check.begin(0)
    assert all(tap.checks for tap in found.taps)
    check.end()
    assert not any(tap.checks for tap in found.taps)


def test_compare_gives_the_norm_of_the_difference(model):
    found = plan(model)
    check = SelfCheck(found.entries)
    check.begin(0)
    gradients = [torch.full_like(e.parameter, 2.0) for e in found.entries]
    gradients[1] = None
    found.taps[0].checks["weight"].grad = torch.full((4, 3), 1.5, dtype=torch.float64)
    found.taps[0].checks["bias"].grad = torch.full((4,), 3.0, dtype=torch.float64)
    differences = check.compare(gradients)
    close(torch.stack(differences), [0.5 * math.sqrt(12), 6, 2 * math.sqrt(8), 2 * math.sqrt(2)])


def test_projections_stand_for_the_difference(model):
    """With a seed, what ranks exchange: S Σc and S ḡ, whose difference has about the same norm."""
    found = plan(model)
    check = SelfCheck(found.entries)
    check.begin(0)
    gradients = [torch.full_like(e.parameter, 2.0).detach() for e in found.entries]
    found.taps[0].checks["weight"].grad = torch.randn(4, 3, dtype=torch.float64)
    sums, grads = check.compare(gradients, seed=5)[0]
    expected = check.compare(gradients)[0]
    assert 0.3 < float((sums - grads).norm() / expected) < 2
    again, zero = check.compare([None] * 4, seed=5)[0]
    assert torch.equal(again, sums) and not zero.any()


def test_sums_follow_a_model_that_moves_after_attach(model):
    found = plan(model)
    check = SelfCheck(found.entries)
    check.begin(0)
    here, other = found.taps[0], found.taps[1]
    check.follow(here, torch.device("meta"))
    assert {leaf.device.type for leaf in here.checks.values()} == {"meta"}
    assert {leaf.device.type for leaf in other.checks.values()} == {"cpu"}
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in here.checks.values())


# through the monitor


def test_every_parameter_of_a_plain_model_is_verified(model):
    with GNSMonitor(model, on_error="raise") as monitor:
        step(model, torch.randn(4, 3, dtype=torch.float64))
        coverage = monitor.coverage()
    assert coverage.verified == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert coverage.share == 1


class Functional(nn.Module):
    """`tied` is used through its module and by hand; `used` is a plain layer."""

    def __init__(self):
        super().__init__()
        self.tied, self.used = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.used(functional.linear(self.tied(x).tanh(), self.tied.weight))


def check_excluded(model, loss, gone, x):
    """What fails the self-check leaves m and q; the rest equals the slow twin."""
    with GNSMonitor(model, on_error="raise") as monitor, pytest.warns(GNSWarning, match="self-check failed"):
        step(model, x, loss=loss)
        coverage, sums = monitor.coverage(), monitor.latest
    assert set(coverage.unmeasured) == gone
    assert all("self-check failed" in coverage.reasons[name] for name in gone)
    kept = [name for name in trainable(model) if name not in gone]
    assert [name for name, _ in sums.parameters()] == kept
    losses = [lambda i=i: model(x[i : i + 1]).square().sum() for i in range(len(x))]
    close([sums.mean_sq_norm, sums.sq_norm_of_mean], joint(contributions(trainable(model), losses), kept))


def test_a_weight_also_used_by_hand_leaves_both_sums(seed):
    model, x = Functional().double(), torch.randn(5, 3, dtype=torch.float64)
    check_excluded(model, None, {"tied.weight"}, x)


def test_an_auxiliary_loss_on_a_weight_takes_that_weight_out(model):
    x = torch.randn(5, 3, dtype=torch.float64)
    check_excluded(model, lambda out: out.square().sum() + model[0].weight.square().sum(), {"0.weight"}, x)


def test_a_gradient_changed_by_a_hook_takes_the_parameter_out(model):
    x = torch.randn(5, 3, dtype=torch.float64)
    handle = model[2].bias.register_hook(lambda g: 1.01 * g)
    check_excluded(model, None, {"2.bias"}, x)
    handle.remove()


def test_control_without_the_self_check_the_wrong_sum_would_be_reported(seed, monkeypatch):
    monkeypatch.setattr("gns.capture.openstep.tolerance", lambda *_: math.inf)
    model, x = Functional().double(), torch.randn(5, 3, dtype=torch.float64)
    with GNSMonitor(model, on_error="raise") as monitor:
        step(model, x)
        sums = monitor.latest
    losses = [lambda i=i: model(x[i : i + 1]).square().sum() for i in range(5)]
    expected = joint(contributions(trainable(model), losses))
    with pytest.raises(AssertionError, match="ratio"):
        close([sums.mean_sq_norm, sums.sq_norm_of_mean], expected)


def test_a_factor_without_gradient_is_verified_as_soon_as_it_has_one(seed):
    """LoRA: A's gradient is exactly 0 while B = 0."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)).double()
    nn.init.zeros_(model[1].weight)
    x = torch.randn(6, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GNSMonitor(model, on_error="raise") as monitor:
        verified = []
        for _ in range(2):
            step(model, x, optimizer, lambda out: (out - x).square().mean())
            verified.append(monitor.coverage().verified)
    assert verified == [{"1.weight"}, {"0.weight", "1.weight"}]


def test_everything_excluded_later_leaves_no_usable_step(seed, monkeypatch):
    """A parameter found out in a later round also leaves the steps before; none may claim m = q = 0."""
    monkeypatch.setattr(selfcheck, "ROUND", 2)
    model, x = nn.Linear(3, 2, bias=False).double(), torch.randn(4, 3, dtype=torch.float64)
    with GNSMonitor(model, on_error="raise") as monitor:
        for _ in range(2):
            step(model, x)
        with pytest.warns(GNSWarning):
            step(model, x, loss=lambda out: out.square().sum() + model.weight.square().sum())
            history = monitor.history
        estimate = monitor.estimate()
    assert not any(s.usable for s in history)
    assert estimate.n_steps == 0


def test_an_exclusion_reaches_back_over_a_step_without_sums(seed, monkeypatch):
    monkeypatch.setattr(selfcheck, "ROUND", 3)
    model, x = (
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double(),
        torch.randn(4, 3, dtype=torch.float64),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GNSMonitor(model, on_error="raise") as monitor:
        for _ in range(2):
            step(model, x, optimizer)
        step(model, x, optimizer)
        # what an unwatched step leaves: no rows, no layout
        monitor._history.append(StepSums(2, 0, math.nan, math.nan, reason=UNSEEN))
        with pytest.warns(GNSWarning, match="self-check failed"):
            step(model, x, optimizer, lambda out: out.square().sum() + model[0].weight.square().sum())
            history = monitor.history
    assert [len(list(s.parameters())) for s in history] == [3, 3, 3, 0, 3]
    for s in history:
        assert "0.weight" not in [name for name, _ in s.parameters()], f"still in step {s.step}"
