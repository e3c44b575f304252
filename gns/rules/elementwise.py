"""Layers that scale and shift entry by entry: LayerNorm, RMSNorm of every family, GroupNorm, LayerScale, ...

    y = z(x) ⊙ w + b        z: the normalised input, or whatever else the layer makes of x alone

Which module is one is found out by what it computes, on random numbers, not by its name. In backward z is
computed again by the module itself with w = 1 and b = 0, so that its eps, its mean subtraction and its
1 + w are whatever the module says they are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gns.rules.base import Rule, register, unknown, wide
from gns.rules.probing import close, own_parameters, run_in, stand_in

KIND = "Elementwise"


class Form(NamedTuple):
    """What probing found.

    Args:
        shape: of every parameter.
        channel: whether it lies on dimension 1 of the input (GroupNorm) and not on the last ones.
        shifts: parameters that are added; all others multiply.
        offset: whether anything is left of the output where all parameters are 0 (as for 1 + w).
        mode: the only mode (training or not) in which the layer is of this form, or None for both.
    """

    shape: tuple[int, ...]
    channel: bool
    shifts: frozenset[str]
    offset: bool
    mode: bool | None = None


def _output(layer: nn.Module, form: Form, x: Tensor, one: str | None) -> Tensor:
    """Run the layer with parameter `one` set to 1 and all others to 0."""
    values: Mapping[str, Tensor | None] = {
        name: None
        if p is None
        else torch.full(form.shape, float(name == one), dtype=x.dtype, device=x.device)
        for name, p in layer._parameters.items()
    }
    twin = stand_in(layer, values)
    twin.__dict__["_buffers"] = {  # copies: running statistics must not move; and of the precision of x
        name: None if b is None else b.to(x.dtype if b.is_floating_point() else b.dtype, copy=True)
        for name, b in layer._buffers.items()
    }
    twin.training = layer.training if form.mode is None else form.mode
    return twin.forward(x)


def elementwise_blocks(form: Form, layer: nn.Module, x: Tensor, dy: Tensor, parameter: str) -> Tensor:
    """Gradient that each example adds to a scale or a shift.

    scale: c_b = Σ_t dy_bt ⊙ z(x_bt)        shift: c_b = Σ_t dy_bt

    Args:
        form: what the layer computes.
        layer: the layer, for its settings and buffers.
        x: [B, ..., *shape] (or [B, *shape, ...] with channels first), its input.
        dy: like its output, gradient of the loss there.
        parameter: name of the scale or shift.

    Returns:
        [B, *shape], float32 or float64, in loss / parameter.

    Raises:
        ValueError: the layer has no such parameter.

    Slow twin: tests/reference/per_example.py
    """
    if parameter not in layer._parameters:
        raise unknown(parameter, KIND, tuple(layer._parameters))
    product = wide(dy)
    if parameter not in form.shifts:
        x = wide(x)
        z = _output(layer, form, x, parameter)
        product = product * (z - _output(layer, form, x, None) if form.offset else z)
    kept = range(1, 1 + len(form.shape)) if form.channel else range(dy.ndim - len(form.shape), dy.ndim)
    over = [d for d in range(1, dy.ndim) if d not in kept]
    found = product.sum(over) if over else product
    broadcast = [d for d, size in enumerate(form.shape, 1) if size == 1 != found.shape[d]]
    return found.sum(broadcast, keepdim=True) if broadcast else found


def rule_of(form: Form, names: tuple[str, ...]) -> Rule:
    """Make the rule for one form."""
    return Rule(
        KIND,
        names,
        functools.partial(elementwise_blocks, form),
        needs_input=tuple(name for name in names if name not in form.shifts),
        floats=lambda x, dy: 3 * dy.shape[1:].numel(),
        tokenwise=not form.channel and len(form.shape) == 1,  # else a dimension of it may be the positions
        mode=form.mode,
    )


def find_form(module: nn.Module) -> Form | None:
    """Find out whether a module scales and shifts entry by entry, example by example."""
    given = own_parameters(module)
    if given is None or len({p.shape for p in given.values()}) != 1:
        return None
    shape = tuple(next(iter(given.values())).shape)
    if not shape:
        return None
    inputs = [(False, (2, 3, *shape)), *((True, (2, *shape, *space)) for space in ((3,), (3, 2), (3, 2, 2)))]
    for channel, size in inputs:
        x = torch.randn(size, generator=torch.Generator().manual_seed(2))
        found = [_form_on(module, given, x, shape, channel, mode) for mode in (False, True)]
        if None not in found and found[0] == found[1]:
            return found[0]
        form = found[module.training]
        if form is not None:
            return form._replace(mode=module.training)
    return None


def _form_on(
    module: nn.Module, given: dict[str, Tensor], x: Tensor, shape: tuple[int, ...], channel: bool, mode: bool
) -> Form | None:
    """Check y = c(x) + Σ_p z_p(x) ⊙ p on one input, and that examples do not see each other."""
    run = functools.partial(run_in, mode)
    if len(shape) > 1 and not channel and run(module, given, x.narrow(2, 0, shape[0] - 1)) is not None:
        return None  # it takes a part of its parameter: a table of positions
    zeros = {name: torch.zeros(shape) for name in given}
    none = run(module, zeros, x)
    if none is None or none.shape != x.shape:
        return None
    slopes = {}
    for name in given:
        found = run(module, {**zeros, name: torch.ones(shape)}, x)
        if found is None or found.shape != x.shape:
            return None
        slopes[name] = found - none
    spread = (*shape, *[1] * (x.ndim - 1 - len(shape))) if channel else shape
    expected = none + sum(slopes[name] * p.reshape(spread) for name, p in given.items())
    alone = run(module, given, x[:1])
    if not close(run(module, given, x), expected) or alone is None or not close(alone, expected[:1]):
        return None
    shifts = frozenset(name for name, z in slopes.items() if bool((z == 1).all()))
    return Form(shape, channel, shifts, offset=bool(none.any()))


def _recognise(module: nn.Module) -> Rule | None:
    form = find_form(module)
    return (
        None
        if form is None
        else rule_of(form, tuple(n for n, p in module._parameters.items() if p is not None))
    )


ELEMENTWISE = register(
    rule_of(Form((1,), False, frozenset(("bias",)), False), ("weight", "bias")), _recognise
)
