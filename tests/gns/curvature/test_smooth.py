"""Attention, cross-entropy and silu of few operations: the values and derivatives of torch's own."""

import inspect
import re

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from gns.curvature.smooth import _INSTEAD, Smooth, _silu, attended, plain_entropy
from tests.reference.tolerances import close

WIDE = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=WIDE, generator=torch.Generator().manual_seed(seed))


def derivatives(function, inputs, *, ours):
    """Value, gradient and a product with the Hessian; and whether the function was called otherwise."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        if ours:
            with Smooth():
                value = function(*inputs)
        else:
            value = function(*inputs)
        first = torch.autograd.grad(value, inputs, create_graph=True)
    along = [draw(*g.shape, seed=7 + k) for k, g in enumerate(first)]
    second = torch.autograd.grad(first, inputs, along)
    return [value.detach(), *(g.detach() for g in first), *second]


LABELS = torch.tensor([1, -100, 3, 0, -100, 6])
MASK = torch.ones(5, 5, dtype=torch.bool).tril()
FAR = torch.stack([MASK, MASK | (torch.arange(5) == 4)])[:, None]  # [2, 1, 5, 5], another for each example


def entropy(**how):
    return lambda x: 1.7 * functional.cross_entropy(x, LABELS, **how) ** 2


def attention(**how):
    return lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, **how).square().sum()


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (entropy(), [(6, 7)]),
        (entropy(reduction="sum"), [(6, 7)]),  # left as it is, as the next are
        (entropy(label_smoothing=0.1), [(6, 7)]),
        (entropy(weight=draw(7).exp()), [(6, 7)]),
        (lambda x, y: (functional.silu(3 * x) * y).square().sum(), [(6, 7)] * 2),
        (attention(), [(2, 3, 5, 4)] * 3),
        (attention(is_causal=True), [(2, 3, 5, 4)] * 3),
        (attention(attn_mask=MASK, scale=0.3), [(2, 3, 5, 4)] * 3),
        (attention(attn_mask=FAR), [(2, 3, 5, 4)] * 3),
        (attention(attn_mask=draw(2, 1, 5, 5)), [(2, 3, 5, 4)] * 3),
        (attention(attn_mask=MASK & (torch.arange(5)[:, None] > 0)), [(2, 3, 5, 4)] * 3),  # a row sees none
        (attention(enable_gqa=True), [(2, 4, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4)]),
        (attention(), [(2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 8)]),
    ],
)
def test_values_and_both_derivatives_are_those_of_torch(function, shapes):
    inputs = [draw(*shape, seed=k) for k, shape in enumerate(shapes)]
    for found, expected in zip(
        derivatives(function, inputs, ours=True), derivatives(function, inputs, ours=False), strict=True
    ):
        close(found, expected, rtol=1e-10)


def test_the_simple_calls_are_the_ones_replaced():
    x, q = draw(6, 7).requires_grad_(), draw(2, 3, 5, 4).requires_grad_()
    with Smooth():
        ours = functional.cross_entropy(x, LABELS)
        other = functional.cross_entropy(x, LABELS, reduction="sum")
        attended = functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert "_Entropy" in type(ours.grad_fn).__name__ and "_Entropy" not in type(other.grad_fn).__name__
    assert "ScaledDot" not in type(attended.grad_fn).__name__
    with Smooth():
        assert "_Silu" in type(functional.silu(x).grad_fn).__name__
    assert "_Entropy" not in type(functional.cross_entropy(x, LABELS).grad_fn).__name__


def test_a_row_that_is_ignored_may_forbid_the_first_class():
    logits = torch.randn(3, 4, dtype=torch.float64)
    logits[:, 0] = -torch.inf
    labels = torch.tensor([1, -100, 2])
    with Smooth():
        found = torch.nn.functional.cross_entropy(logits, labels)
    assert found == torch.nn.functional.cross_entropy(logits, labels)


TAKES = {
    functional.cross_entropy: plain_entropy,
    functional.scaled_dot_product_attention: attended,
    functional.silu: _silu,
}


@pytest.mark.parametrize("function", _INSTEAD, ids=lambda f: f.__name__)
def test_a_replacement_takes_what_torchs_function_takes_by_the_same_names(function):
    try:
        theirs = inspect.signature(function)
    except ValueError:  # compiled: its documentation begins with the call
        call = re.search(r"\((.*?)\) -> Tensor:", function.__doc__, re.DOTALL)[1]
        theirs = inspect.signature(eval(f"(lambda {call}: None)"))
    ours = inspect.signature(TAKES[function]).parameters.values()
    assert [(p.name, p.default) for p in ours if p.kind is not p.KEYWORD_ONLY] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x: functional.cross_entropy(input=x, target=LABELS, ignore_index=-100) ** 2, [(6, 7)]),
        (lambda x: functional.silu(input=x, inplace=False).square().sum(), [(6, 7)]),
        (
            lambda q, k, v: (
                functional.scaled_dot_product_attention(
                    value=v, key=k, query=q, attn_mask=MASK, dropout_p=0.0, is_causal=False, scale=None
                )
                .square()
                .sum()
            ),
            [(2, 3, 5, 4)] * 3,
        ),
    ],
)
def test_calls_by_keyword_are_replaced_too(function, shapes):
    inputs = [draw(*shape, seed=k) for k, shape in enumerate(shapes)]
    for found, expected in zip(
        derivatives(function, inputs, ours=True), derivatives(function, inputs, ours=False), strict=True
    ):
        close(found, expected, rtol=1e-10)
