"""The frozen probe: against every pair of examples, nothing touched, early stops, dropout, data in order."""

from __future__ import annotations

import copy
import math
import random
import signal
import warnings
from collections import UserDict
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gns
from gns.estimate import estimate
from gns.frozen import probe
from gns.monitor import GNSMonitor, GNSWarning
from gns.probing.calling import ProbeError, moved
from gns.probing.result import FrozenEstimate
from gns.probing.still import set_modes
from gns.probing.words import verdict
from gns.segments import stacked
from gns.statistics.looks import declared
from tests.gns.small_models import lora, tokens
from tests.reference import all_pairs
from tests.reference.per_example import contributions, flat, trainable
from tests.reference.tolerances import close


def mean_loss(model, x):
    return (model(x) - 1).square().mean()


def plain(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)


def rows(*sizes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 4, generator=generator, dtype=dtype) for n in sizes]


def of_each_example(model, batches):
    """Contributions and weights of every example by one backward pass each; the loss is a mean."""
    found = []
    for x in batches:
        losses = [lambda x=x, i=i: mean_loss(model, x[i : i + 1]) / len(x) for i in range(len(x))]
        found.append(flat(contributions(trainable(model), losses)).numpy())
    return found, [np.full(len(x), 1 / len(x)) for x in batches], [float(len(x)) for x in batches]


# --- exact


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.integers(0, 1000))
def test_equals_all_pairs_one_by_one(sizes, seed):
    if sum(sizes) < 3:
        return
    model, batches = plain(seed), rows(*sizes, seed=seed)
    found = probe(model, batches, loss=mean_loss)
    twin = all_pairs.trace_and_grad(*all_pairs.joined(*of_each_example(model, batches)))
    close([found.trace_sigma, found.grad_sq_norm], twin, what="tr Σ, |G|²")
    assert found.n_examples == sum(sizes) and found.n_steps == len(sizes)


def test_permuting_batches_changes_nothing():
    model, batches = plain(), rows(2, 5, 3, 4, 1)
    one, other = (probe(model, b, loss=mean_loss) for b in (batches, batches[::-1]))
    close([other.trace_sigma, other.grad_sq_norm], [one.trace_sigma, one.grad_sq_norm])
    close([other.low, other.p_value], [one.low, one.p_value])


def test_one_batch_of_all_is_one_step():
    model, batches = plain(), rows(2, 5, 3)
    found, whole = probe(model, batches, loss=mean_loss), probe(model, [torch.cat(batches)], loss=mean_loss)
    step = whole.history[0]
    close([whole.trace_sigma, whole.grad_sq_norm], [step.trace_sigma, step.grad_sq_norm])
    close([found.trace_sigma, found.grad_sq_norm], [step.trace_sigma, step.grad_sq_norm])
    assert whole.status == "collecting"


def token_weighted(model, batches):
    """Contributions of every example of token-mean losses, one backward pass each."""
    out, weights, mass = [], [], []
    for batch in batches:
        t = batch["labels"][:, 1:].ne(-100).sum(1).double()
        losses = [
            lambda i=i, batch=batch, t=t: (
                model(**{k: v[i : i + 1] for k, v in batch.items()}).loss * (t[i] / t.sum()).float()
            )
            for i in range(len(t))
        ]
        kept = [i for i in range(len(t)) if t[i] > 0]
        each = flat(contributions(trainable(model), [losses[i] for i in kept])).numpy()
        all_rows = np.zeros((len(t), each.shape[1]))
        all_rows[kept] = each
        out.append(all_rows)
        weights.append((t / t.sum()).numpy())
        mass.append(float(t.sum()))
    return out, weights, mass


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_through_transformers_with_token_weights(family):
    model = lora(family)
    batches = [tokens(3 + k % 3, seed=k) for k in range(5)]
    found = probe(model, batches)
    model.eval()
    c, a, mass = token_weighted(model, batches)
    close(
        [found.trace_sigma, found.grad_sq_norm],
        all_pairs.trace_and_grad(*all_pairs.joined(c, a, mass)),
        torch.float32,
        rtol=1e-6,
    )
    close(found.p_value, all_pairs.flips(np.array([rows.sum(0) for rows in c]), mass))
    names = list(trainable(model))
    sizes = np.cumsum([0] + [p.numel() for p in trainable(model).values()])
    for factor in "AB":
        keep = np.concatenate(
            [np.arange(*sizes[i : i + 2]) for i, n in enumerate(names) if f"lora_{factor}." in n]
        )
        twin = all_pairs.trace_and_grad(*all_pairs.joined([rows[:, keep] for rows in c], a, mass))
        group = found.groups[factor]
        close([group.trace_sigma, group.grad_sq_norm], twin, torch.float32, rtol=1e-6, what=factor)


