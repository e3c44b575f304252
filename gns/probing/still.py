"""Holding a model still: whatever is run inside, everything is bit by bit as it was afterwards.

Weights are not copied: nothing here writes to them. `.grad`, buffers, training modes and the states of all
random generators are put back, also after an exception or Ctrl-C.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gns.probing.randomness import RandomState

MAX_BUFFER = 64 * 2**20  # bytes of a buffer that is copied; a larger one (packed weights) is only watched

_MIXES = nn.modules.batchnorm._BatchNorm


class StillError(RuntimeError):
    """A model could not be put back as it was."""


def _checkpointing(module: nn.Module) -> bool:
    """Whether a module checkpoints its activations in training mode and has no dropout of its own."""
    own = vars(module)
    drops = any("drop" in name and isinstance(p, float) and p > 0 for name, p in own.items())
    return bool(own.get("gradient_checkpointing")) and not drops


def set_modes(model: nn.Module, *, dropout: bool) -> None:
    """Set every module's training mode for a measurement at frozen weights.

    Without dropout all modules are in evaluation mode, except those that would stop checkpointing their
    activations by it. With dropout all are in training mode, except batch norms, whose examples would mix.
    The attribute is set, not `eval()` called: some adapters merge their weights there.

    Args:
        model: whose modules.
        dropout: whether dropout is on.
    """
    for module in model.modules():
        module.training = not isinstance(module, _MIXES) if dropout else _checkpointing(module)


def gradient_hook(model: nn.Module) -> str | None:
    """Say which trainable parameter has a hook that would act on gradients measured here; None: none has."""
    for name, p in model.named_parameters():
        if p.requires_grad and getattr(p, "_post_accumulate_grad_hooks", None):
            return (
                f"`{name}` has a hook that runs when its gradient is complete (an optimizer inside backward?)"
                " and would act on the gradients measured here; remove it first"
            )
    return None


class _Kept:
    """What of a model a measurement may change, as it was."""

    def __init__(self, model: nn.Module):
        self.modes = [(m, m.training) for m in model.modules()]
        self.grads = [(p, p.grad) for p in model.parameters()]
        self.random = RandomState.now()
        self.buffers = [
            (m, name, b, _copy(b), _version(b)) for m in model.modules() for name, b in m._buffers.items()
        ]

    def restore(self) -> None:
        """Put everything back.

        Raises:
            StillError: a buffer too large to be copied was written to.
        """
        for module, mode in self.modes:
            module.training = mode
        for p, grad in self.grads:
            p.grad = grad
        self.random.restore()
        lost = []
        with torch.no_grad():
            for module, name, buffer, copy, version in self.buffers:
                module._buffers[name] = buffer
                if copy is None and _version(buffer) != version:
                    lost.append(name)
                elif copy is not None and buffer is not None and not _same_bits(buffer, copy):
                    buffer.copy_(copy)
        if lost:
            raise StillError(
                f"buffer {lost[0]!r} (and {len(lost) - 1} more) of over {MAX_BUFFER:,} bytes was written to "
                "by the model's forward pass and cannot be put back; load the model anew"
            )


def _copy(buffer: Tensor | None) -> Tensor | None:
    """Copy a buffer that has data and is not too large."""
    if buffer is None or buffer.is_meta or buffer.nbytes > MAX_BUFFER:
        return None
    return buffer.detach().clone()


def _version(buffer: Tensor | None) -> int | None:
    """Count the writes to a buffer, where torch counts them."""
    return None if buffer is None or buffer.is_inference() else buffer._version


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits: −0 is not 0, and a NaN is equal to itself."""
    if a.layout is not torch.strided or a.is_quantized:
        return torch.equal(a, b)
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))


@contextmanager
def uninterrupted() -> Generator[None]:
    """Put Ctrl-C off until the end, so that what belongs together is done together."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    heard: list[tuple[int, Any]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append((number, frame)))
    if before is None:  # not ours to put back: it was not installed from Python
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard and callable(before):
            before(*heard[0])


@contextmanager
def still(model: nn.Module, *, dropout: bool) -> Generator[None]:
    """Measure inside: gradients begin at None, modes are those of `set_modes`; all is put back at the end.

    Args:
        model: to be held still.
        dropout: whether dropout is on inside.
    """
    kept = _Kept(model)
    try:
        for p in model.parameters():
            p.grad = None
        set_modes(model, dropout=dropout)
        with torch.enable_grad():
            yield
    finally:
        with uninterrupted():
            kept.restore()
