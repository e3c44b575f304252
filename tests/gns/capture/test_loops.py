"""Loops whose graphs, calls and optimizers do not keep to one step after the other."""

import copy

import pytest
import torch
from torch import nn

from gns.monitor import GNSMonitor
from gns.reasons import CROSSED, UNREACHED, UNSEEN
from tests.reference.per_example import contributions, joint, trainable
from tests.reference.tolerances import close

SGD = torch.optim.SGD


def layers(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data(n, count):
    return [torch.randn(n, 5, dtype=torch.double) for _ in range(count)]


def sums_of(model, x):
    """(m, q) of a loss that is the sum over examples."""
    at = copy.deepcopy(model)
    losses = [lambda row=x[i : i + 1]: at(row).square().sum() for i in range(len(x))]
    return joint(contributions(trainable(at), losses))


def overlapped(every, n_steps=8):
    """A loop that calls the model on the next step's first batch before it steps: [(record, twin's sums)].

    One linear layer: its gradient does not need the weights, which the step changes in place.
    """
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    optimizer = SGD(model.parameters(), lr=0.05)

    def of(x):
        return contributions(
            trainable(model), [lambda row=x[i : i + 1]: model(row).square().sum() for i in range(len(x))]
        )

    found, ahead, known = [], None, []
    with GNSMonitor(model, every=every, on_error="raise") as monitor:
        for x, following in zip(data(3, n_steps), data(4, n_steps), strict=True):
            own = known
            if ahead is not None:
                ahead.backward()
            with_own = own + of(x)
            model(x).square().sum().backward()
            known, ahead = of(following), model(following).square().sum()
            optimizer.step()
            optimizer.zero_grad()
            found.append((monitor.latest, len(with_own), joint(with_own)))
    return monitor, found


def test_a_graph_of_before_the_step_is_measured_and_not_held_against_the_check():
    """Sums were right, but what the check had collected was not all: step 3 left every parameter out."""
    monitor, found = overlapped(every=1)
    for step, n, (m, q) in found:
        assert step.usable and step.n_examples == n
        close([step.mean_sq_norm, step.sq_norm_of_mean], [m, q])
    assert monitor.coverage().share == 1 and not monitor.coverage().reasons


@pytest.mark.filterwarnings("ignore:optimizer step:gns.notices.GNSWarning")
def test_a_graph_of_a_step_between_measured_ones_is_refused():
    """Its layers were not tapped: three examples of seven were counted, without a word."""
    _, found = overlapped(every=2)
    first, *later = [step for step, *_ in found[::2]]
    assert first.usable and first.n_examples == 3
    assert [step.reason for step in later] == [CROSSED] * 3


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x, bad=False):
        h = torch.tanh(self.encoder(x))
        if bad:
            raise MemoryError("out of memory")
        return self.head(h)


@pytest.mark.filterwarnings("ignore:the model's own call was not seen:gns.notices.GNSWarning")
def test_a_call_that_raised_is_over():
    """Layers that are called next, by themselves, were placed among its six rows and left out for good."""
    torch.manual_seed(0)
    model = Halves().double()
    optimizer = SGD(model.parameters(), lr=0.01)
    with GNSMonitor(model, on_error="raise") as monitor:
        for k, x in enumerate(data(4, 3)):
            if k == 1:
                with pytest.raises(MemoryError):
                    model(torch.randn(6, 5, dtype=torch.double), bad=True)
            model.head(torch.tanh(model.encoder(x))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert monitor.latest.usable and monitor.latest.n_examples == 4
    assert monitor.coverage().share == 1


def test_another_models_steps_after_a_dry_run_are_no_engine_that_hides_gradients():
    model, other = layers(), layers(1)
    optimizer, others = SGD(model.parameters(), lr=0.01), SGD(other.parameters(), lr=0.01)
    with GNSMonitor(model, on_error="raise") as monitor:
        model(torch.randn(64, 5, dtype=torch.double)).square().sum().backward()  # does the batch fit?
        optimizer.zero_grad()
        for x in data(8, 8):
            other(x).square().sum().backward()
            others.step()
            others.zero_grad()
        for x in data(8, 4):
            m, q = sums_of(model, x)
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            step = monitor.latest
            assert step.usable and step.n_examples == 8 and not step.local
            close([step.mean_sq_norm, step.sq_norm_of_mean], [m, q])
    assert [step.step for step in monitor.history] == [0, 1, 2, 3]


class Functional(nn.Module):
    """Its layer is never called: its weight is used."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


def test_parameters_that_nothing_has_reached_are_not_called_measured():
    torch.manual_seed(0)
    model = Functional()
    optimizer = SGD(model.parameters(), lr=0.01)
    with pytest.warns(match="gives no estimate"), GNSMonitor(model, on_error="raise") as monitor:
        for x in torch.randn(3, 4, 5):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert {step.reason for step in monitor.history} == {UNSEEN}
    assert monitor.coverage().share == 0
    assert set(monitor.coverage().reasons.values()) == {UNREACHED}


class Giving(nn.Module):
    """It returns a parameter too, as heads with a fused loss do."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return {"out": self.head(x), "weight": self.head.weight}


@pytest.mark.parametrize("every", [1, 2])
def test_a_parameter_among_the_outputs_is_left_alone(every):
    torch.manual_seed(0)
    model = Giving().double()
    optimizer = SGD(model.parameters(), lr=0.01)
    with GNSMonitor(model, every=every, on_error="raise") as monitor:
        for x in data(4, 4):
            model(x)["out"].square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(step.usable and step.n_examples == 4 for step in monitor.history)
    assert not model.head.weight._backward_hooks


@pytest.mark.filterwarnings("ignore:.*torch.autograd.function.Function.*:DeprecationWarning")  # dynamo's own
@pytest.mark.filterwarnings("ignore:the model's own call was not seen:gns.notices.GNSWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "eager"])  # the second leaves the backward pass as it is
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_model_has_no_graph_break(every, backend, autocast):
    """What was asked between measured steps, and under autocast, cannot be compiled: fullgraph raised."""
    torch._dynamo.reset()
    model = layers().float()
    optimizer = SGD(model.parameters(), lr=0.01)
    with GNSMonitor(model, every=every, on_error="raise") as monitor:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for x in torch.randn(5, 4, 5):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = compiled(x)
            out.float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [step.n_examples for step in monitor.history] == [4] * len(range(0, 5, every))
    assert all(step.usable for step in monitor.history)
    torch._dynamo.reset()
