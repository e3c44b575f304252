"""Golden laws of a gradient noise scale, through `GNSMonitor`, each with a control that its check rejects.

A law is a check function. It is applied to the right quantity and, by `rejects`, to a deliberately wrong one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gns import reducers
from gns.monitor import GNSMonitor, GNSWarning
from gns.rules import LINEAR
from gns.sums import StepSums
from tests.reference.estimators import ordered_batches, truth
from tests.reference.per_example import contributions, flat, joint, sums, trainable
from tests.reference.tolerances import close


def rejects(check: Callable[..., None], *wrong: object) -> None:
    """Assert that a check fails on a quantity broken on purpose."""
    with pytest.raises(AssertionError):
        check(*wrong)


def measure(model: nn.Module, micro_batches: Sequence[Callable[[], Tensor]], **kwargs) -> StepSums:
    """One optimizer step over micro-batches, given as functions that run the model and return a loss."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with GNSMonitor(model, on_error="raise", **kwargs) as monitor:
        optimizer.zero_grad()
        for loss in micro_batches:
            loss().backward()
        optimizer.step()
        assert monitor.latest is not None
        return monitor.latest


def figures(s: StepSums) -> list[float]:
    return [s.mean_sq_norm, s.sq_norm_of_mean, s.trace_sigma, s.grad_sq_norm]


