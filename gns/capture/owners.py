"""Optimizers: whether one owns measured parameters, its learning rate, and what trains that was not there."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from gns.capture.plan import Entry, trainable


class Owners:
    """Looks at the optimizers that step.

    Args:
        model: the module in training.
        entries: its measured parameters.
        known: names of all parameters that trained at attach.
    """

    def __init__(self, model: nn.Module, entries: Sequence[Entry], known: Collection[str]):
        self._model, self._entries, self._known = model, entries, set(known)
        self._looked_at: set[int] = set()  # parameters of optimizers, each looked up once

    def owns(self, optimizer: Any) -> bool:
        """Whether an optimizer owns a measured parameter."""
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(id(e.parameter) in theirs for e in self._entries)  # as a rule the first one is

    def late(self, optimizer: Any) -> list[str]:
        """Name, once each, the parameters that began to train after attach."""
        stepped = (p for group in optimizer.param_groups for p in group["params"])
        new = {id(p) for p in stepped if p.grad is not None and id(p) not in self._looked_at}
        self._looked_at |= new
        late = sorted(trainable(self._model).keys() - self._known) if new else []
        self._known.update(late)
        return late


def learning_rate(optimizer: Any) -> float | None:
    """Largest learning rate over an optimizer's groups; None if it lies on a device."""
    rates = [g.get("lr") for g in optimizer.param_groups]
    known = [float(r) for r in rates if r is not None and not (isinstance(r, Tensor) and r.is_cuda)]
    return max(known, default=None)
