"""Odd loops, each planted: measured right, or refused with the reason, and training left alone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from gns.monitor import GNSMonitor, GNSWarning
from gns.reasons import LATE, LEFTOVER, UNSEEN
from tests.gns.fault_tools import agree, draw, go, loss_of, mlp, sgd, truth, warned
from tests.gns.matrix_engines import compiler_noise
from tests.gns.matrix_models import _config, batch, build, quiet


@pytest.fixture
def model():
    return mlp()


# which parameters train


def test_a_layer_frozen_and_unfrozen_again_is_right_in_every_step(model):
    optimizer = sgd(model)
    with GNSMonitor(model, on_error="raise") as monitor:
        for k in range(9):
            model[2].requires_grad_(not 3 <= k < 6)
            expected = truth(model, x := draw(seed=k))
            go(model, optimizer, x)
            agree(monitor.latest, expected)
    assert monitor.coverage().share == 1


def test_a_layer_unfrozen_after_attach_is_warned_about_and_the_rest_stays_right(model):
    model[2].requires_grad_(False)
    names = [name for name, _ in model.named_parameters() if not name.startswith("2.")]
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("always", category=GNSWarning)
        with GNSMonitor(model, on_error="raise") as monitor:
            for k in range(12):
                model[2].requires_grad_(k >= 2)
                expected = truth(model, x := draw(seed=k), names)
                go(model, optimizer, x)
                agree(monitor.latest, expected)
            assert set(monitor.coverage().unmeasured) == {"2.weight", "2.bias"}
    assert len(warned(said, LATE)) == 1


@pytest.mark.parametrize("owned", ["all", "new"])
def test_an_adapter_added_after_attach_is_warned_about(owned):
    model = build("llama", "lora")
    with warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("always", category=GNSWarning)
        with GNSMonitor(model, on_error="raise") as monitor:
            with quiet():
                model.add_adapter("late", _config("llama"))
                model.set_adapter("late")
            owned = [p for p in model.parameters() if owned == "all" or p.requires_grad]
            optimizer = torch.optim.SGD(owned, lr=0.01)
            for _ in range(3):
                optimizer.zero_grad()
                model(**batch()).loss.backward()
                optimizer.step()
            late = [name for name, why in monitor.coverage().reasons.items() if why == LATE]
    assert late and all(".late." in name for name in late)
    assert not any(s.usable for s in monitor.history)
    assert len(warned(said, LATE)) == 1


def test_an_adapter_switched_after_attach_is_warned_about_and_right_when_it_is_back():
    model = build("llama", "several adapters", torch.float64)
    fresh = build("llama", "several adapters", torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("always", category=GNSWarning)
        with GNSMonitor(model, on_error="raise") as monitor:
            for k in range(4):
                model.set_adapter("other" if k in (0, 3) else "default")
                optimizer.zero_grad()
                model(**batch()).loss.backward()
                optimizer.step()
            history = [s for s in monitor.history if s.usable]
        with GNSMonitor(fresh, on_error="raise") as reference:
            model, optimizer = fresh, torch.optim.SGD(fresh.parameters(), lr=0.0)
            model(**batch()).loss.backward()
            optimizer.step()
    assert len(history) == 2
    for s in history:
        agree(s, [reference.latest.mean_sq_norm, reference.latest.sq_norm_of_mean])
    assert len(warned(said, LATE)) == 1


@pytest.mark.parametrize("adapters", [["default"], ["default", "other"]])
def test_what_is_active_at_attach_is_measured(adapters):
    model = build("llama", "several adapters")
    model.base_model.set_adapter(adapters)
    with GNSMonitor(model, on_error="raise") as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        model(**batch()).loss.backward()
        optimizer.step()
        assert monitor.latest.usable
    assert monitor.coverage().share == 1
    assert {name.split(".")[-2] for name in monitor.coverage().measured} == set(adapters)
    assert monitor.coverage().verified == frozenset(monitor.coverage().measured)


# gradients that come in other ways


def refused(model, take, why, steps=3):
    """Train with gradients from `take`; every step must be refused for the reason, and warned about once."""
    optimizer, twin = sgd(model), copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as said, compiler_noise():
        warnings.filterwarnings("always", category=GNSWarning)
        with GNSMonitor(model, on_error="raise") as monitor:
            for k in range(steps):
                optimizer.zero_grad()
                take(model, draw(seed=k))
                optimizer.step()
    assert [s.step for s in monitor.history] == list(range(steps))
    assert all(why in (s.reason or "") for s in monitor.history), monitor.history
    assert len(warned(said, why)) == 1
    optimizer = sgd(twin)
    for k in range(steps):
        optimizer.zero_grad()
        take(twin, draw(seed=k))
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    return monitor


def test_gradients_of_chosen_inputs_are_refused(model):
    refused(model, lambda m, x: loss_of(m, x).backward(inputs=list(m.parameters())), UNSEEN)


def test_gradients_of_chosen_inputs_before_a_full_pass_are_refused(model):
    def take(m, x):
        loss_of(m, x).backward(inputs=[m[0].weight])
        loss_of(m, x).backward()

    refused(model, take, LEFTOVER)


def test_gradients_set_by_hand_are_refused(model):
    def take(m, x):
        parameters = list(m.parameters())
        for p, g in zip(parameters, torch.autograd.grad(loss_of(m, x), parameters), strict=True):
            p.grad = g

    refused(model, take, UNSEEN)


def test_torch_autograd_grad_between_steps_counts_nothing(model):
    optimizer = sgd(model)
    with GNSMonitor(model, on_error="raise") as monitor:
        for k in range(3):
            expected = truth(model, x := draw(seed=k))
            optimizer.zero_grad()
            loss = loss_of(model, x)
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)  # of the same graph
            loss.backward()
            torch.autograd.grad(loss_of(model, x.repeat(2, 1)), model[0].weight)
            optimizer.step()
            agree(monitor.latest, expected)


def test_a_graph_run_backward_twice_is_refused_and_the_next_step_is_right(model):
    optimizer = sgd(model)
    with pytest.warns(GNSWarning, match="backward twice"), GNSMonitor(model, on_error="raise") as monitor:
        loss = loss_of(model, draw())
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        expected = truth(model, x := draw(seed=2))
        go(model, optimizer, x)
        assert "backward twice" in monitor.history[0].reason
        agree(monitor.latest, expected)


@pytest.mark.parametrize("how", ["whole", "by layers"])
def test_attached_after_the_model_was_compiled_and_called_is_noticed(model, how):
    torch._dynamo.reset()
    if how == "whole":
        call = torch.compile(model, backend="aot_eager")
    else:
        call = model
        model[2].compile(backend="aot_eager")
    with compiler_noise():
        loss_of(call, draw()).backward()
        model.zero_grad()
        with warnings.catch_warnings(record=True) as said:
            warnings.filterwarnings("always", category=GNSWarning)
            with GNSMonitor(model, on_error="raise") as monitor:
                optimizer = sgd(model)
                expected = []
                for k in range(3):
                    expected.append(truth(model, x := draw(seed=k)))
                    go(call, optimizer, x)
                history = monitor.history
    assert len(history) == 3
    if history[0].usable:  # the compiler saw the hooks
        for s, e in zip(history, expected, strict=True):
            agree(s, e)
    else:
        assert all(s.reason == UNSEEN for s in history)
        assert len(warned(said, "attach first, then compile")) == 1


# layers called on what is no batch


class Identity(nn.Module):
    """A layer whose weight is also read by calling it on an identity matrix, in the graph."""

    def __init__(self):
        super().__init__()
        self.honest, self.read = nn.Linear(5, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x):
        return torch.tanh(self.honest(x)) @ self.read(torch.eye(5, dtype=x.dtype))


class OneVector(Identity):
    """A layer called on a vector, without a batch dimension."""

    def forward(self, x):
        return torch.tanh(self.honest(x)).sum(-1, keepdim=True) * self.read(torch.ones(5, dtype=x.dtype))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Identity, "5 rows where the model's call has 6"),
        (OneVector, "without a batch"),
    ],
)
def test_a_layer_called_on_no_batch_leaves_both_sums(seed, kind, why):
    model = kind().double()
    optimizer = sgd(model)
    with pytest.warns(GNSWarning, match="not measured: read.weight"):
        with GNSMonitor(model, on_error="raise") as monitor:
            for k in range(3):
                expected = truth(model, x := draw(seed=k), ["honest.weight", "honest.bias"])
                go(model, optimizer, x)
                agree(monitor.latest, expected)
            assert why in monitor.coverage().reasons["read.weight"]


def test_an_identity_as_large_as_the_batch_is_found_out_by_the_next_batch_and_the_past_is_corrected(seed):
    """The limit of what shapes can tell: the rows of one batch of 5 look like its examples."""
    model = Identity().double()
    optimizer = sgd(model)
    kept = ["honest.weight", "honest.bias"]
    with pytest.warns(GNSWarning, match="not measured: read.weight"):
        with GNSMonitor(model, on_error="raise") as monitor:
            expected = []
            for n in (5, 6):
                expected.append(truth(model, x := draw(n), kept))
                go(model, optimizer, x)
            for s, e in zip(monitor.history, expected, strict=True):
                agree(s, e)


# the user's own hooks


HOOKS = {
    "changes the output before the tap": (lambda m: m[0].register_forward_hook(lambda *a: a[2] * 2), False),
    "changes the input": (lambda m: m[2].register_forward_pre_hook(lambda _, a: (a[0] * 2,)), True),
    "changes the gradient of the output": (
        lambda m: m[2].register_full_backward_pre_hook(lambda _, g: (g[0] * 2,)),
        True,
    ),
    "changes the gradient of the input": (
        lambda m: m[2].register_full_backward_hook(lambda _, i, o: (i[0] * 2,)),
        True,
    ),
    "changes the gradient of a weight": (lambda m: m[0].weight.register_hook(lambda g: 2 * g), False),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_the_user_are_measured_through_or_found_out(model, name, when):
    plant, exact = HOOKS[name]
    exact = exact or (when == "after" and "output before" in name)
    if when == "before":
        plant(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("always", category=GNSWarning)
        with GNSMonitor(model, on_error="raise") as monitor:
            if when == "after":
                plant(model)
            optimizer = sgd(model)
            for k in range(3):
                gone = set(monitor.coverage().unmeasured)
                x = draw(seed=k)
                left = [n for n, _ in model.named_parameters() if n not in gone]
                expected = truth(model, x, left)
                go(model, optimizer, x)
                if exact or k:  # the first step's self-check takes the parameter out
                    agree(monitor.latest, expected)
            assert bool(monitor.coverage().unmeasured) != exact
    assert bool(warned(said, "self-check failed")) != exact


def test_only_measured_parameters_are_verified(seed):
    model = nn.Sequential(nn.Linear(5, 5), Repeated()).double()
    optimizer = sgd(model)
    with pytest.warns(GNSWarning, match="not measured"), GNSMonitor(model, on_error="raise") as monitor:
        for k in range(3):
            go(model, optimizer, draw(seed=k))
        coverage = monitor.coverage()
    assert coverage.unmeasured and coverage.measured
    assert coverage.verified <= coverage.measured.keys()


class Repeated(nn.Module):
    """A layer that sees each example in two rows."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 3)

    def forward(self, x):
        return self.inner(x.repeat(2, 1)).reshape(2, len(x), -1).sum(0)