class TokenModel(nn.Module):
    """[B, T, 3] → [B, T, 2], each token on its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.fixture
def model(seed):
    return TokenModel().double()


@pytest.fixture
def batch(model):
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    return x, torch.randn(6, 4, 2, dtype=torch.float64)


def loss_of(model, x, y, weight: float | Tensor = 1.0) -> Tensor:
    return (weight * (model(x) - y).square()).sum()


def twin_of(model, x, y, weight=1.0):
    one = lambda i: loss_of(model, x[i : i + 1], y[i : i + 1], weight)  # noqa: E731
    return contributions(trainable(model), [lambda i=i: one(i) for i in range(len(x))])


# contributions and layers


@pytest.mark.parametrize("weight", [1.0, 1 / 48], ids=["sum", "mean"])
def test_the_sums_are_those_of_one_backward_per_example(model, batch, weight):
    s = measure(model, [lambda: loss_of(model, *batch, weight)])
    twin = twin_of(model, *batch, weight)

    def check(m, q):
        close([m, q], joint(twin), what="(m, q)")

    check(s.mean_sq_norm, s.sq_norm_of_mean)
    rejects(check, s.mean_sq_norm / s.n_examples, s.sq_norm_of_mean)  # Σ‖c‖² for m
    rejects(check, s.mean_sq_norm, s.sq_norm_of_mean * 36)
    for name, of_parameter in s.parameters():
        close([of_parameter.mean_sq_norm, of_parameter.sq_norm_of_mean], sums(twin)[name], what=name)


def test_contributions_sum_to_the_batch_gradient(model, batch):
    seen = {}
    for name, layer in (("first", model.first), ("second", model.second)):
        layer.register_forward_hook(
            lambda _, args, out, name=name: (
                out.register_hook(lambda dy: seen.update({name: (args[0].detach(), dy)})) and None
            )
        )
    loss_of(model, *batch).backward()

    def check(rows):
        for name, (x, dy) in seen.items():
            layer = model.get_submodule(name)
            for local, p in layer.named_parameters():
                total = reducers.sum_of_blocks(LINEAR, layer, x[rows], dy[rows], local)
                close(total, p.grad, what=f"Σc of {name}.{local}")

    check(slice(None))
    rejects(check, slice(1, None))  # an example is missing
    rejects(check, [0, 0, 1, 2, 3, 4])  # one is taken for another


def test_layers_add(model, batch):
    s = measure(model, [lambda: loss_of(model, *batch)])
    parts = [p for _, p in s.parameters()]

    def check(of_parts, whole):
        close(np.sum(of_parts, axis=0), whole, what="sum over parameters")

    check([figures(p) for p in parts], figures(s))
    rejects(
        check, [np.sqrt(np.abs(figures(p))) for p in parts], np.sqrt(np.abs(figures(s)))
    )  # norms do not add
    rejects(check, [figures(p) for p in parts[1:]], figures(s))


# what changes nothing


@given(order=st.permutations(range(6)))
def test_permuting_the_examples_changes_nothing(order):
    torch.manual_seed(5)
    model = TokenModel().double()
    x, y = torch.randn(6, 4, 3, dtype=torch.float64), torch.randn(6, 4, 2, dtype=torch.float64)
    before = figures(measure(model, [lambda: loss_of(model, x, y)]))

    def check(inputs, targets):
        close(figures(measure(model, [lambda: loss_of(model, inputs, targets)])), before, what="permuted")

    check(x[list(order)], y[list(order)])
    if list(order) != sorted(order):
        rejects(check, x[list(order)], y)  # inputs without their targets


def test_padding_tokens_add_nothing(model, batch):
    x, y = batch
    mask = torch.ones(6, 4, 1, dtype=torch.float64)
    mask[::2, 2:] = 0
    before = measure(model, [lambda: loss_of(model, x, y, mask)])

    def check(fill):
        longer = [torch.cat([t, torch.full((6, 3, t.shape[2]), 7.0, dtype=t.dtype)], 1) for t in (x, y)]
        padded = torch.cat([mask, torch.full((6, 3, 1), fill, dtype=mask.dtype)], 1)
        close(
            figures(measure(model, [lambda: loss_of(model, *longer, padded)])), figures(before), what="padded"
        )

    check(0.0)
    rejects(check, 0.01)  # the padding leaks into the loss


def test_rows_without_a_label_add_nothing_and_count(model, batch):
    """Σ‖c‖² = m/n and q stay; n grows, by the rows that reached the loss."""
    x, y = batch
    before = measure(model, [lambda: loss_of(model, x, y)])

    def check(fill):
        mask = torch.cat([torch.ones(6, 1, 1), torch.full((3, 1, 1), fill)]).double()
        after = measure(model, [lambda: loss_of(model, torch.cat([x, x[:3]]), torch.cat([y, y[:3]]), mask)])
        assert after.n_examples == 9
        close(
            [after.mean_sq_norm / 9, after.sq_norm_of_mean],
            [before.mean_sq_norm / 6, before.sq_norm_of_mean],
            what="(Σ‖c‖², q)",
        )

    check(0.0)
    rejects(check, 0.1)


@pytest.mark.parametrize("c", [1e-6, 0.3, -2.0, 1e4])
def test_the_loss_times_c(model, batch, c):
    before = measure(model, [lambda: loss_of(model, *batch)])
    after = measure(model, [lambda: loss_of(model, *batch, c)])

    def check(s):
        close(
            [s.grad_sq_norm, s.trace_sigma],
            [c * c * before.grad_sq_norm, c * c * before.trace_sigma],
            rtol=1e-8,
        )
        close(s.b_simple, before.b_simple, rtol=1e-8, what="B_simple")

    check(after)
    rejects(check, StepSums(0, 6, after.mean_sq_norm, before.sq_norm_of_mean))  # units mixed
    rejects(
        check, StepSums(0, 6, abs(c) * before.mean_sq_norm, abs(c) * before.sq_norm_of_mean)
    )  # norms not squared


def test_identical_examples_have_no_noise(model, batch):
    x, y = (t[:1].repeat(6, 1, 1) for t in batch)

    def check(inputs):
        s = measure(model, [lambda: loss_of(model, inputs, y)])
        assert abs(s.trace_sigma) <= 1e-12 * s.grad_sq_norm, (
            f"tr Σ = {s.trace_sigma}, |G|² = {s.grad_sq_norm}"
        )

    check(x)
    other = x.clone()
    other[3] += 1e-3
    rejects(check, other)


SPLITS = [[6], [3, 3], [2, 2, 2], [1] * 6, [1, 2, 3], [5, 1]]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_any_split_into_micro_batches_gives_the_same_sums(model, batch, split):
    x, y = batch
    whole = measure(model, [lambda: loss_of(model, x, y, 1 / 6)])

    def check(weights):
        parts = zip(x.split(split), y.split(split), weights, strict=True)
        s = measure(model, [lambda a=a, b=b, w=w: loss_of(model, a, b, w) for a, b, w in parts])
        assert s.n_examples == 6
        close(figures(s), figures(whole), what=str(split))

    check([1 / 6] * len(split))
    if len(set(split)) > 1:
        rejects(check, [1 / (len(split) * k) for k in split])  # a mean over each, whatever its size
    if len(split) > 1:
        rejects(check, [1 / k for k in split])  # never divided by the number of micro-batches


def test_micro_batches_of_other_lengths_are_one_step(model):
    """4 tokens in one call and 7 in the next: the leaf adds them all the same."""
    parts = [
        (torch.randn(2, t, 3, dtype=torch.float64), torch.randn(2, t, 2, dtype=torch.float64)) for t in (4, 7)
    ]
    s = measure(model, [lambda p=p: loss_of(model, *p) for p in parts])
    twin = [c for p in parts for c in twin_of(model, *p)]
    close([s.mean_sq_norm, s.sq_norm_of_mean], joint(twin))


def test_where_the_models_own_call_is_not_seen_the_rows_of_the_taps_count(model, batch):
    """The loop calls parts of the model, or the output hides its tensors: n is what reached the taps."""
    x, y = batch
    twin = twin_of(model, x, y)

    def by_parts(rows):
        return (model.second(model.first(x[rows]).tanh()) - y[rows]).square().sum()

    with pytest.warns(GNSWarning, match="the model's own call was not seen"):
        s = measure(model, [lambda: by_parts(slice(0, 2)), lambda: by_parts(slice(2, 6))])
    assert s.n_examples == 6 and not s.call_seen
    close([s.mean_sq_norm, s.sq_norm_of_mean], joint(twin))


def test_a_layer_that_sees_other_rows_than_the_examples_is_left_out(seed):
    """Two views of each example share a layer: its rows are not examples."""

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            both = self.shared(torch.cat([x, -x]))
            return self.head((both[: len(x)] * both[len(x) :]).tanh())

    model, x = Views().double(), torch.randn(5, 3, dtype=torch.float64)
    run = lambda rows: model(x[rows]).square().sum()  # noqa: E731
    twin = contributions(trainable(model), [lambda i=i: run(slice(i, i + 1)) for i in range(5)])
    with pytest.warns(GNSWarning, match="its input has 10 rows where the model's call has 5 examples"):
        s = measure(model, [lambda: run(slice(0, 5))])

    def check(names):
        close([s.mean_sq_norm, s.sq_norm_of_mean], joint(twin, names))

    check(["head.weight", "head.bias"])
    rejects(check, None)


def test_a_layer_called_again_beside_the_models_call_is_left_out(model, batch):
    """Its second rows belong to the same examples, but nothing says to which: norms of halves do not add."""
    x, y = batch

    def run(rows):
        return loss_of(model, x[rows], y[rows]) + model.second(model.first(x[rows])).square().sum()

    model.second.requires_grad_(False)
    other = nn.Linear(2, 2, bias=False).double()
    model.add_module("other", other)
    forward = TokenModel.forward
    model.forward = lambda x: other(forward(model, x))
    twin = contributions(trainable(model), [lambda i=i: run(slice(i, i + 1)) for i in range(6)])
    with pytest.warns(GNSWarning, match="saw 12 rows in a step of 6 examples"):
        s = measure(model, [lambda: run(slice(0, 6))])

    def check(names):
        close([s.mean_sq_norm, s.sq_norm_of_mean], joint(twin, names))

    check(["other.weight"])
    rejects(check, None)


# unbiasedness: the data set is so small that every batch can be drawn


def linear_data(seed, size=3):
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    model = nn.Linear(2, 1).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, **draw))
    x, y = torch.randn(size, 2, **draw), torch.randn(size, 1, **draw)
    one = lambda i: loss_of(model, x[i : i + 1], y[i : i + 1])  # noqa: E731
    data = flat(contributions(trainable(model), [lambda i=i: one(i) for i in range(size)])).numpy()
    return model, x, y, data


def steps_over(model, x, y, batches) -> list[StepSums]:
    return [measure(model, [lambda r=list(r): loss_of(model, x[r], y[r], 1 / len(r))]) for r in batches]


@pytest.mark.parametrize(("size", "b"), [(2, 2), (3, 2), (3, 3)])
def test_exactly_unbiased_over_all_ordered_batches(size, b):
    model, x, y, data = linear_data(1, size)
    grad, trace = truth(data)
    steps = steps_over(model, x, y, ordered_batches(size, b))
    assert len(steps) == size**b

    def check(values, expected):
        close(np.mean(values), expected, rtol=1e-10)

    check([s.grad_sq_norm for s in steps], grad)
    check([s.trace_sigma for s in steps], trace)
    rejects(check, [s.sq_norm_of_mean for s in steps], grad)  # uncorrected
    rejects(check, [s.mean_sq_norm - s.sq_norm_of_mean for s in steps], trace)  # divided by n, not n − 1
    rejects(check, [max(s.grad_sq_norm, 0) for s in steps if s.grad_sq_norm < 0] or [0], grad)
    rejects(check, [s.trace_sigma / s.grad_sq_norm for s in steps], trace / grad)  # a ratio is never unbiased
    if size > 2:  # for two examples drawn twice the plug-in happens to be right
        rejects(check, [s.trace_sigma / s.sq_norm_of_mean for s in steps], trace / grad)


def test_the_fair_coin_through_the_monitor():
    """gᵢ ∈ {1, 3}: tr Σ = 1, |G|² = 4 (FACTS §3)."""
    model = nn.Linear(1, 1, bias=False).double()
    values = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    steps = [measure(model, [lambda r=list(r): model(values[r]).mean()]) for r in ordered_batches(2, 3)]
    close(np.mean([s.trace_sigma for s in steps]), 1, rtol=1e-12)
    close(np.mean([s.grad_sq_norm for s in steps]), 4, rtol=1e-12)
    assert abs(np.mean([s.trace_sigma / s.grad_sq_norm for s in steps]) - 0.25) > 0.01


def test_without_replacement_the_squared_gradient_is_low_by_s2_over_n():
    model, x, y, data = linear_data(2, 4)
    grad, _ = truth(data)
    s2 = float(((data - data.mean(0)) ** 2).sum() / 3)
    steps = steps_over(model, x, y, itertools.permutations(range(4), 2))

    def check(expected):
        close(np.mean([s.grad_sq_norm for s in steps]), expected, rtol=1e-9)

    check(grad - s2 / 4)
    rejects(check, grad)
    close(np.mean([s.trace_sigma for s in steps]), s2, rtol=1e-9)


@pytest.mark.parametrize(
    ("x", "expected"),
    [([[1, 0], [0, 1.0]], (2, 2, 1)), ([[1, 4], [5, 0.5]], (28.25, 16, 1.765625))],
    ids=["unit", "mixed"],
)
def test_facts_two_micro_batches_of_one(x, expected):
    model, x = nn.Linear(2, 2), torch.tensor(x)

    def check(divisor):
        s = measure(model, [lambda i=i: model(x[i : i + 1]).sum() / divisor for i in range(2)])
        close([s.trace_sigma, s.grad_sq_norm, s.b_simple], expected, torch.float32)

    check(2)
    rejects(check, 1)  # undivided: four times tr Σ and |G|²
    s = measure(model, [lambda i=i: model(x[i : i + 1]).sum() for i in range(2)])
    close([s.trace_sigma / 4, s.grad_sq_norm / 4, s.b_simple], expected, torch.float32)


# LoRA


class Lora(nn.Module):
    """y = W x + s·B A x, W frozen; named as `peft` names its factors."""

    def __init__(self, i=4, o=3, rank=2, scale=0.5):
        super().__init__()
        self.base = nn.Linear(i, o, bias=False).requires_grad_(False)
        self.lora_A, self.lora_B, self.scale = (
            nn.Linear(i, rank, bias=False),
            nn.Linear(rank, o, bias=False),
            scale,
        )

    def forward(self, x):
        return self.base(x) + self.scale * self.lora_B(self.lora_A(x))


def full_gradients(model, x, y):
    """dW of each example, by autograd on the frozen weight."""
    w = model.base.weight.requires_grad_(True)
    found = contributions(
        {"W": w}, [lambda i=i: loss_of(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    )
    w.requires_grad_(False)
    return torch.stack([c["W"] for c in found])


@pytest.fixture
def lora(seed):
    model = Lora().double()
    return model, torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(5, 3, 3, dtype=torch.float64)


def test_lora_factors_are_projections_of_the_full_gradient(lora):
    model, x, y = lora
    dw, s = full_gradients(model, x, y), model.scale
    a, b = model.lora_A.weight.detach(), model.lora_B.weight.detach()
    found = dict(measure(model, [lambda: loss_of(model, x, y)]).parameters())

    def check(name, c):
        expected = (5 * float(c.square().sum()), float(c.sum(0).square().sum()))
        close([found[name].mean_sq_norm, found[name].sq_norm_of_mean], expected, what=name)

    check("lora_A.weight", s * b.T @ dw)
    check("lora_B.weight", s * dw @ a.T)
    rejects(check, "lora_A.weight", b.T @ dw)  # without s
    rejects(check, "lora_B.weight", dw @ a.T)
    rejects(check, "lora_A.weight", s * a @ dw.mT)  # the other factor
    assert set(found) == {"lora_A.weight", "lora_B.weight"}


@pytest.mark.parametrize("c", [0.1, 3.0])
def test_gauge(lora, c):
    """A → cA, B → B/c is the same function: the factors' numbers stay, the joint one moves."""
    model, x, y = lora
    before = measure(model, [lambda: loss_of(model, x, y)])
    out = model(x).detach()
    with torch.no_grad():
        model.lora_A.weight.mul_(c)
        model.lora_B.weight.div_(c)
    close(model(x), out, what="function")
    after = measure(model, [lambda: loss_of(model, x, y)])

    def check(a, b):
        close(a.trace_sigma / a.grad_sq_norm, b.trace_sigma / b.grad_sq_norm, rtol=1e-8, what="B_simple")

    assert set(after.groups) == {"A", "B"}
    for factor in ("A", "B"):
        check(after.groups[factor], before.groups[factor])
    rejects(check, after, before)
    close(after.groups["A"].trace_sigma, before.groups["A"].trace_sigma / c**2, rtol=1e-8)
    close(after.groups["B"].trace_sigma, before.groups["B"].trace_sigma * c**2, rtol=1e-8)