def test_the_history_is_what_training_steps_would_show():
    model, batches = plain(), rows(3, 4, 5)
    found = probe(model, batches, loss=mean_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GNSMonitor(model) as monitor:
        for x in batches:
            optimizer.zero_grad()
            mean_loss(model, x).backward()
            optimizer.step()
    for one, other in zip(found.history, monitor.history, strict=True):
        close([one.mean_sq_norm, one.sq_norm_of_mean], [other.mean_sq_norm, other.sq_norm_of_mean])
        assert dict(one.parameters()).keys() == dict(other.parameters()).keys()
    assert [s.step for s in found.history] == [0, 1, 2]


def test_it_is_an_estimate_and_speaks():
    found = probe(plain(), rows(*[4] * 25), loss=mean_loss)
    assert isinstance(found, gns.Estimate) and isinstance(found, FrozenEstimate)
    assert "25 batches × 4; measured; frozen weights; any gradient at all: p = 0.0001" in str(found)
    assert found.target.startswith("all pairs of examples at one parameter point")
    assert found.steps == (0, 24) and found.coverage == 1 and found.unit == "examples"
    assert "0 usable batch(es)" in str(probe(plain(), [], loss=mean_loss))


def test_no_limit_is_named_where_there_is_none():
    found = probe(plain(), rows(*[4] * 25), loss=mean_loss)
    for status in ("lower bound", "not detectable"):
        told = replace(found, status=status, detection_limit=12.0)
        assert any("95 % sure; these batches show no noise scale above 12" in x for x in verdict(told))
        assert "95 % sure." in verdict(replace(told, detection_limit=math.nan))


def test_sees_more_than_the_steps_of_the_same_batches():
    model, batches = plain(), rows(*[2] * 60)
    found = probe(model, batches, loss=mean_loss)
    steps = estimate(found.history)
    assert (found.high - found.low) / found.b_simple < 0.7 * (steps.high - steps.low) / steps.b_simple


# --- forms of batches


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: {"x": x, "y": y},
        lambda x, y: ((x,), {"y": y}),
        lambda x, y: (x, y),
        lambda x, y: [x, y],
    ],
    ids=["mapping", "args and kwargs", "tuple", "list"],
)
def test_every_form_of_batch_is_the_same(form):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 1).double()

        def forward(self, x, y):
            return {"loss": (self.layer(x) - y).square().mean()}

    data = [(x, x[:, :1] * 2) for x in rows(3, 4, 5)]
    found, twin = (
        probe(Model(), [form(*b) for b in data]),
        probe(Model(), [{"x": x, "y": y} for x, y in data]),
    )
    assert found.trace_sigma == twin.trace_sigma > 0


def test_one_batch_instead_of_a_list_is_refused():
    with pytest.raises(
        ProbeError, match="batches is a dict, one batch; a list of batches is needed, two or more"
    ):
        probe(plain(dtype=torch.float32), {"x": torch.ones(2, 4)})


