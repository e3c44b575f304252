"""Keeping what goes wrong with us out of the user's loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def in_backward() -> bool:
    """Whether a backward pass is under way on this thread."""
    return torch._C._current_graph_task_id() != -1


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
