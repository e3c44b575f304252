"""GPT-2's `Conv1D`, a linear layer with the weight the other way round: y = x W + b, W [I, O]."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from gns.rules.base import Rule, register
from gns.rules.linear import (
    as_sequences,
    linear_blocks,
    linear_sq_norms,
    linear_total,
    multiplies,
    wide_bmm,
)


def conv1d_blocks(layer: nn.Module, x: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """Gradient that each example adds to a parameter of y = x W + b.

    weight: C_b = Σ_t x_bt dy_btᵀ        bias: c_b = Σ_t dy_bt

    Args:
        layer: the layer; not looked at.
        x: [B, ..., I], the layer's input.
        dy: [B, ..., O], gradient of the loss at its output.
        parameter: "weight" or "bias".

    Returns:
        [B, I, O] or [B, O], float32 or float64, in loss / parameter.

    Raises:
        ValueError: the layer has no such parameter.

    Slow twin: tests/reference/per_example.py
    """
    if parameter == "weight":
        return wide_bmm(as_sequences(x).mT, as_sequences(dy))
    return linear_blocks(layer, x, dy, parameter)


def conv1d_total(layer: nn.Module, x: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """Sum of `conv1d_blocks` over the examples, in one product."""
    total = linear_total(layer, x, dy, parameter)
    return total.mT if parameter == "weight" else total


CONV1D = Rule(
    "Conv1D",
    ("weight", "bias"),
    conv1d_blocks,
    needs_input=("weight",),
    total=conv1d_total,
    sq_norms=linear_sq_norms,  # a norm does not see the transposition
    autocast=True,
)


def _recognise(module: nn.Module) -> Rule | None:
    kind = type(module)
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return None if "forward" in module.__dict__ else CONV1D
    return replace(CONV1D, autocast=False) if multiplies(module, transposed=True) else None


register(CONV1D, _recognise)