@pytest.mark.parametrize(
    ("batch", "loss", "says"),
    [
        (3, None, "a batch is a int; a mapping, a tensor"),
        (torch.ones(2, 4), None, r"output, a Tensor, has no `loss`; put `labels` into the batches"),
        (
            torch.ones(2, 4),
            lambda m, x: m(x),
            r"the loss is a tensor of shape \(2, 1\); a differentiable scalar",
        ),
        (torch.ones(2, 4), lambda m, x: m(x).mean().detach(), r"shape \(\) without a graph"),
        (torch.ones(2, 4), lambda m, x: 3.0, "the loss is a float"),
    ],
)
def test_what_is_no_loss_is_refused(batch, loss, says):
    with pytest.raises(ProbeError, match=says):
        probe(plain(dtype=torch.float32), [batch], loss=loss)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"level": 1.0}, r"level is 1.0; a coverage in \(0, 1\)"),
        ({"max_batches": 0}, "max_batches is 0; a whole number"),
        ({"max_batches": True}, "max_batches is True"),
        ({"relative_width": 0.0}, "relative_width is 0.0; a number above 0"),
        ({"largest": -1}, "largest is -1; a whole number"),
        ({"level": "0.9"}, "level is '0.9'; a coverage"),
        ({"relative_width": "0.2"}, "relative_width is '0.2'; a number above 0"),
        ({"relative_width": float("inf")}, "relative_width is inf; a number above 0"),
        ({"seed": -1}, "seed is -1; a whole number, 0 or more"),
        ({"sketch": 0}, "sketch is 0; a whole number, 1 or more"),
        ({"max_bytes": -5}, "max_bytes is -5; a whole number, 0 or more"),
    ],
)
def test_what_does_not_fit_is_refused(options, says):
    with pytest.raises(ProbeError, match=says):
        probe(plain(), rows(3, 4), loss=mean_loss, **options)


def test_no_module_is_refused():
    with pytest.raises(ProbeError, match="model is a int"):
        probe(3, rows(3))


def test_a_stream_without_end_needs_a_number_for_looks():
    with pytest.raises(ProbeError, match="pass max_batches"):
        probe(plain(), iter(rows(3, 4)), loss=mean_loss, relative_width=0.2)


def test_no_more_is_taken_from_a_stream_than_asked():
    stream = iter(rows(*[3] * 10))
    assert probe(plain(), stream, loss=mean_loss, max_batches=4).n_steps == 4
    assert len(list(stream)) == 6


def test_an_optimizer_inside_backward_is_refused():
    model = plain()
    handle = model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ProbeError, match=r"`0.weight` has a hook that runs when its gradient is complete"):
        probe(model, rows(3), loss=mean_loss)
    handle.remove()
    assert probe(model, rows(3, 3), loss=mean_loss).n_steps == 2


# --- what is left out


def test_batches_that_are_not_finite_are_left_out_and_named():
    model, batches = plain(), rows(3, 4, 5)
    broken = [batches[0], batches[0] * float("nan"), *batches[1:]]
    found, twin = probe(model, broken, loss=mean_loss), probe(model, batches, loss=mean_loss)
    assert (found.n_steps, found.n_skipped) == (3, 1)
    assert found.warnings[0].startswith("Batch 1 is left out: a gradient of this step is not finite")
    assert found.trace_sigma == twin.trace_sigma


def test_batches_without_gradient_are_left_out():
    model, x = plain(), rows(3, 4, 5)
    other = nn.Linear(4, 1).double()
    losses = iter([mean_loss, lambda m, x: other(x).mean(), mean_loss])
    found = probe(model, x, loss=lambda m, x: next(losses)(m, x))
    assert found.n_skipped == 1 and "Batch 1 is left out: no gradient reached" in found.warnings[0]
    assert found.trace_sigma == probe(model, [x[0], x[2]], loss=mean_loss).trace_sigma


def test_labels_in_some_batches_only_are_refused():
    model = lora("llama")
    batch = tokens(4)
    bare = {k: v for k, v in batch.items() if k != "labels"}

    def loss(model, b):
        out = model(**b)
        return out.loss if "labels" in b else out.logits.square().mean()

    refused = pytest.raises(ProbeError, match="some batches have token labels and others have none")
    with refused, pytest.warns(GNSWarning, match="without labels: the loss is made outside"):
        probe(model, [batch, bare], loss=loss)
    assert probe(model, [batch, bare], loss=loss, weights="equal").n_steps == 2


