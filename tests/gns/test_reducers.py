"""Reducers: chunking changes nothing, whatever the rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from gns import reducers
from gns.metrics import of_blocks
from gns.rules import LINEAR
from tests.reference.tolerances import close

LAYER = nn.Linear(16, 12)


@pytest.fixture
def activations():
    generator = torch.Generator().manual_seed(7)
    draw = {"generator": generator, "dtype": torch.float64}
    return torch.randn(7, 3, 16, **draw), torch.randn(7, 3, 12, **draw), torch.randn(7, 9, 16, **draw)


@pytest.mark.parametrize("limit", [1, 4 * 16 * 12 * 2, 4 * 16 * 12 * 3 + 1, 2**28], ids="{} bytes".format)
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_chunks_add_up(activations, limit, parameter):
    x, dy, _ = activations
    blocks = LINEAR.blocks(LAYER, x, dy, parameter)
    close(reducers.sum_of_blocks(LINEAR, LAYER, x, dy, parameter, limit), blocks.sum(0), what="Σc")
    slow = replace(LINEAR, total=None, sq_norms=None)
    close(reducers.sum_of_blocks(slow, LAYER, x, dy, parameter, limit), blocks.sum(0), what="Σc, by blocks")
    for rule in (LINEAR, slow):
        found = reducers.sq_norms(rule, LAYER, x, dy, parameter, limit)
        close(found, blocks.flatten(1).square().sum(1), what="‖c‖²")


@pytest.mark.parametrize(("root", "expected"), [(None, [2, 2, 2, 1]), (torch.ones(12, 16), [1] * 7)])
def test_a_chunk_never_holds_more_than_the_limit(activations, root, expected):
    """With a root, weighed blocks stand beside the blocks."""
    x, sizes = activations[2], []
    dy = torch.ones(7, 9, 12, dtype=torch.float64)
    seen = replace(
        LINEAR, sq_norms=None, blocks=lambda m, a, b, p: sizes.append(len(a)) or LINEAR.blocks(m, a, b, p)
    )
    reducers.sq_norms(seen, LAYER, x, dy, "weight", 4 * 2 * 16 * 12, root)
    assert sizes == expected


@pytest.mark.parametrize(("t", "i", "o"), [(3, 64, 64), (200, 64, 48), (600, 8, 700)])
@pytest.mark.parametrize("limit", [1_000, 10_000])
def test_linear_products_stay_below_the_limit(monkeypatch, t, i, o, limit):
    sizes, product = [], torch.bmm
    monkeypatch.setattr(
        torch, "bmm", lambda a, b: sizes.append(4 * a.shape[0] * a.shape[1] * b.shape[2]) or product(a, b)
    )
    x, dy = torch.randn(3, t, i), torch.randn(3, t, o)
    found = reducers.sq_norms(LINEAR, nn.Linear(i, o), x, dy, "weight", limit)
    assert max(sizes) <= max(limit, 4 * t, 4 * i)  # at least one position, or one output feature, at a time
    close(found, (dy.double().mT @ x.double()).square().sum((1, 2)), torch.float32)


def test_one_example_larger_than_the_limit_is_still_measured():
    slow = replace(LINEAR, sq_norms=None)
    found = reducers.sq_norms(slow, nn.Linear(3, 4), torch.ones(2, 9, 3), torch.ones(2, 9, 4), "weight", 1)
    assert found.tolist() == [12 * 81, 12 * 81]


def test_a_scaled_rule_scales_blocks_sums_and_norms(activations):
    x, dy, _ = activations
    twice = replace(LINEAR, scale=2.0)
    c = LINEAR.blocks(LAYER, x, dy, "weight")
    close(reducers.blocks(twice, LAYER, x, dy, "weight"), 2 * c)
    close(reducers.sum_of_blocks(twice, LAYER, x, dy, "weight"), 2 * c.sum(0))
    close(reducers.sq_norms(twice, LAYER, x, dy, "weight"), 4 * c.square().sum((1, 2)))


def test_large_float32_sums_keep_their_digits():
    # 3 million equal squares: a running float32 sum is 10⁻⁴ off, a pairwise one is not
    blocks = torch.full((2, 1_500, 1_000), 0.1)
    close(of_blocks(blocks), blocks.double().square().sum((1, 2)), torch.float32, rtol=1e-6)
    assert of_blocks(torch.tensor([2.0, 3.0])).tolist() == [4, 9], "blocks of a single number"


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)], ids=["no example", "no token"])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_nothing_adds_nothing(shape, parameter):
    x, dy = torch.ones(shape), torch.ones(shape)
    assert reducers.sq_norms(LINEAR, nn.Linear(4, 4), x, dy, parameter).tolist() == [0] * shape[0]
    assert not reducers.sum_of_blocks(LINEAR, nn.Linear(4, 4), x, dy, parameter).any()


@pytest.mark.parametrize("limit", [1, 4 * 16 * 12 * 2, 2**28], ids="{} bytes".format)
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_weighted_sums_are_those_of_the_blocks(activations, limit, parameter):
    x, dy, _ = activations
    weights = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rule = replace(LINEAR, scale=3.0)
    expected = 3 * torch.einsum("kb,b...->k...", weights, LINEAR.blocks(LAYER, x, dy, parameter))
    close(reducers.weighted_sums(rule, LAYER, x, dy, parameter, weights, limit), expected, what="Σwc")
