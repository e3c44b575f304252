"""Every registered rule against one backward pass per example. A rule without a case fails the first test."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gns import reducers
from gns.rules import LINEAR, Rule, known_kinds, linear, register, rule_for
from gns.rules.base import _REGISTRY, exactly, registered
from gns.rules.linear import as_sequences, gram_is_cheaper, linear_blocks, linear_sq_norms_gram
from tests.gns.rules.cases import CASES, SHAPES, Case, Draw, OwnLinear, on
from tests.reference.per_example import contributions
from tests.reference.tolerances import close

ROWS = [pytest.param(kind, make, id=f"{kind}: {name}") for kind, name, make in CASES]
ONE_EACH = [pytest.param(make, id=kind) for kind, make in {kind: make for kind, _, make in CASES}.items()]


ANY = nn.Identity()  # where a rule does not look at its layer


def activations(shape, dtype, examples):
    """Input and output gradient of a linear layer, of (middle dimensions, in, out)."""
    draw, (middle, i, o) = Draw(3, dtype, examples), shape
    return draw.normal(examples, *middle, i), draw.normal(examples, *middle, o)


def twin(case: Case, dy):
    """Gradients of Σ out·dy, an example at a time."""
    named = {name: p for name, p in case.layer.named_parameters() if p.requires_grad}
    return contributions(named, [lambda b=b: (case.run([b]) * dy[[b]]).sum() for b in range(len(dy))])


def captured(case: Case, draw: Draw):
    """The layer's rule, what the tap would keep of its call, and some gradient at its output."""
    rule = rule_for(case.layer)
    args, kwargs = case.call(range(draw.examples))
    out = case.layer(*args, **kwargs)
    return rule, rule.capture(case.layer, args, kwargs, out), draw.normal(*out.shape)


def check(case, draw, dtype):
    rule, x, dy = captured(case, draw)
    expected = twin(case, dy)
    # norms of `transformers` compute in float32 inside
    rtol = 1e-6 if dtype is torch.float64 and "transformers" in type(case.layer).__module__ else None
    for name, p in case.layer.named_parameters():
        if not p.requires_grad:
            continue
        assert rule.knows(name)
        c = torch.stack([e[name] for e in expected])
        blocks = reducers.blocks(rule, case.layer, x, dy, name)
        assert blocks.shape == (draw.examples, *p.shape)
        assert blocks.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        close(blocks, c, dtype, rtol=rtol, what=f"{name} blocks")
        for limit in (1, 700, reducers.MAX_BYTES):
            found = reducers.sq_norms(rule, case.layer, x, dy, name, limit)
            each = c.flatten(1).square().sum(1)
            close(found, each, dtype, rtol=rtol, what=f"‖c‖² {name}, at most {limit} bytes")
        total = reducers.sum_of_blocks(rule, case.layer, x, dy, name)
        assert total.shape == p.shape
        close(total, c.sum(0), dtype, rtol=rtol, what=f"Σc {name}")


def test_every_registered_rule_has_a_case():
    missing = {rule.kind for rule in registered()} - {kind for kind, _, _ in CASES}
    assert not missing, f"add a row to CASES for {sorted(missing)}: rules are tested the day they land"


@pytest.mark.parametrize(("kind", "make"), ROWS)
@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_blocks_norms_and_sums_are_those_of_one_backward_per_example(kind, make, examples, dtype):
    draw = Draw(1, dtype, examples)
    case = make(draw)
    assert rule_for(case.layer).kind == kind
    check(case, draw, dtype)