def test_unmeasured_parameters_are_said():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 1).double(), nn.Parameter(torch.ones(1).double())

        def forward(self, x):
            return self.layer(x) * self.scale

    with pytest.warns(GNSWarning, match="scale"):
        found = probe(Odd(), rows(3, 4, 5), loss=mean_loss)
    assert found.coverage == 5 / 6 and {n for n, _ in found.history[0].parameters()} == {
        "layer.weight",
        "layer.bias",
    }


# --- nothing is touched


class Everything(nn.Module):
    """Dropout, batch norm, a buffer that counts calls, a frozen layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3)
        self.last = nn.Linear(6, 1)
        self.first.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        random.random(), np.random.rand()
        return self.last(self.drop(self.norm(self.first(x))))


def prepared():
    torch.manual_seed(3)
    model = Everything()
    model.norm.eval()  # a mix of modes
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    mean_loss(model, torch.randn(5, 4)).backward()
    optimizer.step()  # state, and a gradient that is left there
    model.last.bias.grad = None
    return model, optimizer


def state(model, optimizer):
    return copy.deepcopy(
        {
            "weights": {k: v.detach().clone() for k, v in model.state_dict().items()},
            "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
            "trains": {n: p.requires_grad for n, p in model.named_parameters()},
            "modes": {n: m.training for n, m in model.named_modules()},
            "optimizer": optimizer.state_dict(),
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),
            "python": random.getstate(),
            "grad enabled": torch.is_grad_enabled(),
            "sigint": signal.getsignal(signal.SIGINT),
        }
    )


def same(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, tuple | list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}/{i}")
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b), path
    else:
        assert a == b, path


def hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )


def interrupted_at(k, how):
    """Batches that end in an exception or in Ctrl-C."""

    def stream():
        for i, x in enumerate(rows(*[4] * 6, dtype=torch.float32)):
            if i == k:
                raise how
            yield x

    return stream()


ENDINGS = {
    "whole": (lambda: rows(*[4] * 6, dtype=torch.float32), None),
    "exception": (lambda: interrupted_at(3, RuntimeError("data")), RuntimeError),
    "Ctrl-C": (lambda: interrupted_at(3, KeyboardInterrupt()), None),
    "Ctrl-C at once": (lambda: interrupted_at(0, KeyboardInterrupt()), KeyboardInterrupt),
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
@pytest.mark.parametrize("options", [{}, {"dropout": True}, {"split_dropout": True}], ids=str)
def test_everything_is_as_it_was(ending, options):
    model, optimizer = prepared()
    make, raised = ending
    grads = {n: p.grad for n, p in model.named_parameters()}
    before = state(model, optimizer)
    if raised is None:
        assert probe(model, make(), loss=mean_loss, **options).n_steps >= 3
    else:
        with pytest.raises(raised):
            probe(model, make(), loss=mean_loss, **options)
    same(state(model, optimizer), before)
    assert all(p.grad is grads[n] for n, p in model.named_parameters()), "the gradient tensors are others"
    assert hooks(model) == 0


@pytest.mark.parametrize("where", ["forward", "loss"])
def test_an_error_inside_a_batch_leaves_everything_as_it_was(where):
    model, optimizer = prepared()
    before, calls = state(model, optimizer), []

    def loss(model, x):
        calls.append(1)
        out = model(x)
        if len(calls) == 3:
            raise KeyError("user")
        return out.mean()

    with pytest.raises(KeyError, match="user"):
        probe(model, rows(*[4] * 6, dtype=torch.float32), loss=loss)
    same(state(model, optimizer), before)
    assert hooks(model) == 0


def test_the_process_own_ctrl_c_is_heard_in_the_middle_of_a_batch():
    model, optimizer = prepared()
    before, calls = state(model, optimizer), []

    def loss(model, x):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return model(x).mean()

    found = probe(model, rows(*[4] * 6, dtype=torch.float32), loss=loss)
    assert found.n_steps == 3 and found.stopped == "interrupted after 3 batches"
    assert "interrupted after 3 batches" in str(found)
    same(state(model, optimizer), before)


def test_control_without_care_the_state_would_change():
    model, optimizer = prepared()
    before = state(model, optimizer)
    mean_loss(model, torch.randn(4, 4)).backward()
    with pytest.raises(AssertionError):
        same(state(model, optimizer), before)


def test_a_loader_that_shuffles_draws_as_it_would_have():
    """The data come in the order of the user's generators, and those are put back too."""
    data = torch.randn(12, 4)
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
    torch.manual_seed(9)
    expected = [x.clone() for x in loader]
    torch.manual_seed(9)
    seen = []

    def loss(model, x):
        seen.append(x.clone())
        return mean_loss(model, x)

    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    torch.manual_seed(9)
    state_before = torch.get_rng_state()
    probe(model, loader, loss=loss, dropout=True)
    same(torch.get_rng_state(), state_before)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_data_drawn_as_they_come_are_those_of_the_users_generators():
    """Each batch is drawn between two passes, which seed all generators for themselves."""

    def seed():
        torch.manual_seed(9), np.random.seed(9), random.seed(9)

    def stream():
        for _ in range(4):
            yield torch.randn(3, 4) + np.random.rand() + random.random()

    seed()
    expected, seen = list(stream()), []

    def loss(model, x):
        seen.append(x.clone())
        return mean_loss(model, x)

    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    seed()
    probe(model, stream(), loss=loss, dropout=True)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


