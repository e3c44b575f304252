"""Reducers: chunking changes nothing, whatever the rule."""

from __future__ import annotations

import pytest
import torch

from gns import reducers
from gns.rules import LINEAR
from gns.rules.base import registered
from tests.reference.tolerances import close


@pytest.fixture
def activations():
    generator = torch.Generator().manual_seed(7)
    draw = {"generator": generator, "dtype": torch.float64}
    return torch.randn(7, 3, 16, **draw), torch.randn(7, 3, 12, **draw), torch.randn(7, 9, 16, **draw)


@pytest.mark.parametrize("limit", [1, 4 * 16 * 12 * 2, 4 * 16 * 12 * 3 + 1, 2**28], ids="{} bytes".format)
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_chunks_add_up(monkeypatch, activations, limit, parameter):
    x, dy, _ = activations
    monkeypatch.setattr(reducers, "CHUNK_BYTES", limit)
    blocks = LINEAR.blocks(x, dy, parameter)
    close(reducers.sum_of_blocks(LINEAR, x, dy, parameter), blocks.sum(0), what="Σc")
    close(reducers.sum_sq_norms(LINEAR, x, dy, parameter), blocks.square().sum(), what="Σ‖c‖²")


@pytest.mark.parametrize("t", [3, 9], ids=["Gram", "direct"])
def test_a_chunk_never_holds_more_than_the_limit(monkeypatch, activations, t):
    x = activations[0] if t == 3 else activations[2]
    dy = torch.ones(7, t, 12, dtype=torch.float64)
    sizes = []
    monkeypatch.setattr(reducers, "CHUNK_BYTES", 4 * 2 * (2 * 3 * 3 if t == 3 else 16 * 12))
    rule = (
        LINEAR
        if t == 3
        else type(LINEAR)(
            "seen",
            LINEAR.layer,
            LINEAR.parameters,
            lambda a, b, p: sizes.append(len(a)) or LINEAR.blocks(a, b, p),
        )
    )
    if t == 3:
        gram = reducers.linear_sq_norms_gram
        monkeypatch.setattr(reducers, "linear_sq_norms_gram", lambda a, b: sizes.append(len(a)) or gram(a, b))
    reducers.sum_sq_norms(rule, x, dy, "weight")
    assert sizes == [2, 2, 2, 1]


def test_one_example_larger_than_the_limit_is_still_measured(monkeypatch):
    monkeypatch.setattr(reducers, "CHUNK_BYTES", 1)
    assert (
        float(reducers.sum_sq_norms(LINEAR, torch.ones(2, 9, 3), torch.ones(2, 9, 4), "weight"))
        == 2 * 12 * 81
    )


@pytest.mark.parametrize("rule", [pytest.param(r, id=r.kind) for r in registered()])
def test_a_form_that_stands_in_belongs_to_a_registered_kind(rule):
    assert set(reducers._SQ_NORM_FORMS) <= {r.kind for r in registered()}


def test_large_float32_sums_keep_their_digits():
    # 3 million equal squares: a running float32 sum is 10⁻⁴ off, a pairwise one is not
    block = torch.full((3_000_000,), 0.1)
    close(reducers.sq_norm(block), block.double().square().sum(), torch.float32, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)], ids=["no example", "no token"])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_nothing_adds_nothing(shape, parameter):
    x, dy = torch.ones(shape), torch.ones(shape)
    assert float(reducers.sum_sq_norms(LINEAR, x, dy, parameter)) == 0
    assert not reducers.sum_of_blocks(LINEAR, x, dy, parameter).any()
