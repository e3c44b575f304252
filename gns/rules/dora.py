"""DoRA's magnitude vector in `peft`: y = m ⊙ v/‖W + sBA‖ − (base result), v = base result + s·BAx.

The layer is called on x and, where no dropout is active, on the base layer's result. Its output is affine in
m with slope z = (y + base result)/m, so z needs no second pass through the factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gns.rules.base import Rule, register, unknown, wide


def dora_blocks(layer: nn.Module, z: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """Gradient that each example adds to the magnitudes.

    c_b = Σ_t dy_bt ⊙ z_bt

    Args:
        layer: the `peft` layer, for its shape: [O], or [1, O, 1, 1] on convolutions.
        z: like dy, slope of the output in the magnitudes, see `slope`.
        dy: [B, ..., O] (or [B, O, ...] on convolutions), gradient of the loss at its output.
        parameter: "weight".

    Returns:
        [B, *weight.shape], float32 or float64, in loss / parameter.

    Raises:
        ValueError: the layer has no such parameter.

    Source: Liu et al. 2024, arXiv:2402.09353, section 4.3 (the norm counts as a constant).
    Slow twin: tests/reference/per_example.py
    """
    if parameter != "weight":
        raise unknown(parameter, "DoRA", ("weight",))
    product = wide(dy) * wide(z)
    shape = layer._parameters["weight"].shape  # type: ignore[union-attr]
    if len(shape) == 1:
        return product.flatten(1, -2).sum(1) if product.ndim > 2 else product
    return product.flatten(2).sum(2).reshape(len(product), *shape)


def slope(layer: nn.Module, args: tuple, kwargs: dict, out: Any) -> Tensor | None:
    """Slope of the output in the magnitudes, z = (y + base result)/m.

    Args:
        layer: the `peft` layer.
        args: of its call: x.
        kwargs: of its call: at least base_layer; base_result where `peft` has it.
        out: its output y.
    """
    base_layer, base = kwargs.get("base_layer"), kwargs.get("base_result")
    if not isinstance(out, Tensor) or base_layer is None or not args:
        return None
    with torch.no_grad():
        if base is None:  # with dropout on the factors' input the layer works the result out itself
            base = base_layer(args[0])
        if base_layer.bias is not None:
            base = base - base_layer.bias.reshape(-1, *[1] * (base.ndim - 2 if _channels_first(layer) else 0))
        m = layer._parameters["weight"]
        assert m is not None
        return (out.detach() + base.detach()) / (m if m.ndim > 1 else m.reshape(-1)).detach()


def _channels_first(layer: nn.Module) -> bool:
    weight = layer._parameters["weight"]
    return weight is not None and weight.ndim > 1


DORA = Rule("DoRA", ("weight",), dora_blocks, needs_input=("weight",), capture=slope)
_NAMES = ("DoraLinearLayer", "DoraConv1dLayer", "DoraConv2dLayer", "DoraConv3dLayer")


def _recognise(module: nn.Module) -> Rule | None:
    """Recognise `peft`'s layers without importing them."""
    kind = type(module)
    if kind.__module__.partition(".")[0] != "peft" or kind.__name__ not in _NAMES:
        return None
    return DORA


register(DORA, _recognise)
