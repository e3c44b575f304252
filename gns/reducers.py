"""What is kept of per-example gradient blocks: squared norms in a metric, their sum, or weighted sums.

Each reducer takes a rule with its arguments, so that the examples of a large layer can be worked off in
chunks, and so that a rule's cheaper form can stand in for the blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gns.metrics import of_blocks
from gns.rules import Rule
from gns.rules.base import added, joined, parameter_of

MAX_BYTES = 256 * 2**20  # of blocks alive at once: a full 4096 × 4096 weight is 64 MiB an example


def blocks(rule: Rule, layer: nn.Module, x: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """Per-example gradients of a parameter, [B, *parameter.shape], float32 or wider, in loss / parameter."""
    return rule.blocks(layer, x, _scaled(rule, dy), parameter)


def sq_norms(
    rule: Rule,
    layer: nn.Module,
    x: Tensor,
    dy: Tensor,
    parameter: str,
    limit: int = MAX_BYTES,
    root: Tensor | None = None,
) -> Tensor:
    """Squared norm of each example's gradient, ‖c_b‖².

    Args:
        rule: of the layer.
        layer: the layer.
        x: [B, ..., I], what the rule captured of its input.
        dy: [B, ..., O], gradient of the loss at its output.
        parameter: the parameter's name in the layer.
        limit: bytes of blocks, or of what stands in for them, alive at once; one example may pass it.
        root: √ of a diagonal metric, of the parameter's shape; blocks are formed then.

    Returns:
        [B], float32 or float64, in (loss / parameter)²; with a root [B, 2], in that metric too.
    """
    dy = _scaled(rule, dy)
    if root is None and rule.sq_norms is not None:
        found = rule.sq_norms(layer, x, dy, parameter, limit)
        if found is not None:
            return found
    limit = limit if root is None else limit // 2  # beside the blocks stand the weighed ones
    size = _chunk(rule, layer, x, dy, parameter, limit)
    if len(dy) <= size:
        return of_blocks(rule.blocks(layer, x, dy, parameter), root)
    chunks = zip(x.split(size), dy.split(size), strict=True)
    return joined([of_blocks(rule.blocks(layer, a, b, parameter), root) for a, b in chunks])


def norms_and_sum(
    rule: Rule, layer: nn.Module, x: Tensor, dy: Tensor, parameter: str, limit: int = MAX_BYTES
) -> tuple[Tensor, Tensor]:
    """‖c_b‖² of each example's gradient and their sum Σ_b c_b, out of one product.

    Args:
        rule: of the layer; it knows both together.
        layer: the layer.
        x: [B, ..., I], what the rule captured of its input.
        dy: [B, ..., O], gradient of the loss at its output.
        parameter: the parameter's name in the layer.
        limit: bytes of blocks alive at once; one example may pass it.

    Returns:
        [B] in (loss / parameter)², and the parameter's shape in loss / parameter; float32 or float64.

    Raises:
        ValueError: the rule has no such form.
    """
    if rule.together is None:
        raise ValueError(f"the rule of {rule.kind} has no form for norms and sum together; ask apart")
    return rule.together(layer, x, _scaled(rule, dy), parameter, limit)


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


def weighted_sums(
    rule: Rule,
    layer: nn.Module,
    x: Tensor,
    dy: Tensor,
    parameter: str,
    weights: Tensor,
    limit: int = MAX_BYTES,
) -> Tensor:
    """Weighted sums of the examples' gradients, Σ_b w_kb c_b: random signs, or 0 and 1 for parts of a batch.

    Args:
        rule: of the layer.
        layer: the layer.
        x: [B, ..., I], what the rule captured of its input.
        dy: [B, ..., O], gradient of the loss at its output.
        parameter: the parameter's name in the layer.
        weights: [K, B].
        limit: bytes of blocks alive at once; one example may pass it.

    Returns:
        [K, *parameter.shape], float32 or float64, in loss / parameter.

    Memory: K·|parameter| for the result, beside the blocks; cost: one block's product and K·B·|parameter|.
    Slow twin: tests/reference/dense_curvature.py
    """
    dy = _scaled(rule, dy)
    size, parts = _chunk(rule, layer, x, dy, parameter, limit), []
    for a, b, w in zip(x.split(size), dy.split(size), weights.split(size, 1), strict=True):
        blocks = rule.blocks(layer, a, b, parameter)
        parts.append((w.to(blocks) @ blocks.flatten(1)).reshape(len(w), *blocks.shape[1:]))
    return added(parts)


def _scaled(rule: Rule, dy: Tensor) -> Tensor:
    if not rule.scaled:
        return dy
    return (dy if dy.dtype is torch.float64 else dy.float()) * rule.scale


def _chunk(rule: Rule, layer: nn.Module, x: Tensor, dy: Tensor, parameter: str, limit: int) -> int:
    """How many examples' blocks may be alive at once; at least one."""
    floats = parameter_of(layer, parameter).numel() + (rule.floats(x, dy) if rule.floats else 0)
    return max(1, limit // (4 * max(1, floats)))
