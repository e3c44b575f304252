"""The linear layer y = x Wᵀ + b, and so both LoRA factors, which `peft` builds as linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gns.rules.base import Rule, register


def as_sequences(x: Tensor) -> Tensor:
    """View [B, ..., F] as [B, T, F], in float32 or wider.

    Raises:
        ValueError: there is no batch dimension.
    """
    if x.ndim < 2:
        raise ValueError(f"an activation has shape {tuple(x.shape)}; [B, ..., features] is needed")
    x = x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)
    return x if x.dtype is torch.float64 else x.float()


def linear_blocks(x: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """Gradient that each example adds to a linear layer's parameter.

    weight: C_b = Σ_t dy_bt x_btᵀ        bias: c_b = Σ_t dy_bt

    Args:
        x: [B, ..., I], the layer's input.
        dy: [B, ..., O], gradient of the loss at its output.
        parameter: "weight" or "bias".

    Returns:
        [B, O, I] or [B, O], float32 or float64, in loss / parameter.

    Raises:
        ValueError: the layer has no such parameter.

    Slow twin: tests/reference/per_example.py
    """
    if parameter == "weight":
        return torch.bmm(as_sequences(dy).mT, as_sequences(x))
    if parameter == "bias":
        return as_sequences(dy).sum(1)
    raise ValueError(f"parameter {parameter!r} of a linear layer; known: 'weight', 'bias'")


def gram_is_cheaper(x: Tensor, dy: Tensor) -> bool:
    """Compare the two forms' multiply-adds: T²(I + O) for the Gram form against T·I·O for the product."""
    t, i, o = x.shape[1:-1].numel(), x.shape[-1], dy.shape[-1]
    return t * (i + o) < i * o


def linear_sq_norms_gram(x: Tensor, dy: Tensor) -> Tensor:
    """Squared norm of each example's weight gradient, without forming the gradient.

    s_b = ‖Σ_t dy_bt x_btᵀ‖² = Σ_tu (x_bt·x_bu)(dy_bt·dy_bu)

    Args:
        x: [B, ..., I], the layer's input.
        dy: [B, ..., O], gradient of the loss at its output.

    Returns:
        [B], float32 or float64, in (loss / parameter)².

    Memory: 2T² per example, against I·O for the product.
    Source: Li et al. 2022, arXiv:2110.05679; T = 1 is Goodfellow 2015, arXiv:1510.01799.
    Slow twin: tests/reference/per_example.py
    """
    x, dy = as_sequences(x), as_sequences(dy)
    if x.shape[1] == 1:
        return x.square().sum((1, 2)) * dy.square().sum((1, 2))
    return (torch.bmm(x, x.mT) * torch.bmm(dy, dy.mT)).sum((1, 2))


LINEAR = register(Rule("Linear", nn.Linear, ("weight", "bias"), linear_blocks, needs_input=("weight",)))