class Buffers(nn.Module):
    """What a forward pass may do to buffers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("nowhere", torch.zeros(3, device="meta"))
        self.register_buffer("late", None)
        self.register_buffer("zero", torch.zeros(2))
        self.register_buffer("nan", torch.tensor([float("nan"), 1.0]))
        self.register_buffer("small", torch.ones(2).to(torch.float8_e4m3fn))

    def forward(self, x):
        self.late = torch.ones(1)
        self.zero.neg_()
        self.nan.mul_(2)
        self.small.copy_(torch.zeros(2))
        return self.layer(x)


def test_buffers_of_any_kind_are_as_they_were():
    model = Buffers()
    assert probe(model, rows(3, 4, 5, dtype=torch.float32), loss=mean_loss).n_steps == 3
    assert model.late is None and model.nowhere.is_meta
    assert not torch.signbit(model.zero).any()
    assert torch.isnan(model.nan[0]) and model.nan[1] == 1
    assert (model.small.float() == 1).all()


def test_a_batch_is_given_to_the_loss_as_it_is():
    class Pair(NamedTuple):
        x: torch.Tensor
        y: torch.Tensor

    class Custom(UserDict):
        pass

    x = rows(4)[0]
    assert type(moved(Pair(x, x), torch.device("meta"))) is Pair
    assert moved(Pair(x, x), torch.device("meta")).y.is_meta
    for batch in (Pair(x, x), Custom(x=x), [x, (x, 3)]):
        assert moved(batch, torch.device("cpu")) is batch
    found = probe(plain(), [Pair(x, x)] * 3, loss=lambda m, b: mean_loss(m, b.x))
    assert found.n_steps == 3


def test_no_grad_around_it_does_no_harm():
    with torch.no_grad():
        found = probe(plain(), rows(3, 4, 5), loss=mean_loss)
        assert not torch.is_grad_enabled()
    assert found.trace_sigma == probe(plain(), rows(3, 4, 5), loss=mean_loss).trace_sigma


def test_two_probes_are_equal_bit_for_bit():
    model = lora("llama", dropout=0.2)
    batches = [tokens(4, seed=k) for k in range(4)]
    one, other = (probe(model, batches, split_dropout=True, seed=5) for _ in range(2))
    assert one == other and one.history == other.history
    another = probe(
        model, batches, split_dropout=True, seed=5 + 2**20
    )  # of more bits than a mask's own number
    assert another.trace_sigma != one.trace_sigma


# --- modes and dropout


def test_modes_without_dropout_are_evaluation_but_for_checkpointing():
    model = Everything().train()
    model.last.gradient_checkpointing = True
    model.first.gradient_checkpointing, model.first.dropout = True, 0.1
    set_modes(model, dropout=False)
    assert [n for n, m in model.named_modules() if m.training] == ["last"]
    set_modes(model, dropout=True)
    assert [n for n, m in model.named_modules() if not m.training] == ["norm"]


def test_checkpointing_goes_on_without_dropout():
    model = lora("llama", dropout=0.3).train()
    batches = [tokens(4, seed=k) for k in range(3)]
    twin = probe(model, batches)
    base = model.get_base_model()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable`", category=FutureWarning)
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    runs = []
    layer = base.model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    found = probe(model, batches)
    assert len(runs) == 6, "each layer runs again in backward, so its activations were not kept"
    close([found.trace_sigma, found.grad_sq_norm], [twin.trace_sigma, twin.grad_sq_norm], rtol=1e-5)
    assert not found.warnings


def test_dropout_is_off_unless_asked_for():
    model = lora("llama", dropout=0.5).train()
    batches = [tokens(4, seed=k) for k in range(4)]
    off, on, dry = probe(model, batches), probe(model, batches, dropout=True), probe(model.eval(), batches)
    assert off.trace_sigma == dry.trace_sigma < on.trace_sigma


def test_other_random_numbers_in_the_model_are_said():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1).double()

        def forward(self, x):
            return self.layer(x + torch.randn_like(x))

    found = probe(Noisy(), rows(3, 4, 5), loss=mean_loss)
    assert any("Random numbers were drawn" in w for w in found.warnings)
    assert not any(
        "Random numbers" in w for w in probe(Noisy(), rows(3, 4), loss=mean_loss, dropout=True).warnings
    )


def test_dropout_noise_is_split_off():
    """y = w·(x ∘ mask)/keep with loss = mean(y): g = x ∘ mask/keep, so tr Σ of the masks is E|x|² p/(1 − p).

    Bound: five standard errors of what is printed with it.
    """
    p, d = 0.4, 50
    model = nn.Sequential(nn.Dropout(p), nn.Linear(d, 1, bias=False))
    generator = torch.Generator().manual_seed(0)
    batches = [2 + torch.randn(16, d, generator=generator) for _ in range(60)]
    found = probe(model, batches, loss=lambda m, x: m(x).mean(), split_dropout=True)
    size = float(torch.cat(batches).square().sum(1).mean())
    masks = size * p / (1 - p)
    noise = found.dropout
    assert abs(noise.dropout - masks) < 5 * noise.dropout_se < 0.2 * masks
    assert abs(noise.data - d) < 5 * noise.dropout_se
    close(noise.data + noise.dropout, found.trace_sigma)
    dry = probe(model, batches, loss=lambda m, x: m(x).mean())
    assert abs(found.b_simple_data / dry.b_simple - 1) < 0.2 < found.b_simple / dry.b_simple - 1
    assert dry.dropout is None and np.isnan(dry.b_simple_data)


@pytest.mark.parametrize("draw", [lambda: np.random.rand(50), lambda: [random.random() for _ in range(50)]])
def test_masks_of_other_generators_are_told_apart_too(draw):
    """Masks drawn with numpy or Python are others in every batch, and in its second run."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.masks = nn.Linear(50, 1), []

        def forward(self, x):
            self.masks.append(np.array(draw()) > 0.5)
            return self.layer(x * torch.from_numpy(self.masks[-1]).float())

    model = Masked()
    batches = [2 + torch.randn(8, 50, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    found = probe(model, batches, loss=lambda m, x: m(x).mean(), split_dropout=True)
    assert len({mask.tobytes() for mask in model.masks}) == 8
    assert found.dropout.dropout > 0
    off = probe(model, batches, loss=lambda m, x: m(x).mean())
    assert any("Random numbers were drawn" in w for w in off.warnings)


# --- gradients kept whole or sketched


def wide(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 30))
    generator = torch.Generator().manual_seed(seed)
    data = [torch.randn(4, 64, generator=generator) for _ in range(30)]
    return model, data, lambda m, x: (m(x) - x[:, :30]).square().mean()


def test_a_sketch_leaves_the_estimate_where_it_is():
    model, data, loss = wide()
    whole = probe(model, data, loss=loss)
    found = probe(model, data, loss=loss, max_bytes=200_000, sketch=700)
    assert whole.gradients == "whole" and "sketched" in found.gradients
    close([found.trace_sigma, found.grad_sq_norm], [whole.trace_sigma, whole.grad_sq_norm], rtol=1e-5)
    assert found.low <= whole.b_simple <= found.high
    assert found.status == whole.status == "measured"


# --- metrics


def test_adams_metric_is_that_of_the_optimizer():
    model, batches = plain(), rows(3, 4, 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    mean_loss(model, batches[0]).backward()
    optimizer.step()
    before = state(model, optimizer)
    found = probe(model, batches, loss=mean_loss, metric="adam", optimizer=optimizer)
    same(state(model, optimizer), before)
    roots = []
    for p in model.parameters():  # R = (√v̂ + ε)^(−½) after one step: v̂ = g²
        v = optimizer.state[p]["exp_avg_sq"] / (1 - 0.999)
        roots.append((v.sqrt() + 1e-8).rsqrt().flatten())
    scale = torch.cat(roots).numpy()
    c, a, mass = of_each_example(model, batches)
    twin = all_pairs.trace_and_grad(*all_pairs.joined([rows * scale for rows in c], a, mass))
    close([found.trace_sigma, found.grad_sq_norm], twin)
    assert found.metric == "adam"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"metric": "adamw"}, "metric is 'adamw'; known: 'euclidean', 'adam', 'sign'"),
        ({"metric": "adam"}, "metric='adam' needs an optimizer= to read"),
        ({"optimizer": 3}, "metric='euclidean' needs no optimizer"),
        ({"metric": "sign", "largest": 2}, "largest goes with metric='euclidean'"),
    ],
)
def test_metrics_that_cannot_be_had_are_refused(options, says):
    with pytest.raises(ProbeError, match=says):
        probe(plain(), rows(3, 4), loss=mean_loss, **options)


