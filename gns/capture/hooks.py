"""The hooks on layers and on the model: they pass outputs through taps, and tell of calls.

Copies and pickles of a model get inert ones: what is watched is this object, not what looks like it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gns.capture import sharing
from gns.capture.guard import recomputed
from gns.capture.passage import Echo, TapFunction
from gns.taps import Tap

if TYPE_CHECKING:
    from gns.capture.collect import Collector


class _Hook:
    """A hook that holds one tap or the root; copies and pickles of the model get an inert one."""

    def __init__(self, collector: Collector, tap: Tap | None = None):
        self.collector, self.tap = collector, tap

    def __deepcopy__(self, memo: dict) -> Callable[..., None]:
        return INERT

    def __copy__(self) -> Callable[..., None]:
        return INERT

    def __reduce__(self) -> tuple:
        return functools.partial, (INERT.func, *INERT.args)


# What a copied or unpickled hook becomes. It takes any arguments, returns None and is made of the standard
# library alone: a model that was saved whole while a monitor was attached loads without this package.
INERT = functools.partial(sys.audit, "gns.inert")


class InputHook(_Hook):
    """Cast a layer's input as autocast is about to, so that layer and tap share one saved tensor."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Give the cast arguments, or None to leave them."""
        if not self.collector.active:
            return None
        # a quick look, which the compiler would break its graph at
        if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
            return None
        if not torch.is_grad_enabled():
            return None
        if _seen_by_others(module):
            return None
        x, key = _layer_input(args, kwargs)
        if x is None or not _autocasts(x):
            return None
        cast = x.to(torch.get_autocast_dtype(x.device.type))
        return ((cast, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: cast})


class OutputHook(_Hook):
    """Pass a layer's output through the tap.

    Where checkpointing will call a layer again, or does so, each call saves what a tap saves, measured or
    not: between the two a step may close, an error of ours come up, or another call of the model fit better.
    """

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Tensor | None:
        """Give the tapped output, or None to leave it."""
        tap = self.tap
        assert tap is not None
        compiling = torch.compiler.is_compiling()
        if not torch.is_grad_enabled() or (not compiling and _transformed()):
            return None
        tapped = self._tapped(tap, module, args, kwargs, out, compiling)
        if tapped is None and not compiling and recomputed():
            return _echoed(tap, module, args, kwargs, out)
        return tapped

    def _tapped(
        self, tap: Tap, module: nn.Module, args: tuple, kwargs: dict, out: Any, compiling: bool
    ) -> Tensor | None:
        collector = self.collector
        if not collector.active:
            if compiling or collector.boundary.hears_forward:
                collector.forward_seen()
            return None
        if not isinstance(out, Tensor) or not out.requires_grad:
            return None
        x = tap.rule.capture(module, args, kwargs, out)
        if x is None:
            return None
        if compiling:
            tap.activation_dtype = (x if x.is_floating_point() else out).dtype
        where = None if compiling else collector.place(tap, x, out)
        live = tap.live()
        if not live or not tap.admits(x, where):
            return None
        carriers = () if compiling else tap.carriers(where)
        if tap.shares and not compiling and sharing.fits(tap, x, out, live, where):
            return sharing.passed(out, x, tap, live, where, carriers)
        if carriers:
            leaves = None, None, None, *carriers
        elif where is None:
            leaves = None, None if compiling else tap.weighed, tap.leaf
        else:
            leaves = where.each, tap.weighed, tap.leaf, *tap.sites(x, where)
        sums = (*tap.checks.values(), *tap.contracted.values())
        # outside any guard: checkpointing stops its recomputation by an exception out of this call
        tapped = TapFunction.apply if compiling else TapFunction.apply_outright
        return tapped(out, x, tap, live, where, *leaves, *sums)


def _echoed(tap: Tap, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Tensor | None:
    """Give an output that saves what a tapped one saves, and measures nothing."""
    if not isinstance(out, Tensor):
        return None
    x = tap.rule.capture(module, args, kwargs, out)
    if x is None or not out.requires_grad:
        return None
    if tap.rule.autocast and _autocasts(x) and not _seen_by_others(module):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # as the input hook did
    return Echo.apply(out, None if tap.needing.isdisjoint(tap.live()) else x)


class RootInput(_Hook):
    """Tell the collector that a call of the model begins."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Look at the arguments; change nothing."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.collector.call_begins(args, kwargs)


class RootOutput(_Hook):
    """Tell the collector that a call of the model ended, and with which outputs."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        """Look at the outputs; change nothing."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.collector.call_ends(out)


def _layer_input(args: tuple, kwargs: dict) -> tuple[Tensor | None, str | None]:
    """Find the activation among a layer's arguments: the first one, or the only keyword."""
    if args and isinstance(args[0], Tensor):
        return args[0], None
    found = [(v, k) for k, v in kwargs.items() if isinstance(v, Tensor)]
    return found[0] if len(found) == 1 and not args else (None, None)


def _transformed() -> bool:
    """Whether a function transform or a trace is under way, which no tap may enter."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[reportAttributeAccessIssue]
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _seen_by_others(module: nn.Module) -> bool:
    """Whether another hook would see an input that we cast."""
    return len(module._forward_hooks) > 1 or len(module._forward_pre_hooks) > 1


def _autocasts(x: Tensor) -> bool:
    """Whether autocast is about to cast this input."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype is torch.float64:
        return False
    return x.dtype != torch.get_autocast_dtype(kind)


def hooked(model: nn.Module) -> bool:
    """Whether a live hook of a monitor is on any module of the model."""
    return any(is_ours(h) for m in model.modules() for h in m._forward_hooks.values())


def is_ours(hook: Any) -> bool:
    """Whether a hook is a live one of a monitor."""
    return isinstance(hook, _Hook)


def hooks_of(model: nn.Module) -> list[dict[int, Any]]:
    """Give the dictionaries of a model's forward hooks and pre-hooks that hold a live one of a monitor."""
    every = (hooks for m in model.modules() for hooks in (m._forward_pre_hooks, m._forward_hooks))
    return [hooks for hooks in every if any(is_ours(h) for h in hooks.values())]
