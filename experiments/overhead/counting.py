"""What a step does that no clock is needed for: operations, bytes saved for backward, calls of our hooks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.overhead.arms import Arm, Monitored
from gns.capture import hooks

HOOKS = (hooks.InputHook, hooks.OutputHook, hooks.RootInput, hooks.RootOutput)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(arm: Arm, ids: torch.Tensor) -> Counter[str]:
    """Operations of one optimizer step by name, views and copies included."""
    with _Operations() as found:
        arm.step(ids)
    return found.seen


def saved(arm: Arm, ids: torch.Tensor) -> tuple[int, int]:
    """Tensors that one pass keeps for backward, and the bytes of their storages, each counted once.

    Parameters are left out: they are there anyway. The gradients are thrown away.
    """
    known = {p.untyped_storage().data_ptr() for p in arm.model.parameters()}
    kept: list[torch.Tensor] = []  # alive, so that no storage's address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        arm.backward(ids)
    arm.optimizer.zero_grad()
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return len(kept), sum(size for at, size in found.items() if at not in known)


@contextmanager
def counted_hooks() -> Generator[Counter[str]]:
    """Count the calls of our hooks, by kind."""
    seen: Counter[str] = Counter()
    own = {kind: kind.__call__ for kind in HOOKS}

    def counted(kind: type, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(hook: Any, *args: Any) -> Any:
            seen[kind.__name__] += 1
            return call(hook, *args)

        return run

    try:
        for kind, call in own.items():
            kind.__call__ = counted(kind, call)
        yield seen
    finally:
        for kind, call in own.items():
            kind.__call__ = call


def cost_of_hooks(arm: Monitored, repeats: int = 2_000) -> dict[str, float]:
    """Seconds of the processor that one call of each of our layers' hooks takes, as they are now.

    On a step that is not measured they change nothing, so that they may be called by hand.
    """
    found = {}
    given = ((m, h) for m in arm.model.modules() for h in m._forward_pre_hooks.values())
    layer = next(module for module, hook in given if isinstance(hook, hooks.InputHook))
    x = torch.zeros(1, 1, requires_grad=True)
    for hook, given in (
        (next(iter(layer._forward_pre_hooks.values())), (layer, (x,), {})),
        (next(iter(layer._forward_hooks.values())), (layer, (x,), {}, x)),
    ):
        found[type(hook).__name__] = min(_timed(hook, given, repeats) for _ in range(5)) / repeats
    return found


def _timed(hook: Callable[..., Any], given: tuple, repeats: int) -> float:
    start = time.thread_time()
    for _ in range(repeats):
        hook(*given)
    return time.thread_time() - start


def idle(plain: Arm, between: Monitored, ids: torch.Tensor) -> dict[str, Any]:
    """Compare a step between two measured ones with the untouched step, by counting.

    Args:
        plain: the untouched loop, warm.
        between: the monitored one, attached and not measuring, warm.
        ids: a batch.
    """
    extra = operations(between, ids)
    extra.subtract(operations(plain, ids))
    with counted_hooks() as calls:
        between.step(ids)
    before, after = saved(plain, ids), saved(between, ids)
    start = time.thread_time()
    plain.step(ids)
    spent = time.thread_time() - start
    seconds = cost_of_hooks(between)
    between.step(ids)  # what was called by hand belongs to a step that ends here
    return {
        "extra_operations": {name: more for name, more in extra.items() if more},
        "extra_saved": [b - a for a, b in zip(before, after, strict=True)],
        "hook_calls": dict(calls),
        "hook_seconds": seconds,
        "untouched_thread_s": spent,
    }
