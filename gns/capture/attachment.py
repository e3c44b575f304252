"""The hooks that bring the events of a model and of optimizers to a collector."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gns.capture.calls import Call
from gns.capture.guard import in_backward
from gns.capture.hooks import InputHook, OutputHook, RootInput, RootOutput

if TYPE_CHECKING:
    from gns.capture.collect import Collector


def hooks_of(collector: Collector) -> list[Any]:
    """Register the hooks on a collector's layers and model, and on all optimizers.

    Args:
        collector: hears of the events; the optimizers' hooks are global and hold it weakly, so that they keep
            no forgotten model alive.

    Returns:
        Their handles.
    """
    handles: list[Any] = []
    for tap in collector.taps:
        if tap.rule.autocast:
            pre = InputHook(collector, tap)
            handles.append(tap.module.register_forward_pre_hook(pre, with_kwargs=True))
        post = OutputHook(collector, tap)
        handles.append(tap.module.register_forward_hook(post, with_kwargs=True))
    model, me = collector.model, weakref.ref(collector)
    handles.append(model.register_forward_pre_hook(RootInput(collector), with_kwargs=True))
    # also where the call raises: one that stayed open would be taken for what layers are called in next
    end = RootOutput(collector)
    handles.append(model.register_forward_hook(end, with_kwargs=True, always_call=True))
    # a compiled `optimizer.step` would trace it
    event: Callable[..., None] = torch.compiler.disable(_forward_event)  # type: ignore[reportAssignmentType]
    handles.append(register_optimizer_step_pre_hook(functools.partial(event, me, "_on_pre")))
    handles.append(register_optimizer_step_post_hook(functools.partial(event, me, "_on_post")))
    return handles


def compiled_autograd() -> bool:
    """Whether compiled autograd is configured, which cannot trace what the taps do in backward."""
    config = sys.modules.get("torch._dynamo.config")
    return bool(getattr(config, "compiled_autograd", False))


def notify(collector: weakref.ref, call: Call, gradient: Tensor) -> None:
    """Tensor hook on an output of a call: changes nothing, and holds the collector weakly."""
    found = collector()
    if found is not None:
        found.backward_event(call)


def crossed(collector: weakref.ref, step: int, gradient: Tensor) -> None:
    """Tensor hook on an output of a call between measured steps: changes nothing, and holds weakly."""
    found = collector()
    if found is not None:
        found.crosses(step)


def reached(collector: weakref.ref, gradient: Tensor) -> None:
    """Tensor hook on the leaf of a tally: changes nothing, and holds the collector weakly."""
    found = collector()
    if found is not None:
        found.leaf_reached()


def _forward_event(collector: weakref.ref, method: str, *event: Any) -> None:
    """Hand an optimizer's event to the collector, or end the taps of one that stood down."""
    found = collector()
    if found is not None and found.dead:
        found.active = found.active and in_backward()
    elif found is not None:
        getattr(found, method)(*event)
