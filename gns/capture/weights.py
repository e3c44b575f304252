"""The metric of the step under way: √D of each parameter, read before the step's gradients are there."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gns.capture.plan import Entry
from gns.metrics import Metric, of_gradients
from gns.reasons import COMPILED_METRIC, NO_STATE


class Weights:
    """Reads the metric once a step, at its first forward or backward pass, and gives it to the taps.

    Args:
        metric: in which norms are taken.
        entries: measured parameters.
    """

    def __init__(self, metric: Metric, entries: Sequence[Entry]):
        self.metric, self._entries = metric, entries
        self._owners: dict[int, weakref.ref[Any]] = {}  # optimizers of measured parameters, the last one last
        # parameters as optimizers know them: FSDP2 has others too
        self._owned: dict[str, weakref.ref[Tensor]] = {}
        self._steps = 0  # that they took
        self._read: int | None = None  # at how many steps of theirs the metric of this step was read
        self._roots: Mapping[str, Tensor] = {}
        self._missing: Mapping[str, str] = {}

    @property
    def weighs(self) -> bool:
        """Whether entries are weighed."""
        return self.metric.weighs

    @property
    def roots(self) -> Mapping[str, Tensor]:
        """R of each parameter, while a step is under way; empty where nothing is weighed."""
        return self._roots

    def owned_by(self, optimizer: Any) -> None:
        """Note an optimizer that steps measured parameters, and which tensors these are when it does."""
        if self.weighs:
            self._owners.pop(id(optimizer), None)  # of two that step a parameter, the later one has the say
            self._owners[id(optimizer)] = weakref.ref(optimizer)
            self._owned = {e.name: weakref.ref(e.parameter) for e in self._entries}

    def stepped(self) -> None:
        """Note that an optimizer stepped: what was read before it is out of date."""
        self._steps += 1

    def read(self) -> None:
        """Read the metric, unless it was since the last step; no gradient of the new step is there yet."""
        if self.metric.roots is None or self._read == self._steps:
            return
        self._read = self._steps
        owned = {name: p for name, known in self._owned.items() if (p := known()) is not None}
        owners = [optimizer for known in self._owners.values() if (optimizer := known()) is not None]
        self._roots, missing = self.metric.roots(owners, owned)
        self._missing = {
            e.name: missing.get(e.name, NO_STATE) for e in self._entries if e.name not in self._roots
        }
        for entry in self._entries:
            entry.weigh(self._roots.get(entry.name))

    def sq_norms(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """‖ḡ‖² of each parameter in the metric, 0 where there is none; empty where it weighs nothing."""
        if not self.weighs:
            return []
        roots = [self._roots.get(e.name) for e in self._entries]
        found = of_gradients(gradients, roots)
        return [
            e.sites[0][0].leaf.detach().new_zeros(()) if norm is None else norm
            for norm, e in zip(found, self._entries, strict=True)
        ]

    def missing(self, placed: set[int]) -> dict[str, str]:
        """Say which parameters have no metric in this step, and why.

        Args:
            placed: taps that were called outside compiled regions.
        """
        if not self.weighs:
            return {}
        if self._read is None:
            return {e.name: NO_STATE for e in self._entries}
        compiled = {
            e.name: COMPILED_METRIC
            for e in self._entries
            if any(id(tap) not in placed and tap.leaf.grad is not None for tap, _ in e.sites)
        }
        return {**self._missing, **compiled}

    def end(self) -> None:
        """Let go of the metric of the step that ends."""
        if self._read is not None:
            for entry in self._entries:
                entry.weigh(None)
        self._read, self._roots, self._missing = None, {}, {}
