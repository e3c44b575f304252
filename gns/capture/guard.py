"""Keeping what goes wrong with us out of the user's loop."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

_AS_IT_IS = contextlib.nullcontext()
# private; where a later torch has it no more, every call counts as one that is called again
_SAVED_TENSORS_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # type: ignore[reportAttributeAccessIssue]
_CHECKPOINTING = "torch.utils.checkpoint"


def in_backward() -> bool:
    """Whether a backward pass is under way on this thread; none is while a graph is compiled."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def recomputed() -> bool:
    """Whether checkpointing without reentrance will call what is called here again in backward, or does so.

    It keeps track of every tensor that is saved, by hooks, and raises where the two do not agree.
    """
    if _SAVED_TENSORS_HOOKS is None:
        return True
    hooks = _SAVED_TENSORS_HOOKS(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == _CHECKPOINTING


def plainly(device: str) -> contextlib.AbstractContextManager[Any]:
    """Keep graphs and autocast out of our arithmetic in backward; as a rule neither is on there."""
    if not (torch.is_grad_enabled() or torch.is_autocast_enabled(device)):
        return _AS_IT_IS
    if torch.compiler.is_compiling():  # a stack of contexts would break the graph
        return torch.autocast(device, enabled=False)
    off = contextlib.ExitStack()
    off.enter_context(torch.no_grad())
    off.enter_context(torch.autocast(device, enabled=False))
    return off


def guarded(method: Callable) -> Callable:
    """Keep every exception of ours out of the user's loop."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the method; None where it failed, or one did before."""
        if self.dead:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.fail(error)
            return None

    return run
