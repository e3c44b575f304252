"""A tally adds up what the layers of a call hand in: sums over examples, over layers, and rows seen."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gns import GNSMonitor
from gns.capture.plan import plan
from gns.capture.tally import Carriers, Tallies
from tests.reference.tolerances import close

KIND = torch.device("cpu"), torch.float64


def made(model):
    found = plan(model)
    return found, Tallies(found.taps, found.entries)


def deep(layers=2, bias=False):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6, bias=bias, dtype=torch.float64) for _ in range(layers)))


def returned(tallies, norms, n=3):
    """Read the tally after each tap returned its norms, and the call's own sum."""
    carriers = Carriers(n)
    outs, grads = [], []
    for tap, found in zip(tallies.taps, norms, strict=True):
        for carrier, values in zip(carriers.of(tap), found, strict=True):
            if values is not None:
                outs.append(carrier)
                grads.append(torch.tensor(values, dtype=torch.float64))
    torch.autograd.backward(outs, grads)
    (tally,) = tallies.members
    return tallies.by_entry([tally.read().numpy()], []), carriers.sq_norms()


def test_sums_are_over_examples_for_each_parameter_and_over_layers_for_each_example():
    _, tallies = made(deep(2, bias=True))
    norms = [([1.0, 2, 3], [4.0, 0, 0]), ([0.5, 0.5, 0.5], [7.0, 1, 2])]
    (sums, rows), (each,) = returned(tallies, norms)
    assert list(sums) == [6, 4, 1.5, 10] and list(rows) == [3, 3, 3, 3]
    assert each.tolist() == [12.5, 3.5, 5.5]


def test_a_layer_that_was_not_reached_has_seen_no_rows():
    _, tallies = made(deep(3))
    (sums, rows), (each,) = returned(tallies, [([1.0, 2, 3],), (None,), ([1.0, 1, 1],)])
    assert list(sums) == [6, 0, 3] and list(rows) == [3, 0, 3] and each.tolist() == [2, 3, 4]
    (sums, rows), _ = returned(tallies, [(None,), ([1.0, 1, 1],), (None,)])  # another call adds
    assert list(sums) == [6, 3, 3] and list(rows) == [3, 3, 3]


def test_what_is_left_out_counts_for_the_parameter_and_not_for_the_examples():
    found, tallies = made(deep(2))
    found.entries[0].leave_out()
    (sums, _), (each,) = returned(tallies, [([1.0, 2, 3],), ([5.0, 6, 7],)])
    assert list(sums) == [6, 18] and each.tolist() == [5, 6, 7]


def test_a_tap_with_sums_of_its_own_adds_them():
    _, tallies = made(deep(2))
    returned(tallies, [([1.0, 2, 3],), ([5.0, 6, 7],)])
    sums, rows = tallies.by_entry(
        [tallies.members[0].read().numpy()], [(tallies.taps[1], torch.tensor([10.0, 4.0]).numpy())]
    )
    assert list(sums) == [6, 28] and list(rows) == [3, 7]
    tallies.drop()
    sums, rows = tallies.by_entry([tallies.members[0].read().numpy()], [])
    assert not sums.any() and not rows.any()


def test_an_error_of_a_tally_reaches_the_tap_and_not_the_loop():
    _, tallies = made(deep(1))
    seen = []
    tallies.taps[0].on_error = seen.append
    tallies.members[0].added = lambda *given: 1 / 0
    returned(tallies, [([1.0, 2, 3],)])
    assert [type(error) for error in seen] == [ZeroDivisionError]


def test_carriers_keep_neither_tally_nor_model_alive():
    model = deep(1)
    _, tallies = made(model)
    carriers = Carriers(3)
    out = carriers.of(tallies.taps[0])
    gone = weakref.ref(tallies.members[0])
    del tallies, model, _, carriers
    gc.collect()
    assert gone() is None
    torch.autograd.backward(out, [torch.ones(3, dtype=torch.float64)])  # and is no error


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket._qualified_op_name.rpartition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def operations(model, x):
    """Operations of a measured step without a self-check, in forward and backward alone."""
    with GNSMonitor(model, on_error="raise") as monitor:
        for _ in range(8):
            model(x).square().mean().backward()
            monitor._collector.end_step()
            model.zero_grad()
        with Operations() as found:
            model(x).square().mean().backward()
        monitor._collector.end_step()
    return found.seen


def test_a_layer_more_costs_three_kernels_more_and_two_to_read_its_gradient():
    x = torch.randn(4, 9, 6, dtype=torch.float64)
    plain = Counter()
    for layers in (2, 5):
        model = deep(layers)
        with Operations() as found:
            model(x).square().mean().backward()
        plain[layers] = found.seen
    watched = {layers: operations(deep(layers), x) for layers in (2, 5)}
    more = watched[5] - watched[2]
    more.subtract(plain[5] - plain[2])
    views = {"detach", "view", "_unsafe_view", "transpose", "t", "new_empty"}
    kernels = {name: count for name, count in more.items() if count and name not in views}
    # Gram or product, squares, sum; and squares and sum of `.grad`
    assert sum(kernels.values()) == 3 * 5, kernels
    assert "stack" not in kernels and "add" not in kernels, kernels


@pytest.mark.parametrize("passes", [1, 3])
def test_copies_made_in_between_do_not_write_into_it(passes):
    model = deep(2, bias=True)
    x = torch.randn(4, 3, 6, dtype=torch.float64)

    def measured(between):
        model.zero_grad()
        with GNSMonitor(model, on_error="raise") as monitor:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            for _ in range(passes):
                model(x).square().mean().backward()
            between()
            optimizer.step()
        return monitor.latest

    plain = measured(lambda: None)
    step = measured(lambda: copy.deepcopy(model)(x).square().mean().backward())
    close(step.mean_sq_norm, plain.mean_sq_norm, rtol=1e-12)
    assert step.n_examples == 4 * passes and step.reason is None
    close(step.sq_norm_of_mean, sum(float(p.grad.square().sum()) for p in model.parameters()))
