"""What is kept of per-example gradient blocks: their squared norms, or their sum.

Each reducer takes a rule and its two arguments, so that the examples of a large layer can be worked off in
chunks, and so that a cheaper form can stand in for one pair of rule and reducer (`_SQ_NORM_FORMS`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gns.rules import LINEAR, Rule
from gns.rules.linear import gram_is_cheaper, linear_sq_norms_gram

CHUNK_BYTES = 256 * 2**20  # of blocks alive at once: a full 4096 × 4096 weight is 64 MiB an example


def _linear_form(x: Tensor, dy: Tensor, parameter: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    return linear_sq_norms_gram if parameter == "weight" and gram_is_cheaper(x, dy) else None


# (rule's kind) → chooser of a form that gives [B] squared norms without blocks, or None to form the blocks
_SQ_NORM_FORMS = {LINEAR.kind: _linear_form}


def _chunks(x: Tensor, dy: Tensor, floats_per_example: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, CHUNK_BYTES // (4 * max(1, floats_per_example)))
    return zip(x.split(size), dy.split(size), strict=True)


def _block_floats(x: Tensor, dy: Tensor, parameter: str) -> int:
    return x.shape[-1] * dy.shape[-1] if parameter == "weight" else dy.shape[-1]


def sum_sq_norms(rule: Rule, x: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """Sum of the examples' squared gradient norms, Σ_b ‖c_b‖².

    Args:
        rule: of the layer.
        x: [B, ..., I], the layer's input.
        dy: [B, ..., O], gradient of the loss at its output.
        parameter: the parameter's name in the layer.

    Returns:
        Scalar, float32 or float64, in (loss / parameter)².
    """
    choose = _SQ_NORM_FORMS.get(rule.kind)
    form = choose(x, dy, parameter) if choose else None
    if form is not None:
        t = x.shape[1:-1].numel()
        return _total([form(a, b).sum() for a, b in _chunks(x, dy, 2 * t * t)])
    return _total(
        [sq_norm(rule.blocks(a, b, parameter)) for a, b in _chunks(x, dy, _block_floats(x, dy, parameter))]
    )


def sum_of_blocks(rule: Rule, x: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """Sum of the examples' gradients, Σ_b c_b, which must be what autograd adds to `.grad`.

    Args:
        rule: of the layer.
        x: [B, ..., I], the layer's input.
        dy: [B, ..., O], gradient of the loss at its output.
        parameter: the parameter's name in the layer.

    Returns:
        The parameter's shape, float32 or float64, in loss / parameter.
    """
    return _total(
        [rule.blocks(a, b, parameter).sum(0) for a, b in _chunks(x, dy, _block_floats(x, dy, parameter))]
    )


def sq_norm(block: Tensor) -> Tensor:
    """Squared norm of all entries, scalar; summed pairwise, in the block's own float32 or float64."""
    return block.square().sum()


def _total(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
