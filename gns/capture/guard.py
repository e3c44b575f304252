"""Keeping what goes wrong with us out of the user's loop."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

_AS_IT_IS = contextlib.nullcontext()


def in_backward() -> bool:
    """Whether a backward pass is under way on this thread."""
    return torch._C._current_graph_task_id() != -1


def plainly(device: str) -> contextlib.AbstractContextManager[Any]:
    """Keep graphs and autocast out of our arithmetic in backward; as a rule neither is on there."""
    if not (torch.is_grad_enabled() or torch.is_autocast_enabled(device)):
        return _AS_IT_IS
    off = contextlib.ExitStack()
    off.enter_context(torch.no_grad())
    off.enter_context(torch.autocast(device, enabled=False))
    return off


def guarded(method: Callable) -> Callable:
    """Keep every exception of ours out of the user's loop."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.dead:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.fail(error)
            return None

    return run