def test_an_optimizer_without_second_moments_is_refused():
    model = plain()
    with pytest.raises(ProbeError, match=r"`0.weight`: "):
        probe(model, rows(3), loss=mean_loss, metric="adam", optimizer=torch.optim.Adam(model.parameters()))


# --- looks


def test_looks_are_declared_beforehand():
    assert declared(20) == (20,) and declared(21) == (20, 21) and declared(170) == (20, 40, 80, 160, 170)
    with pytest.raises(ValueError, match="most is 0"):
        declared(0)


def test_stops_at_the_first_look_that_is_narrow_enough():
    model, batches = plain(), rows(*[8] * 90)
    found = probe(model, batches, loss=mean_loss, relative_width=3.0)
    assert found.n_steps in (20, 40) and found.stopped == "±300 % was reached"
    assert found.looks == (20, 40, 80, 90)
    assert (found.high - found.low) / (2 * found.b_simple) <= 3
    never = probe(model, batches, loss=mean_loss, relative_width=1e-6)
    assert never.n_steps == 90 and never.stopped is None
    single = probe(model, batches, loss=mean_loss)
    assert never.low < single.low < single.high < never.high, "looks share the level"


def test_a_narrow_set_of_too_few_effective_batches_does_not_stop_it():
    """20 batches of unequal size count for fewer than 20, and their set is not trusted."""
    sizes = [2] * 10 + [8] * 12
    found = probe(plain(), rows(*sizes), loss=mean_loss, relative_width=1e6)
    assert found.looks == (20, 22) and found.n_steps == 22 and found.stopped is None
    even = probe(plain(), rows(*[8] * 22), loss=mean_loss, relative_width=1e6)
    assert even.n_steps == 20 and even.stopped is not None, "the control"


