"""Convolutions in one, two and three dimensions, with stride, padding, dilation and groups."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from gns.rules.base import Rule, exactly, first_tensor, register, unknown, wide

_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


def conv_blocks(layer: nn.Module, x: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """Gradient that each example adds to a convolution's parameter.

    The weight gradient of B examples at once is that of one convolution of B·groups groups.
    bias: c_b = Σ over positions of dy_b

    Args:
        layer: the convolution, for its stride, padding, dilation and groups.
        x: [B, I, ...], its input, channels first.
        dy: [B, O, ...], gradient of the loss at its output.
        parameter: "weight" or "bias".

    Returns:
        [B, O, I/groups, ...] or [B, O], float32 or float64, in loss / parameter.

    Raises:
        ValueError: the layer has no such parameter.

    Source: Rochette et al. 2019, arXiv:1912.06015.
    Slow twin: tests/reference/per_example.py
    """
    if parameter == "bias":
        return wide(dy).flatten(2).sum(2)
    return _weight(layer, x, dy, parameter, each=True)


def conv_total(layer: nn.Module, x: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """Sum of `conv_blocks` over the examples."""
    if parameter == "bias":
        return conv_blocks(layer, x, dy, parameter).sum(0)
    return _weight(layer, x, dy, parameter, each=False)


def _weight(layer: nn.Module, x: Tensor, dy: Tensor, parameter: str, *, each: bool) -> Tensor:
    """Gradient of the weight, summed over the batch or for each example."""
    if parameter != "weight":
        raise unknown(parameter, "Conv", ("weight", "bias"))
    assert isinstance(layer, nn.modules.conv._ConvNd)
    x, padding = _padded(layer, wide(x))
    dy, (b, _, *space) = wide(dy), x.shape
    shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    groups = layer.groups
    if each:
        x = x.reshape(1, b * layer.in_channels, *space)
        dy = dy.reshape(1, b * layer.out_channels, *dy.shape[2:])
        groups *= b
    full = (b * shape[0], *shape[1:]) if each else shape
    gradient: Any = _GRADIENTS[len(space)]  # annotated as taking one integer for all dimensions
    found = gradient(x, full, dy, layer.stride, padding, layer.dilation, groups)
    return found.reshape(b, *shape) if each else found


def _padded(layer: nn.modules.conv._ConvNd, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Pad x as the layer does where the convolution itself cannot; give it and the padding that is left."""
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return x, tuple(layer.padding)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0,) * (x.ndim - 2)


_DIMENSIONS = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}  # of a batched input


def _batched(layer: nn.Module, args: tuple, kwargs: dict, out: Any) -> Tensor | None:
    """Give the input if it has a batch dimension; torch takes one without."""
    x = first_tensor(layer, args, kwargs, out)
    needed = next(d for kind, d in _DIMENSIONS.items() if isinstance(layer, kind))
    return x if x is not None and x.ndim == needed else None


CONV = Rule(
    "Conv",
    ("weight", "bias"),
    conv_blocks,
    needs_input=("weight",),
    total=conv_total,
    capture=_batched,
    autocast=True,
    tokenwise=False,
)
register(CONV, exactly(CONV, *_DIMENSIONS))