@given(data=st.data())
def test_drawn_shapes(data):
    middle = tuple(data.draw(st.lists(st.integers(1, 6), max_size=2), label="middle"))
    i, o = data.draw(st.integers(1, 24), label="in"), data.draw(st.integers(1, 24), label="out")
    bias, examples = data.draw(st.booleans(), label="bias"), data.draw(st.integers(1, 5), label="examples")
    draw = Draw(data.draw(st.integers(0, 99), label="seed"), torch.float64, examples)
    layer = data.draw(
        st.sampled_from([lambda: nn.Linear(i, o, bias), lambda: nn.LayerNorm(i)]), label="layer"
    )
    # a norm of one or two features has nothing left but rounding
    check(on(layer if i > 2 else lambda: nn.Linear(i, o, bias), *middle, i)(draw), draw, torch.float64)


@pytest.mark.parametrize("make", ONE_EACH)
def test_a_frozen_half_leaves_the_other_half_alone(make):
    draw = Draw(2, torch.float64, 3)
    case = make(draw)
    names = [name for name, p in case.layer.named_parameters() if p.requires_grad]
    if len(names) < 2:
        pytest.skip("the layer has one trainable parameter")
    for frozen in names:
        case.layer.requires_grad_(True).get_parameter(frozen).requires_grad_(False)
        rule, x, dy = captured(case, draw)
        for name, c in twin(case, dy)[0].items():
            if name in names:
                close(reducers.blocks(rule, case.layer, x, dy, name)[0], c, what=name)


@pytest.mark.parametrize("make", ONE_EACH)
def test_an_unknown_parameter_never_falls_through(make):
    draw = Draw(2, torch.float64, 2)
    case = make(draw)
    rule, x, dy = captured(case, draw)
    assert not rule.knows("beta")
    with pytest.raises(ValueError, match="parameter 'beta' of a layer of kind .*known: '"):
        rule.blocks(case.layer, x, dy, "beta")


@pytest.mark.parametrize(("kind", "make"), ROWS)
def test_finding_a_rule_leaves_layer_and_random_state_alone(kind, make):
    layer = make(Draw(3, torch.float32, 2)).layer
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    attributes = {name: id(value) for name, value in vars(layer).items()}
    rule_for(layer)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
    assert {name: id(value) for name, value in vars(layer).items()} == attributes


# what looks like a known layer and is none


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * torch.sigmoid(self.weight)


