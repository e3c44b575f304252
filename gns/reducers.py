"""What is kept of per-example gradient blocks: their squared norms, or their sum.

Each reducer takes a rule with its arguments, so that the examples of a large layer can be worked off in
chunks, and so that a rule's cheaper form can stand in for the blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gns.rules import Rule
from gns.rules.base import added, joined, parameter_of

MAX_BYTES = 256 * 2**20  # of blocks alive at once: a full 4096 × 4096 weight is 64 MiB an example


def blocks(rule: Rule, layer: nn.Module, x: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """Per-example gradients of a parameter, [B, *parameter.shape], float32 or wider, in loss / parameter."""
    return rule.blocks(layer, x, _scaled(rule, dy), parameter)


def sq_norms(
    rule: Rule, layer: nn.Module, x: Tensor, dy: Tensor, parameter: str, limit: int = MAX_BYTES
) -> Tensor:
    """Squared norm of each example's gradient, ‖c_b‖².

    Args:
        rule: of the layer.
        layer: the layer.
        x: [B, ..., I], what the rule captured of its input.
        dy: [B, ..., O], gradient of the loss at its output.
        parameter: the parameter's name in the layer.
        limit: bytes of blocks, or of what stands in for them, alive at once; one example may pass it.

    Returns:
        [B], float32 or float64, in (loss / parameter)².
    """
    dy = _scaled(rule, dy)
    found = rule.sq_norms(layer, x, dy, parameter, limit) if rule.sq_norms is not None else None
    if found is not None:
        return found
    size = _chunk(rule, layer, x, dy, parameter, limit)
    if len(dy) <= size:
        return sq_norms_of(rule.blocks(layer, x, dy, parameter))
    chunks = zip(x.split(size), dy.split(size), strict=True)
    return joined([sq_norms_of(rule.blocks(layer, a, b, parameter)) for a, b in chunks])


def sum_of_blocks(
    rule: Rule, layer: nn.Module, x: Tensor, dy: Tensor, parameter: str, limit: int = MAX_BYTES
) -> Tensor:
    """Sum of the examples' gradients, Σ_b c_b, which must be what autograd adds to `.grad`.

    Args:
        rule: of the layer.
        layer: the layer.
        x: [B, ..., I], what the rule captured of its input.
        dy: [B, ..., O], gradient of the loss at its output.
        parameter: the parameter's name in the layer.
        limit: bytes of blocks alive at once; one example may pass it.

    Returns:
        The parameter's shape, float32 or float64, in loss / parameter.
    """
    dy = _scaled(rule, dy)
    if rule.total is not None:
        return rule.total(layer, x, dy, parameter)
    size = _chunk(rule, layer, x, dy, parameter, limit)
    chunks = zip(x.split(size), dy.split(size), strict=True)
    return added([rule.blocks(layer, a, b, parameter).sum(0) for a, b in chunks])


def sq_norms_of(blocks: Tensor) -> Tensor:
    """Squared norm of each block [B, ...], [B]; summed pairwise, in the blocks' own float32 or float64."""
    if blocks.ndim == 1:
        return blocks.square()
    if blocks.is_cuda:  # reads the blocks once and writes no squares
        return torch.linalg.vector_norm(blocks.flatten(1), dim=1).square()
    # on CPU that kernel adds in sequence: 10⁻⁴ off at 3 million float32 entries
    return blocks.square().sum(tuple(range(1, blocks.ndim)))


def _scaled(rule: Rule, dy: Tensor) -> Tensor:
    if not rule.scaled:
        return dy
    return (dy if dy.dtype is torch.float64 else dy.float()) * rule.scale


def _chunk(rule: Rule, layer: nn.Module, x: Tensor, dy: Tensor, parameter: str, limit: int) -> int:
    """How many examples' blocks may be alive at once; at least one."""
    floats = parameter_of(layer, parameter).numel() + (rule.floats(x, dy) if rule.floats else 0)
    return max(1, limit // (4 * max(1, floats)))
