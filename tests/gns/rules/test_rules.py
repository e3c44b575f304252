"""Every registered rule against one backward pass per example. A rule without a row fails the first test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gns import reducers
from gns.rules import LINEAR, Rule, known_kinds, register, rule_for
from gns.rules.base import _REGISTRY, registered
from gns.rules.linear import as_sequences, gram_is_cheaper, linear_blocks, linear_sq_norms_gram
from tests.reference.per_example import contributions
from tests.reference.tolerances import close

# kind → (middle dimensions, in, out, bias, dtype) → (layer, input with 3 examples made by `draw`)
Factory = Callable[
    [tuple[int, ...], int, int, bool, torch.dtype, int, torch.Generator], tuple[nn.Module, Tensor]
]


def linear_case(middle, i, o, bias, dtype, examples, generator):
    layer = nn.Linear(i, o, bias=bias, dtype=dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(examples, *middle, i, generator=generator, dtype=torch.float64).to(dtype)
    return layer, x


FACTORIES: dict[str, Factory] = {"Linear": linear_case}

SHAPES = [  # (middle dimensions, in, out): 2-d to 4-d inputs, T = 1, Gram form on both sides of its crossing
    ((), 5, 3),
    ((1,), 4, 6),
    ((1,), 1, 1),
    ((7,), 5, 3),
    ((2,), 16, 16),
    ((3, 4), 5, 3),
    ((2, 2), 16, 12),
    ((1, 1), 3, 8),
]
RULES = [pytest.param(rule, id=rule.kind) for rule in registered()]


def twin(layer: nn.Module, x: Tensor, weights: Tensor) -> list[dict[str, Tensor]]:
    """Gradients of Σ out·weights, an example at a time."""
    named = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    return contributions(
        named, [lambda b=b: (layer(x[b : b + 1]) * weights[b : b + 1]).sum() for b in range(len(x))]
    )


def case(rule, shape, bias, dtype, examples, seed):
    generator = torch.Generator().manual_seed(seed)
    layer, x = FACTORIES[rule.kind](*shape, bias, dtype, examples, generator)
    out = layer(x)
    dy = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return layer, x, dy


def test_every_registered_rule_has_a_factory_here():
    missing = {rule.kind for rule in registered()} - FACTORIES.keys()
    assert not missing, f"add a row to FACTORIES for {sorted(missing)}: rules are tested the day they land"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_blocks_norms_and_sums_are_those_of_one_backward_per_example(rule, shape, bias, examples, dtype):
    layer, x, dy = case(rule, shape, bias, dtype, examples, seed=1)
    expected = twin(layer, x, dy)
    for name, p in layer.named_parameters():
        c = torch.stack([e[name] for e in expected])
        blocks = rule.blocks(x, dy, name)
        assert blocks.shape == (examples, *p.shape)
        assert blocks.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        close(blocks, c, dtype, what=f"{name} blocks")
        close(reducers.sum_sq_norms(rule, x, dy, name), c.square().sum(), dtype, what=f"Σ‖c‖² {name}")
        total = reducers.sum_of_blocks(rule, x, dy, name)
        assert total.shape == p.shape
        close(total, c.sum(0), dtype, what=f"Σc {name}")


@pytest.mark.parametrize("rule", RULES)
@given(data=st.data())
def test_drawn_shapes(rule, data):
    middle = tuple(data.draw(st.lists(st.integers(1, 6), max_size=2), label="middle"))
    shape = (middle, data.draw(st.integers(1, 24), label="in"), data.draw(st.integers(1, 24), label="out"))
    examples = data.draw(st.integers(1, 5), label="examples")
    layer, x, dy = case(
        rule,
        shape,
        data.draw(st.booleans()),
        torch.float64,
        examples,
        data.draw(st.integers(0, 99), label="seed"),
    )
    expected = twin(layer, x, dy)
    for name in expected[0]:
        c = torch.stack([e[name] for e in expected])
        close(rule.blocks(x, dy, name), c, what=f"{name} blocks")
        close(reducers.sum_sq_norms(rule, x, dy, name), c.square().sum(), what=f"Σ‖c‖² {name}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_half_leaves_the_other_half_alone(rule, frozen):
    layer, x, dy = case(rule, ((4,), 5, 3), True, torch.float64, 3, seed=2)
    if frozen not in dict(layer.named_parameters()):
        pytest.skip(f"{rule.kind} has no {frozen}")
    layer.get_parameter(frozen).requires_grad_(False)
    for name, c in twin(layer, x, dy)[0].items():
        close(rule.blocks(x, dy, name)[0], c, what=name)


@pytest.mark.parametrize("rule", RULES)
def test_an_unknown_parameter_never_falls_through(rule):
    x = dy = torch.ones(2, 3)
    with pytest.raises(ValueError, match="parameter 'gamma'.*known: 'weight'"):
        rule.blocks(x, dy, "gamma")


def test_a_batch_dimension_is_needed():
    with pytest.raises(ValueError, match=r"shape \(4,\); \[B, \.\.\., features\] is needed"):
        as_sequences(torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_activations_are_summed_in_float32(dtype):
    # in 16 bits the sum of 4096 ones stops at 256 (bf16) or the square overflows (fp16)
    x, dy = torch.ones(1, 4096, 1, dtype=dtype), torch.ones(1, 4096, 1, dtype=dtype)
    for name in ("weight", "bias"):
        assert float(reducers.sum_sq_norms(LINEAR, x, dy, name)) == 4096.0**2


def test_bias_gradients_are_summed_over_tokens_before_they_are_squared():
    dy = torch.tensor([[[1.0], [-1.0], [3.0]]])
    x = torch.zeros(1, 3, 2)
    assert float(reducers.sum_sq_norms(LINEAR, x, dy, "bias")) == 9.0
    assert float(dy.square().sum()) == 11.0  # the mistake: per-token squares
    both = torch.tensor([[[1.0, 2.0]]])
    assert (
        float(reducers.sum_sq_norms(LINEAR, x[:, :1], both, "bias")) == 5.0
    )  # not averaged over outputs: 2.5


# both forms


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_gram_form_equals_the_direct_form(shape, dtype):
    _, x, dy = case(LINEAR, shape, False, dtype, 4, seed=3)
    direct = linear_blocks(x, dy, "weight").double().square().sum((1, 2))
    close(linear_sq_norms_gram(x, dy), direct, dtype, what="Gram / direct")


@given(t=st.integers(1, 40), i=st.integers(1, 64), o=st.integers(1, 64))
def test_the_chooser_compares_multiply_adds(t, i, o):
    x, dy = torch.empty(2, t, i), torch.empty(2, t, o)
    assert gram_is_cheaper(x, dy) is (t * t * (i + o) < t * i * o)


@pytest.mark.parametrize(("t", "gram"), [(1, True), (7, True), (8, False), (9, False)])
def test_both_sides_of_the_crossing(monkeypatch, t, gram):
    # I = O = 16: I·O/(I + O) = 8
    used = []
    monkeypatch.setattr(
        reducers, "linear_sq_norms_gram", lambda x, dy: used.append(True) or linear_sq_norms_gram(x, dy)
    )
    _, x, dy = case(LINEAR, ((t,), 16, 16), False, torch.float64, 3, seed=4)
    got = reducers.sum_sq_norms(LINEAR, x, dy, "weight")
    assert bool(used) is gram
    close(got, linear_blocks(x, dy, "weight").square().sum(), what=f"T = {t}")


@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("t", [16, 64, 512])
def test_a_low_rank_adapter_is_never_given_a_gram_matrix(rank, t):
    wide, narrow = torch.empty(1, t, 4096), torch.empty(1, t, rank)
    assert not gram_is_cheaper(wide, narrow)
    assert not gram_is_cheaper(narrow, wide)
    assert gram_is_cheaper(torch.empty(1, t, 4096), torch.empty(1, t, 4096))


def test_the_gram_form_ignores_middle_dimensions_as_the_direct_form_does():
    _, x, dy = case(LINEAR, ((2, 3), 16, 16), False, torch.float64, 2, seed=5)
    assert gram_is_cheaper(x, dy)
    close(linear_sq_norms_gram(x, dy), linear_sq_norms_gram(x.flatten(1, 2), dy.flatten(1, 2)))


# the registry


def test_registering_a_kind_twice_is_refused():
    with pytest.raises(ValueError, match="'Linear' is registered already"):
        register(Rule("Linear", nn.Linear, ("weight",), linear_blocks))


def test_a_new_rule_is_found_and_listed(monkeypatch):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.weight

    monkeypatch.setattr("gns.rules.base._REGISTRY", dict(_REGISTRY))
    assert rule_for(Scale()) is None
    rule = register(Rule("Scale", Scale, ("weight",), lambda x, dy, p: (x * dy).flatten(1, -2).sum(1)))
    assert rule_for(Scale()) is rule
    assert rule in registered()
    kinds = known_kinds().split(", ")
    assert {"Linear", "Scale"} <= set(kinds)
    assert kinds == sorted(kinds)


def test_a_subclass_counts_only_if_it_keeps_forward():
    class Same(nn.Linear):
        pass

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert rule_for(Same(2, 2)) is LINEAR
    assert rule_for(Scaled(2, 2)) is None
    assert rule_for(nn.LayerNorm(2)) is None