# token-mean losses


class TinyForCausalLM(nn.Module):
    """Computes its own token-mean loss from labels, as `transformers` does."""

    def __init__(self, vocabulary=11, width=6):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width).requires_grad_(False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids, labels=None, num_items_in_batch=None):
        logits = self.head(self.embed(input_ids).cumsum(1))[:, :-1]
        targets = labels[:, 1:]
        loss = nn.functional.cross_entropy(logits.mT, targets, ignore_index=-100, reduction="sum")
        items = targets.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": loss / items, "logits": logits}


@pytest.fixture
def language(seed):
    model = TinyForCausalLM().double()
    ids = torch.randint(0, 11, (4, 9))
    labels = ids.clone()
    for row, tokens in enumerate((8, 5, 2, 1)):
        labels[row, tokens + 1 :] = -100
    return model, ids, labels, np.array([8, 5, 2, 1]) / 16


def test_token_mean_losses_weigh_examples_by_their_tokens(language):
    model, ids, labels, a = language
    s2 = float(a @ a)

    def check(s):
        close(s.sum_sq_weights, s2, rtol=1e-6, what="Σa²")
        g = (s.sq_norm_of_mean - s.mean_sq_norm / 4) / (1 - s2)
        close([s.grad_sq_norm, s.trace_sigma], [g, 4 * (s.sq_norm_of_mean - g)], rtol=1e-5)

    run = lambda: model(input_ids=ids, labels=labels)["loss"]  # noqa: E731
    check(measure(model, [run]))
    check(measure(model, [run], weights="tokens"))
    rejects(check, measure(model, [run], weights="equal"))
    assert measure(model, [run]).n_tokens == 16
    assert measure(model, [run], weights="equal").n_tokens == 16


