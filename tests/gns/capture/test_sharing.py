"""The weight gradient out of the norms' product: the same training up to rounding, or autograd's own."""

from __future__ import annotations

import collections
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules import module as everywhere
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gns import reducers
from gns.capture import sharing
from gns.monitor import GNSMonitor, GNSWarning
from gns.rules import linear
from gns.rules.base import added
from tests.gns.fault_tools import agree, loss_of, mlp, sgd, truth, warned
from tests.gns.small_models import tokens, train
from tests.gns.test_left_behind import state_of
from tests.gns.test_untouched import build
from tests.reference.tolerances import close

LAYERS = 3  # of the small model
CHECKS = (0, 3, 10)  # steps in which layers form their gradient apart


def draw(n=4, t=11, seed=1, dtype=torch.float64):
    """So many positions that the norms' product is cheaper than the Gram form."""
    return torch.randn(n, t, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def step(model, optimizer, x, loss=loss_of):
    optimizer.zero_grad()
    loss(model, x).backward()
    optimizer.step()


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def equal(found, expected, rtol=1e-12):
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= rtol * float(b.norm())


@pytest.fixture
def shared(monkeypatch):
    """The layers whose weight's gradient came out of the norms' product, in order."""
    seen, own = [], reducers.norms_and_sum

    def noted(rule, layer, *given):
        seen.append(layer)
        return own(rule, layer, *given)

    monkeypatch.setattr(reducers, "norms_and_sum", noted)
    return seen


WATCHING = []


@pytest.fixture(autouse=True)
def _left():
    """A monitor that is left attached would hear the optimizers of the next test."""
    yield
    while WATCHING:
        WATCHING.pop().detach()


def watch(model, **options):
    monitor = GNSMonitor(model, share_weight_gradient=True, **{"on_error": "raise", **options}).attach()
    WATCHING.append(monitor)
    return monitor


# the same gradients, the same readings


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_autograds_and_readings_the_slow_twins(shared, bias):
    model = mlp()
    for layer in (m for m in model if not bias and isinstance(m, nn.Linear)):
        layer.bias = None
    twin = copy.deepcopy(model)
    monitor, optimizer, other = watch(model), sgd(model), sgd(twin)
    for i in range(12):
        x, expected = draw(3 + i % 2, seed=i), truth(model, draw(3 + i % 2, seed=i))
        shared.clear()
        step(model, optimizer, x)
        step(twin, other, x)
        equal(gradients(model), gradients(twin))
        assert len(shared) == (0 if i in CHECKS else LAYERS), i
        agree(monitor.latest, expected)
    names = {f"{i}.weight" for i in (0, 2, 4)}
    assert monitor.coverage().shared == names and monitor.coverage().share == 1
    assert "gradient out of the same product as the norms: 3 parameters" in str(monitor.coverage())


def test_by_default_nothing_is_shared_and_nothing_said(shared):
    model = mlp()
    with GNSMonitor(model, on_error="raise") as monitor:
        for i in range(3):
            step(model, sgd(model), draw(seed=i))
    assert not shared and monitor.coverage().shared is None and "same product" not in str(monitor.coverage())


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_anything_but_a_truth_value_is_refused(value):
    with pytest.raises(TypeError, match=f"share_weight_gradient is {value!r}; True or False is needed"):
        GNSMonitor(mlp(), share_weight_gradient=value)


@pytest.mark.parametrize("every", [1, 2])
def test_accumulation_of_unequal_batches(shared, every):
    model = mlp()
    twin = copy.deepcopy(model)
    monitor, optimizer, other = watch(model, every=every), sgd(model), sgd(twin)
    for i in range(6):
        shared.clear()
        for which, its in ((model, optimizer), (twin, other)):
            its.zero_grad()
            for micro in range(3):
                loss_of(which, draw(2 + micro, seed=10 * i + micro)).div(3).backward()
            its.step()
        equal(gradients(model), gradients(twin))
        measured = i % every == 0 and i // every not in CHECKS
        assert len(shared) == (3 * LAYERS if measured else 0)
    assert [s.n_examples for s in monitor.history] == [9] * (6 // every)


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_both_kinds(shared, reentrant):
    model = Checkpointed(mlp(), reentrant)
    twin = copy.deepcopy(model)
    monitor, optimizer, other = watch(model), sgd(model), sgd(twin)
    for i in range(5):
        expected = truth(twin.inner, draw(seed=i))
        shared.clear()
        step(model, optimizer, draw(seed=i))
        step(twin, other, draw(seed=i))
        equal(gradients(model), gradients(twin))
        assert len(shared) == (0 if i in CHECKS else LAYERS)
        agree(monitor.latest, expected)


def test_a_recomputation_that_decides_otherwise_saves_as_many_tensors(shared):
    model = Checkpointed(mlp(), reentrant=False)
    monitor, optimizer = watch(model), sgd(model)
    step(model, optimizer, draw())
    for first in (True, False):
        twin = copy.deepcopy(model)
        loss_of(twin, draw(seed=2)).backward()
        optimizer.zero_grad()
        for tap in monitor._collector.taps:
            tap.shares = first
        loss = loss_of(model, draw(seed=2))
        for tap in monitor._collector.taps:
            tap.shares = not first
        shared.clear()
        loss.backward()
        equal(gradients(model), gradients(twin))
        assert len(shared) == LAYERS * first


# LoRA, as users train it

SETUPS = {
    "plain": {},
    "dropout": {"dropout": 0.2},
    "checkpointing": {"checkpoint": False},
    "reentrant checkpointing": {"checkpoint": True, "dropout": 0.2},
    "SGD": {"make": torch.optim.SGD},
}


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_lora_is_trained_to_the_same_weights(shared, setup):
    keys = {k: v for k, v in setup.items() if k in ("dropout", "checkpoint")}
    loop, results = {k: v for k, v in setup.items() if k not in keys}, []
    for on in (False, True):
        model = build("llama", torch.float64, **keys)
        torch.manual_seed(7)
        monitor = GNSMonitor(model, on_error="raise", share_weight_gradient=on).attach()
        results.append(train(model, steps=6, **loop))
        monitor.detach()
        if on:
            assert len(shared) == 2 * 4 * 28  # passes of the four steps without a self-check, 28 factors
            assert len(monitor.coverage().shared) == 28
    equal(results[1], results[0], 1e-9)  # Adam divides by the size of gradients, which is small for some


BF16 = 2**-7  # of the gradient's norm: autograd rounds each entry of a product to 8 bits, this sum does not


def test_under_autocast_a_gradient_is_autograds_up_to_its_rounding(shared):
    model = build("llama")
    with watch(model) as monitor:
        for seed in (1, 2):
            found = []
            for on in (True, False):
                for tap in monitor._collector.taps:
                    tap.shares = on and seed == 2
                model.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    model(**tokens(4, seed=seed)).loss.backward()
                found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
            equal(found[0], found[1], BF16)
            alike = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
            assert alike == (seed == 1)
    assert len(shared) == 28


def test_sixteen_bit_weights_get_gradients_of_their_dtype(shared):
    model = mlp().to(torch.bfloat16)
    twin, optimizer = copy.deepcopy(model), sgd(model, 0.0)
    with watch(model):
        for i in range(3):
            step(model, optimizer, draw(seed=i, dtype=torch.bfloat16))
    loss_of(twin, draw(seed=2, dtype=torch.bfloat16)).backward()
    assert all(p.grad.dtype is torch.bfloat16 for p in model.parameters())
    equal(gradients(model), gradients(twin), BF16)
    assert len(shared) == 2 * LAYERS


# what it costs


class Operations(TorchDispatchMode):
    """Counts operations, and the largest tensor that one makes."""

    def __init__(self):
        super().__init__()
        self.seen, self.largest = collections.Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def products(model, x):
    with Operations() as found:
        loss_of(model, x).backward()
    model.zero_grad()
    return sum(found.seen[name] for name in ("mm", "addmm", "bmm", "baddbmm"))


def test_a_measured_step_makes_one_product_less_a_layer():
    counted = {}
    for on in (None, False, True):
        model = mlp()
        monitor = None if on is None else GNSMonitor(model, share_weight_gradient=on).attach()
        for i in range(2):
            step(model, sgd(model), draw(seed=i))
        counted[on] = products(model, draw(seed=9))
        if monitor is not None:
            monitor.detach()
    assert counted[None] == 3 * LAYERS - 1  # the first layer's input needs no gradient
    assert counted[False] == counted[None] + LAYERS
    assert counted[True] == counted[None]


def test_no_byte_more_is_kept_for_backward():
    kept = {}
    for on in (None, False, True):
        model, seen = mlp(), {}
        monitor = None if on is None else GNSMonitor(model, share_weight_gradient=on).attach()
        step(model, sgd(model), draw())

        def pack(t, seen=seen):
            seen[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = loss_of(model, draw())
        kept[on] = sum(t.untyped_storage().nbytes() for t in seen.values())
        del loss
        if monitor is not None:
            monitor.detach()
    assert kept[True] == kept[False] == kept[None]


@pytest.mark.parametrize("limit", [1, 4 * 17, 3 * 4 * 17, 4 * 17 * 13, 3 * 4 * 17 * 13, 2**30])
@pytest.mark.parametrize(("i", "o"), [(17, 13), (13, 17), (2, 17), (17, 2), (1, 17), (17, 1)])
@pytest.mark.parametrize("shape", [(5, 11), (5,), (0, 4), (3, 2, 4), (1, 6)])
def test_norms_and_sum_in_chunks_and_slices(limit, i, o, shape):
    generator = torch.Generator().manual_seed(limit)
    x, dy = (torch.randn(*shape, n, generator=generator, dtype=torch.float64) for n in (i, o))
    blocks = linear.linear_blocks(nn.Linear(i, o), x, dy, "weight")
    with Operations() as found:
        norms, total = linear.linear_together(nn.Linear(i, o), x, dy, "weight", limit)
    close(norms, blocks.square().sum((1, 2)), rtol=1e-12)
    close(total, blocks.sum(0), rtol=1e-12)
    assert total.stride() == (i, 1) and total.shape == (o, i)  # of size 1 too, as DDP compares them
    inputs = max(t.numel() for t in (x, dy, total))
    assert found.largest <= max(inputs, limit // 4, max(i, o))


def test_blocks_beyond_the_cache_are_worked_off_within_it(monkeypatch):
    monkeypatch.setattr(linear, "CACHED", 4 * 100)
    x, dy = torch.randn(3, 4, 40), torch.randn(3, 4, 50)
    sizes, own = [], linear.wide_bmm

    def seen(a, b):
        sizes.append(own(a, b).numel())
        return own(a, b)

    monkeypatch.setattr(linear, "wide_bmm", seen)
    norms, total = linear.linear_together(nn.Linear(40, 50), x, dy, "weight", 2**30)
    assert max(sizes) <= 100 and sum(sizes) == 3 * 40 * 50
    blocks = dy.mT @ x
    close(norms, blocks.square().sum((1, 2)), torch.float32)
    close(total, blocks.sum(0), torch.float32)


def test_it_is_not_shared_where_the_gram_form_costs_less(shared):
    model = mlp()
    with watch(model) as monitor:
        for i in range(3):
            step(model, sgd(model), draw(t=1, seed=i)[:, 0])
    assert not shared and monitor.coverage().shared == frozenset()


def test_a_bias_has_no_such_form():
    with pytest.raises(ValueError, match="parameter 'bias' .* known: 'weight'"):
        linear.linear_together(nn.Linear(2, 2), torch.ones(1, 2, 2), torch.ones(1, 2, 2), "bias", 99)
    rule = linear.replace(linear.LINEAR, together=None)
    with pytest.raises(ValueError, match="the rule of Linear has no form for norms and sum together"):
        reducers.norms_and_sum(rule, nn.Linear(2, 2), torch.ones(1, 2, 2), torch.ones(1, 2, 2), "weight")


# where it does not hold, the layer goes unshared


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Same(nn.Linear):
    pass


def _scaled(layer):
    layer.register_forward_hook(lambda module, args, out: out * 2)


def _prepared(layer):
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _heard(layer):
    layer.register_full_backward_hook(lambda module, into, out: (into[0] * 2,))


def _patched(layer):
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias) * 2


def _subclassed(layer):
    layer.__class__ = Same


ODD = {f.__name__: f for f in (_scaled, _prepared, _heard, _patched, _subclassed)}


@pytest.mark.filterwarnings("ignore::gns.monitor.GNSWarning")  # some of them the self-check leaves out
@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
@pytest.mark.parametrize("first", [True, False], ids=["before attach", "after the first steps"])
def test_a_layer_with_something_odd_goes_unshared(shared, make, first):
    model = mlp()
    if first:
        make(model[2])
    twin = copy.deepcopy(model)
    if make is _patched and first:
        make(twin[2])
    monitor, optimizer, other = watch(model, on_error="raise"), sgd(model), sgd(twin)
    for i in range(5):
        if i == 1 and not first:
            make(model[2])
            make(twin[2])
        shared.clear()
        step(model, optimizer, draw(seed=i))
        step(twin, other, draw(seed=i))
        equal(gradients(model), gradients(twin))
        odd = first or i > 0
        assert (model[2] in shared) == (not odd and i not in CHECKS)
        assert len(shared) >= (0 if i in CHECKS else LAYERS - 1)
    monitor.detach()


def test_hooks_on_all_modules_end_it(shared):
    model = mlp()
    handle = everywhere.register_module_forward_hook(lambda module, args, out: None)
    try:
        with watch(model):
            for i in range(3):
                step(model, sgd(model), draw(seed=i))
        assert not shared
    finally:
        handle.remove()


class Twice(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        if tie:
            self.b.weight = self.a.weight
        self.tie = tie

    def forward(self, x):
        return self.b(self.a(x).tanh()) if self.tie else self.a(self.a(x).tanh()) + self.b(x)


@pytest.mark.filterwarnings("ignore::gns.monitor.GNSWarning")
@pytest.mark.parametrize("tie", [True, False])
def test_a_weight_with_several_uses_goes_unshared(shared, tie):
    torch.manual_seed(0)
    model = Twice(tie).double()
    twin = copy.deepcopy(model)
    monitor, optimizer, other = watch(model), sgd(model), sgd(twin)
    for i in range(6):
        expected = truth(model, draw(seed=i))
        step(model, optimizer, draw(seed=i))
        step(twin, other, draw(seed=i))
        equal(gradients(model), gradients(twin))
        if i > 1:
            agree(monitor.latest, expected)
    assert model.a not in shared and (model.b in shared) == (not tie)


def test_in_the_optimizers_metric_nothing_is_shared(shared):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    with watch(model, metric="adam") as monitor:
        for i in range(5):
            step(model, optimizer, draw(seed=i))
    assert not shared and monitor.latest.reason is None


def test_packed_examples_are_measured_apart(shared):
    model = mlp()
    twin, ids = copy.deepcopy(model), torch.tensor([[0] * 4 + [1] * 7] * 2) + torch.tensor([[0], [2]])
    monitor = watch(model, segments=lambda args, kwargs: ids.numpy())
    for i in range(3):
        model.zero_grad()
        twin.zero_grad()
        step(model, sgd(model, 0.0), draw(2, seed=i))
        loss_of(twin, draw(2, seed=i)).backward()
        equal(gradients(model), gradients(twin))
    assert not shared and monitor.latest.n_examples == 4


def test_frozen_parameters_stay_without_a_gradient(shared):
    model = mlp()
    model[2].bias.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    with watch(model):
        for i in range(3):
            step(model, sgd(model), draw(seed=i))
    assert model[2].bias.grad is None and model[4].weight.grad is None
    assert shared.count(model[2]) == 2 and model[4] not in shared


# trust


def test_a_layer_that_fails_the_self_check_is_never_shared_again(shared):
    model = mlp()
    twin = copy.deepcopy(model)
    monitor, optimizer, other = watch(model), sgd(model), sgd(twin)

    def loss(which, x):
        return loss_of(which, x) + (which[2].weight.square().sum() if late else 0)

    with pytest.warns(GNSWarning, match=r"1 trainable parameter\(s\) are not measured: 2.weight"):
        for i in range(14):
            late = i >= 2
            shared.clear()
            step(model, optimizer, draw(seed=i), loss)
            step(twin, other, draw(seed=i), loss)
            equal(gradients(model), gradients(twin))
            assert (model[2] in shared) == (i in (1, 2)), i
            assert (model[0] in shared) == (i not in CHECKS)
    assert monitor.coverage().shared == {"0.weight", "4.weight"}
    assert monitor.latest.reason is None


def test_a_weight_without_a_gradient_to_compare_with_is_not_shared(shared):
    """As factor A at initialisation."""
    model = mlp()
    optimizer = sgd(model)
    with watch(model):
        for i in range(3):
            x = torch.zeros(4, 11, 5, dtype=torch.float64) if i < 2 else draw()
            step(model, optimizer, x)
        assert model[0] not in shared and model[2] in shared
        step(model, optimizer, draw(seed=5))  # a round of checks
        step(model, optimizer, draw(seed=6))
        assert model[0] in shared


# errors


@pytest.mark.parametrize("what", ["norms_and_sum", "sq_norms"])
def test_an_error_of_ours_loses_no_gradient(monkeypatch, what):
    """The plain product is what autograd makes of it: training stays bit-identical."""
    model = mlp()
    twin = copy.deepcopy(model)
    monitor, optimizer, other = watch(model, on_error="warn"), sgd(model), sgd(twin)
    step(model, optimizer, draw())
    step(twin, other, draw())

    def broken(*given, **named):
        raise RuntimeError("planted")

    monkeypatch.setattr(reducers, what, broken)
    with pytest.warns(GNSWarning, match="stands down, training goes on.*planted") as said:
        for i in range(1, 5):
            step(model, optimizer, draw(seed=i))
            step(twin, other, draw(seed=i))
            assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(twin), strict=True))
    assert len(warned(said, "stands down")) == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert monitor.coverage().stopped == "RuntimeError: planted"


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_error_of_ours_under_checkpointing_loses_none_either(monkeypatch, reentrant):
    model = Checkpointed(mlp(), reentrant)
    twin = copy.deepcopy(model)
    watch(model, on_error="warn")
    optimizer, other = sgd(model), sgd(twin)
    step(model, optimizer, draw())
    step(twin, other, draw())
    monkeypatch.setattr(reducers, "norms_and_sum", lambda *given: 1 / 0)
    with pytest.warns(GNSWarning, match="ZeroDivisionError"):
        for i in range(1, 4):
            step(model, optimizer, draw(seed=i))
            step(twin, other, draw(seed=i))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_an_exception_in_the_forward_leaves_the_layers_as_they_were(shared):
    model = mlp()
    before = {name: p for name, p in model.named_parameters()}
    monitor, optimizer = watch(model), sgd(model)
    step(model, optimizer, draw())
    with pytest.raises(RuntimeError):
        model(draw()[..., :3])
    assert all(p is before[name] and p.requires_grad for name, p in model.named_parameters())
    expected = truth(model, draw(seed=2))
    shared.clear()  # of the slow twin's passes
    step(model, optimizer, draw(seed=2))
    agree(monitor.latest, expected)
    assert len(shared) == LAYERS


def test_a_weight_that_is_changed_before_the_backward_is_refused_as_unwatched():
    for watched in (False, True):
        model = mlp()
        if watched:
            watch(model)
        step(model, sgd(model), draw())
        loss = loss_of(model, draw(seed=2))
        with torch.no_grad():
            model[2].weight.add_(1)
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
            loss.backward()


def test_weight_data_that_are_put_in_before_the_backward_do_not_count(shared):
    """The gradient of the input is that of the weight which made the output, as unwatched."""
    found = []
    for watched in (False, True):
        model = mlp()
        if watched:
            watch(model)
        step(model, sgd(model), draw())
        model.zero_grad()
        loss = loss_of(model, draw(seed=2))
        model[2].weight.data = 3 * model[2].weight.data
        loss.backward()
        found.append(gradients(model))
    equal(found[1], found[0])
    assert len(shared) == LAYERS


@pytest.mark.filterwarnings("ignore:.*runs through the graph of a gradient:gns.monitor.GNSWarning")
def test_the_gradient_of_a_gradient_is_autograds(shared):
    model = mlp()
    twin = copy.deepcopy(model)
    with watch(model, on_error="raise"):
        step(model, sgd(model), draw())
        step(twin, sgd(twin), draw())
        for which in (model, twin):
            which.zero_grad()
            x = draw(seed=2).requires_grad_()
            loss = loss_of(which, x)
            found = torch.autograd.grad(loss, [x, *which.parameters()], create_graph=True)
            (loss + sum(g.square().sum() for g in found)).backward()
            assert not shared if which is twin else len(shared) == LAYERS  # in the second pass alone
            shared.clear()
        equal(gradients(model), gradients(twin))


def test_asking_for_some_gradients_gives_them(shared):
    model = mlp()
    twin = copy.deepcopy(model)
    with watch(model):
        step(model, sgd(model), draw())
        step(twin, sgd(twin), draw())
        found = [
            torch.autograd.grad(loss_of(which, draw(seed=2)), [which[0].weight, which[4].bias])
            for which in (model, twin)
        ]
    equal(*found)


# what else is done with a model


def test_other_uses_of_the_model_are_untouched(shared, tmp_path):
    model = mlp()
    names = [name for name, _ in model.named_parameters()]
    optimizer, before = sgd(model), state_of(model)
    monitor = watch(model)
    step(model, optimizer, draw())
    with torch.no_grad():
        assert not model(draw()).requires_grad
    assert [name for name, _ in model.named_parameters()] == names == list(model.state_dict())
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(made(draw()), model(draw()))
        loss_of(made, draw()).backward()
    assert not shared
    optimizer.zero_grad()
    loss = loss_of(model, draw())  # and in the middle of a step
    made = copy.deepcopy(model)
    loss.backward()
    assert len(shared) == LAYERS
    loss_of(made, draw()).backward()
    assert len(shared) == LAYERS
    equal(gradients(made), gradients(model))
    monitor.detach()
    optimizer.zero_grad()
    assert state_of(model) == before


def test_generation_in_between(shared):
    model = build("llama")
    with watch(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for i in range(2):
            model(**tokens(4, seed=i)).loss.backward()
            model.generate(input_ids=tokens(2)["input_ids"], max_new_tokens=2, do_sample=False)
            optimizer.step()
            optimizer.zero_grad()
    assert len(shared) == 28


def test_which_layers_may_share_is_known_from_their_kind():
    model = nn.Sequential(nn.Linear(5, 5), Same(5, 5), nn.LayerNorm(5)).double()
    monitor = GNSMonitor(model).attach()
    may = [e.name for e in monitor._plan.entries if sharing.may_share(e)]
    monitor.detach()
    assert may == ["0.weight"]


def test_the_slow_twin_of_the_sum_sees_a_missing_example():
    """Control: a sum without the last example is not within the tolerance of these tests."""
    x, dy = draw(4), draw(4, seed=3)
    blocks = linear.linear_blocks(nn.Linear(5, 5), x, dy, "weight")
    _, total = linear.linear_together(nn.Linear(5, 5), x[:3], dy[:3], "weight", 2**20)
    with pytest.raises(AssertionError):
        equal([total], [added([blocks.sum(0)])])