# --- the examples with the largest gradients


def test_the_largest_examples_are_those_of_the_enumeration():
    model, batches = plain(), rows(3, 4, 2, 5)
    batches[1][2] *= 9
    batches[3][0] *= 6
    found = probe(model, batches, loss=mean_loss, largest=3, describe=lambda batch, row: f"row {row}")
    c, _, _ = of_each_example(model, batches)
    sizes = np.concatenate([(len(rows) * rows) for rows in c])
    sizes = (sizes**2).sum(1)
    order = np.argsort(-sizes)[:3]
    assert [e.index for e in found.largest] == order.tolist()
    close([e.sq_norm for e in found.largest], sizes[order])
    close([e.share for e in found.largest], sizes[order] / sizes.sum())
    assert found.largest[0].batch == 1 and found.largest[0].text == "row 2"
    assert probe(model, batches, loss=mean_loss).largest == ()


def test_a_tokenizer_shows_the_text_without_its_padding():
    class Tokenizer:
        def decode(self, ids):
            return f"\x1b[2J<b>{len(ids)}</b>\n" + "x" * 300

    model = lora("llama")
    found = probe(model, [tokens(4, seed=1), tokens(3, seed=2)], largest=7, describe=Tokenizer())
    short = next(e for e in found.largest if e.index == 0)
    assert short.text.startswith("[2J<b>9</b> xxx") and len(short.text) == 120 and short.text.endswith("…")
    assert "&lt;b&gt;9" in short.html and "<" not in short.html
    assert "\x1b" not in str(short)