def test_token_mean_losses_split_into_micro_batches(language):
    """Divided by the tokens of the whole step, as `transformers` does, any split is the same step."""
    model, ids, labels, _ = language
    whole = measure(model, [lambda: model(input_ids=ids, labels=labels)["loss"]])
    parts = [slice(0, 1), slice(1, 4)]

    def check(items):
        runs = [
            lambda p=p: model(input_ids=ids[p], labels=labels[p], num_items_in_batch=items)["loss"]
            for p in parts
        ]
        s = measure(model, runs)
        close([*figures(s), s.sum_sq_weights], [*figures(whole), whole.sum_sq_weights], rtol=1e-6)

    check(torch.tensor(16))
    rejects(check, None)  # each divided by its own tokens: another loss, other weights


def test_a_batch_of_one_length_has_equal_weights(language):
    model, ids, _, _ = language
    s = measure(model, [lambda: model(input_ids=ids, labels=ids)["loss"]])
    assert s.sum_sq_weights == pytest.approx(1 / 4, rel=1e-6)
    equal = measure(model, [lambda: model(input_ids=ids, labels=ids)["loss"]], weights="equal")
    close(figures(s), figures(equal), rtol=1e-5)


# mistakes of others, FACTS §5


def test_frozen_layers_do_not_count(model, batch):
    model.first.requires_grad_(False)
    twin = twin_of(model, *batch)
    s = measure(model, [lambda: loss_of(model, *batch)])

    def check(expected):
        close([s.mean_sq_norm, s.sq_norm_of_mean], expected)

    check(joint(twin))
    model.first.requires_grad_(True)
    rejects(check, joint(twin_of(model, *batch)))