class Wrong(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 1


class AcrossExamples(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return (x - x.mean(0)) * self.weight


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.5) * self.weight


class Halves(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


@pytest.mark.parametrize(
    "layer",
    [
        Gated(),
        Wrong(9, 4),
        AcrossExamples(),
        Noisy(),
        Halves(3, 3),
        nn.BatchNorm1d(4),
        nn.Embedding(9, 4, sparse=True),
        nn.Embedding(9, 4, scale_grad_by_freq=True),
        nn.Bilinear(3, 3, 2),
        nn.ConvTranspose1d(2, 2, 3),
        nn.LSTM(3, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_computes_something_else_has_no_rule(layer):
    assert rule_for(layer) is None


def test_a_batch_dimension_is_needed():
    with pytest.raises(ValueError, match=r"shape \(4,\); \[B, \.\.\., features\] is needed"):
        as_sequences(torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_activations_are_summed_in_float32(dtype):
    # in 16 bits the sum of 4096 ones stops at 256 (bf16) or the square overflows (fp16)
    x, dy = torch.ones(1, 4096, 1, dtype=dtype), torch.ones(1, 4096, 1, dtype=dtype)
    for name in ("weight", "bias"):
        assert float(reducers.sq_norms(LINEAR, nn.Linear(1, 1), x, dy, name)) == 4096.0**2


def test_bias_gradients_are_summed_over_tokens_before_they_are_squared():
    dy = torch.tensor([[[1.0], [-1.0], [3.0]]])
    x = torch.zeros(1, 3, 2)
    assert float(reducers.sq_norms(LINEAR, nn.Linear(2, 1), x, dy, "bias")) == 9.0
    assert float(dy.square().sum()) == 11.0  # the mistake: per-token squares
    both = torch.tensor([[[1.0, 2.0]]])
    assert (
        float(reducers.sq_norms(LINEAR, nn.Linear(2, 2), x[:, :1], both, "bias")) == 5.0
    )  # not averaged over outputs: 2.5


# both forms


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_gram_form_equals_the_direct_form(shape, dtype):
    x, dy = activations(shape, dtype, 4)
    direct = linear_blocks(ANY, x, dy, "weight").double().square().sum((1, 2))
    for limit in (1, 100, 2**28):
        close(linear_sq_norms_gram(x, dy, limit), direct, dtype, what="Gram / direct")


@given(t=st.integers(1, 40), i=st.integers(1, 64), o=st.integers(1, 64))
def test_the_chooser_compares_multiply_adds(t, i, o):
    x, dy = torch.empty(2, t, i), torch.empty(2, t, o)
    assert gram_is_cheaper(x, dy) is (t * t * (i + o) < t * i * o)


@pytest.mark.parametrize(("t", "gram"), [(1, True), (7, True), (8, False), (9, False)])
def test_both_sides_of_the_crossing(monkeypatch, t, gram):
    # I = O = 16: I·O/(I + O) = 8
    used = []
    monkeypatch.setattr(
        linear, "linear_sq_norms_gram", lambda *given: used.append(True) or linear_sq_norms_gram(*given)
    )
    x, dy = activations(((t,), 16, 16), torch.float64, 3)
    got = reducers.sq_norms(LINEAR, nn.Linear(16, 16), x, dy, "weight")
    assert bool(used) is gram
    close(got, linear_blocks(ANY, x, dy, "weight").square().sum((1, 2)), what=f"T = {t}")


@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("t", [16, 64, 512])
def test_a_low_rank_adapter_is_never_given_a_gram_matrix(rank, t):
    wide, narrow = torch.empty(1, t, 4096), torch.empty(1, t, rank)
    assert not gram_is_cheaper(wide, narrow)
    assert not gram_is_cheaper(narrow, wide)
    assert gram_is_cheaper(torch.empty(1, t, 4096), torch.empty(1, t, 4096))


def test_the_gram_form_ignores_middle_dimensions_as_the_direct_form_does():
    x, dy = activations(((2, 3), 16, 16), torch.float64, 2)
    assert gram_is_cheaper(x, dy)
    close(linear_sq_norms_gram(x, dy), linear_sq_norms_gram(x.flatten(1, 2), dy.flatten(1, 2)))


# the registry


def test_registering_a_kind_twice_is_refused():
    with pytest.raises(ValueError, match="'Linear' is registered already"):
        register(Rule("Linear", ("weight",), linear_blocks), lambda module: None)


def test_a_new_rule_is_found_and_listed(monkeypatch):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x.cumsum(-1) * self.weight.roll(1)

    monkeypatch.setattr("gns.rules.base._REGISTRY", dict(_REGISTRY))
    assert rule_for(Scale()) is None
    scale = Rule("Scale", ("weight",), lambda layer, x, dy, p: (x * dy).flatten(1, -2).sum(1))
    rule = register(scale, exactly(scale, Scale))
    assert rule_for(Scale()) is rule
    assert rule in registered()
    kinds = known_kinds().split(", ")
    assert {"Linear", "Scale"} <= set(kinds)
    assert kinds == sorted(kinds)


def test_a_subclass_counts_as_long_as_it_computes_the_same():
    class Same(nn.Linear):
        pass

    assert rule_for(Same(2, 2)) is LINEAR
    assert rule_for(OwnLinear(2, 2)).kind == LINEAR.kind
    assert not rule_for(OwnLinear(2, 2)).autocast  # it may compute in float32, whatever autocast says
    assert rule_for(Halves(2, 2)) is None


def test_a_forward_replaced_on_the_instance_is_not_trusted():
    layer = nn.LayerNorm(4)
    assert rule_for(layer).kind == "Elementwise"
    layer.forward = lambda x: 2 * x
    assert rule_for(layer) is None
