"""Find out what a module computes by running a stand-in of it on random numbers.

Names say little: every model family has its own norm class. So a module that no rule knows by its type is
asked what it does. Its own parameters are replaced by random ones in a shallow stand-in that shares its
settings and copies its buffers; no hook runs, and module and random state stay as they were.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

MOST = 2**24  # entries of a parameter above which nothing is tried: 64 MiB of random numbers
_RTOL = 1e-4  # norms compute in float32
_SEEDS = itertools.count()


def own_parameters(
    module: nn.Module, sizes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor] | None:
    """Random values for a module's own parameters, float32 on the CPU; None where probing makes no sense.

    That is where it has none, where modules inside it have parameters too, where they are large, or where
    the module's `forward` was replaced on the instance.

    Args:
        module: the module.
        sizes: parameter → a shape other than its own.
    """
    own = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    shapes = {name: (sizes or {}).get(name, shape) for name, shape in own.items()}
    inside = any(p is not None for m in module.modules() if m is not module for p in m._parameters.values())
    large = any(torch.Size(shape).numel() > MOST for shape in shapes.values())
    if not own or inside or large or "forward" in module.__dict__:
        return None
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def stand_in(module: nn.Module, parameters: Mapping[str, Tensor | None]) -> nn.Module:
    """Make a module of the same class and settings with other parameters, to call its `forward`."""
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = {name: parameters.get(name) for name in module._parameters}
    return twin


def run(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor | None:
    """Output of a stand-in on x, or None where it takes no such input or gives no tensor.

    The stand-in runs on the CPU with copies of the module's buffers: running statistics must not move.
    """
    twin = stand_in(module, parameters)
    twin.__dict__["_buffers"] = {k: _copied(b) for k, b in module._buffers.items()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            torch.default_generator.manual_seed(next(_SEEDS))  # a layer that draws numbers must differ
            found = twin.forward(x)
    except Exception:  # whatever it is, it is not what was asked for
        return None
    return found if isinstance(found, Tensor) else None


def _copied(buffer: Tensor | None) -> Tensor | None:
    """Copy a buffer to the CPU, in float32 where it has a fraction."""
    if buffer is None:
        return None
    return buffer.detach().to("cpu", torch.float32 if buffer.is_floating_point() else None, copy=True)


def close(found: Tensor | None, expected: Tensor) -> bool:
    """Whether a module's output is what was expected of it, up to float32 arithmetic."""
    if found is None or found.shape != expected.shape or not found.is_floating_point():
        return False
    worst = (found - expected).abs().max()
    return bool(worst <= _RTOL * expected.abs().max().clamp(min=1e-3))
