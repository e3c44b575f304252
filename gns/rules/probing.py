"""Find out what a module computes by running a stand-in of it on random numbers.

Names say little: every model family has its own norm class. So a module that no rule knows by its type is
asked what it does. Its own parameters are replaced by random ones in a shallow stand-in that shares its
settings and copies its buffers; no hook runs, and module and random state stay as they were.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Generator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

MOST = 2**24  # entries of a parameter above which nothing is tried: 64 MiB of random numbers
_RTOL = 1e-4  # norms compute in float32
_SEEDS = itertools.count()  # a layer that draws numbers must differ from run to run


def own_parameters(
    module: nn.Module, sizes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor] | None:
    """Random values for a module's own parameters, float32 on the CPU; None where probing makes no sense.

    That is where it has none, where modules inside it have parameters or buffers too, where they are large,
    or where the module's `forward` was replaced on the instance.

    Args:
        module: the module.
        sizes: parameter → a shape other than its own.
    """
    own = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    shapes = {name: (sizes or {}).get(name, shape) for name, shape in own.items()}
    parts = [t for m in module.modules() if m is not module for t in (m._parameters, m._buffers)]
    inside = any(t is not None for part in parts for t in part.values())
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
    """Output of a stand-in on x, or None where it takes no such input or gives no tensor."""
    return run_in(module.training, module, parameters, x)


def run_in(mode: bool, module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor | None:
    """Output of a stand-in on x in a mode, training or not.

    The stand-in runs on the CPU with copies of the module's buffers: running statistics must not move.
    """
    twin = stand_in(module, parameters)
    twin.training = mode
    twin.__dict__["_buffers"] = {k: _copied(b) for k, b in module._buffers.items()}
    try:
        with torch.no_grad(), _forked(), torch.autocast("cpu", enabled=False):
            found = twin.forward(x)
    except Exception:  # whatever it is, it is not what was asked for
        return None
    return found if isinstance(found, Tensor) else None


@contextlib.contextmanager
def _forked() -> Generator[None, None, None]:
    """Draw other numbers each time, and leave the random states of torch's CPU, Python and numpy alone."""
    python, legacy = random.getstate(), np.random.get_state()
    seed = next(_SEEDS)
    with torch.random.fork_rng(devices=[]):
        try:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


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