class Everything(nn.Module):
    """Four dimensions, a keyword-only call, a weight used in two places, and a module used twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.tied = nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.tied.weight = self.a.weight

    def forward(self, *, x):
        h = self.a(input=x).tanh()
        return self.tied(self.b(input=h).tanh())


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3)], ids=["2-d", "3-d", "4-d"])
def test_tied_weights_keyword_calls_and_more_dimensions(seed, shape):
    model, x = Everything().double(), torch.randn(4, *shape, dtype=torch.float64)
    s = measure(model, [lambda: model(x=x).square().sum()])
    losses = [lambda i=i: model(x=x[i : i + 1]).square().sum() for i in range(4)]
    twin = contributions(trainable(model), losses)

    def check(m, q):
        close([m, q], joint(twin))

    assert s.n_examples == 4
    check(s.mean_sq_norm, s.sq_norm_of_mean)

    untied = Everything().double()
    untied.load_state_dict(model.state_dict())
    untied.tied.weight = nn.Parameter(untied.a.weight.detach().clone())
    parts = contributions(
        trainable(untied), [lambda i=i: untied(x=x[i : i + 1]).square().sum() for i in range(4)]
    )
    rejects(check, joint(parts)[0], s.sq_norm_of_mean)  # cross terms forgotten
    rejects(
        check, joint(twin, ["a.bias", "b.weight", "tied.bias"])[0], s.sq_norm_of_mean
    )  # tied weights dropped


def test_every_step_starts_from_nothing(seed):
    """Tied weights, three steps at the same weights: no sum of one step is left in the next."""
    model, x = Everything().double(), torch.randn(6, 2, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GNSMonitor(model, on_error="raise") as monitor:
        for rows in (slice(0, 6), slice(0, 4), slice(2, 6)):
            optimizer.zero_grad()
            model(x=x[rows]).square().sum().backward()
            optimizer.step()
            losses = [lambda e=e: model(x=e).square().sum() for e in x[rows].split(1)]
            twin = joint(contributions(trainable(model), losses))
            assert monitor.latest is not None
            close([monitor.latest.mean_sq_norm, monitor.latest.sq_norm_of_mean], twin)


def test_bias_gradients_are_summed_over_tokens_first(batch):
    x, _ = batch
    model = nn.Linear(3, 2).double()
    model.weight.requires_grad_(False)
    y = torch.randn(6, 4, 2, dtype=torch.float64)
    s = measure(model, [lambda: loss_of(model, x, y)])
    dy = 2 * (model(x) - y).detach()

    def check(m):
        close(s.mean_sq_norm, m)

    check(6 * float(dy.sum(1).square().sum()))
    rejects(check, 6 * float(dy.square().sum()))  # squared per token
    rejects(check, 6 * float(dy.sum(1).square().mean(1).sum()))  # averaged over outputs


def test_the_mean_of_norms_squared_is_another_number(model, batch):
    s = measure(model, [lambda: loss_of(model, *batch)])
    norms = flat(twin_of(model, *batch)).norm(dim=1) * 6

    def check(m):
        close(s.mean_sq_norm, m)

    check(float(norms.square().mean()))
    rejects(check, float(norms.mean() ** 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_models_are_summed_in_float32(seed, dtype):
    """4096 equal tokens: in bf16 a running sum of ones stops at 256."""
    model = nn.Linear(1, 1, bias=False).to(dtype)
    x = torch.ones(3, 4096, 1, dtype=dtype)

    def check(m):
        close(m, 9 * 4096.0**2, rtol=1e-6)

    s = measure(model, [lambda: model(x).float().sum()])
    check(s.mean_sq_norm)
    rejects(check, 9 * 256.0**2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_dtype_against_the_slow_twin(seed, dtype):
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    x = torch.randn(6, 5, 8).to(dtype)
    s = measure(model, [lambda: model(x).float().square().sum()])
    losses = [lambda i=i: model(x[i : i + 1]).float().square().sum() for i in range(6)]
    close([s.mean_sq_norm, s.sq_norm_of_mean], joint(contributions(trainable(model), losses)), dtype)


def test_negative_estimates_reach_the_record(model):
    """Two opposite examples: q = 0, |G|² = −m/(n−1)·… < 0, unclamped."""
    layer = nn.Linear(2, 1, bias=False).double()
    x = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    s = measure(layer, [lambda: layer(x).sum()])
    assert s.sq_norm_of_mean == 0
    assert s.grad_sq_norm == pytest.approx(-s.mean_sq_norm)
    assert math.isnan(s.b_simple)
    assert s.usable