def test_describe_must_be_something():
    with pytest.raises(TypeError, match="describe is a int; a tokenizer, or a function"):
        probe(plain(), rows(3), loss=mean_loss, largest=1, describe=3)


def test_a_describe_that_fails_loses_no_measurement():
    def describe(batch, row):
        raise KeyError("input_ids")

    found = probe(plain(), rows(3, 4), loss=mean_loss, largest=1, describe=describe)
    assert found.n_steps == 2
    assert found.largest[0].text == "(describe raised KeyError: 'input_ids')"


def test_examples_that_are_not_rows_are_not_shown_as_rows():
    options = {"loss": mean_loss, "largest": 2, "describe": lambda batch, row: f"row {row}"}
    assert all(e.text is None for e in probe(plain(), rows(4, 6), segments=stacked(2), **options).largest)
    assert all(e.text is not None for e in probe(plain(), rows(4, 6), **options).largest), "the control"


# --- dependence inside a batch


def test_duplicates_inside_batches_are_warned_of():
    batches = [x.repeat(2, 1) for x in rows(*[4] * 40)]
    found = probe(plain(), batches, loss=mean_loss)
    assert any("agree more than examples of different batches" in w for w in found.warnings)
    assert found.dependence.difference > 0 and found.dependence.p_value < 0.01
    fine = probe(plain(), rows(*[8] * 40), loss=mean_loss)
    assert not fine.warnings and fine.dependence.p_value > 0.01


def test_sorted_data_are_warned_of():
    data = torch.cat(rows(*[8] * 40))
    in_order = data[data[:, 0].argsort()]
    found = probe(plain(), list(in_order.split(8)), loss=mean_loss)
    assert any("data in order" in w for w in found.warnings)


# --- what is shown


def test_a_bar_only_where_asked(capsys):
    probe(plain(), rows(3, 4), loss=mean_loss)
    assert capsys.readouterr().err == ""
    probe(plain(), rows(3, 4), loss=mean_loss, progress=True)
    assert "batches at frozen weights" in capsys.readouterr().err
