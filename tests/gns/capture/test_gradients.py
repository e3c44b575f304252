"""Reads of `.grad`: squared norms in float32 or wider, emptiness, and what a loop did to them since."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gns.capture.gradients import Stamp, all_empty, sq_norms
from tests.reference.tolerances import close


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_squared_norms_of_any_dtype(dtype):
    g = [torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(dtype), torch.ones(4, dtype=dtype)]
    found = sq_norms(g, g)
    assert all(f.dtype is (torch.float64 if dtype is torch.float64 else torch.float32) for f in found)
    assert all(f.shape == () for f in found)
    close(torch.stack(found), [float(t.double().square().sum()) for t in g], rtol=1e-6)


def test_none_is_zero_and_the_order_holds():
    like = [torch.ones(1), torch.ones(1, dtype=torch.float64), torch.ones(2)]
    found = sq_norms([None, torch.full((1,), 3.0, dtype=torch.float64), torch.full((2,), 2.0)], like)
    assert [float(f) for f in found] == [0, 9, 8]
    assert [f.dtype for f in found] == [torch.float32, torch.float64, torch.float32]
    assert sq_norms([None], [torch.ones(1, dtype=torch.bfloat16)])[0].dtype is torch.float32


def test_sixteen_bit_gradients_neither_overflow_nor_round():
    g = [torch.full((1000,), 300.0, dtype=torch.float16), torch.full((1000,), 1.0, dtype=torch.bfloat16)]
    assert [float(f) for f in sq_norms(g, g)] == [9e7, 1000]


def test_three_million_entries_keep_their_digits():
    g = torch.full((3_000_000,), 0.1)
    close(sq_norms([g], [g])[0], g.double().square().sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("gradients", "empty"),
    [
        ([], True),
        ([None, None], True),
        ([torch.zeros(3), None], True),
        ([torch.zeros(3), torch.tensor([0, 1e-30])], False),
        ([torch.tensor([float("nan")])], False),
        ([torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)], True),
    ],
    ids=str,
)
def test_emptiness(gradients, empty):
    assert all_empty(gradients) is empty


def gradients_of(*values):
    """As `.grad` holds them: the Python object is kept by the parameter alone."""
    parameters = [nn.Parameter(torch.ones(2)) for _ in values]
    for p, v in zip(parameters, values, strict=True):
        p.grad = None if v is None else torch.full((2,), float(v))
    return parameters


def grads(parameters):
    return [p.grad for p in parameters]


def none(ps):
    for p in ps:
        p.grad = None


def zero(ps):
    torch.optim.SGD(ps).zero_grad(set_to_none=False)


def clip(ps):
    nn.utils.clip_grad_norm_(ps, 0.1)


def new(ps):
    for p in ps:
        p.grad = torch.ones(2)


def one_new(ps):
    ps[0].grad = torch.ones(2)


def nothing(ps):
    pass


@pytest.mark.parametrize(
    ("deed", "untouched", "replaced"),
    [
        (nothing, True, False),
        (none, False, True),
        (zero, False, False),
        (clip, False, False),
        (new, False, True),
        (one_new, False, False),
    ],
)
def test_a_stamp_tells_what_the_loop_did(deed, untouched, replaced):
    parameters = gradients_of(1, 2)
    stamp = Stamp(grads(parameters))
    deed(parameters)
    assert stamp.untouched(grads(parameters)) is untouched
    assert stamp.replaced(grads(parameters)) is replaced


def test_gradients_that_were_none_do_not_count_as_replaced():
    parameters = gradients_of(None, 1)
    stamp = Stamp(grads(parameters))
    assert stamp.untouched(grads(parameters))
    parameters[0].grad = torch.ones(2)
    assert not stamp.untouched(grads(parameters))
    assert not stamp.replaced(grads(parameters))
    assert not Stamp([None]).replaced([torch.ones(2)])


def test_a_stamp_keeps_no_gradient_alive():
    import weakref

    parameters = gradients_of(1)
    seen = weakref.ref(parameters[0].grad)
    stamp = Stamp(grads(parameters))
    none(parameters)
    assert seen() is None
    assert stamp.replaced(grads(parameters))
