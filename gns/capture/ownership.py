"""Whose optimizers step: one that owns what is measured, another model's, or an engine that hides both."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gns.capture.gradients import Stamp
from gns.capture.plan import Entry
from gns.reasons import HIDDEN_LARGE, NOT_OURS

LOCAL_BYTES = 2 * 2**30  # of Σcᵢ kept alive where `.grad` is hidden
FOREIGN = 5  # steps of such optimizers before something is said; a critic's may come in between

Gradients = Sequence[Tensor | None]


class Ownership:
    """Tells an engine that hides optimizer and gradients from another model that trains beside this one.

    Args:
        entries: measured parameters.
    """

    def __init__(self, entries: Sequence[Entry]):
        self._entries = entries
        self._ours = False  # an optimizer that owns some of them has stepped
        self._foreign = 0  # backward passes in a row that others stepped on
        self._passed = False  # a backward pass has ended since the last of these
        self.hidden = False  # the engine hides `.grad`: each rank's own batch stands for a step

    def owner_steps(self) -> None:
        """Note that an optimizer steps that owns measured parameters."""
        self._ours, self._foreign = True, 0

    def engine_steps(self) -> None:
        """Note that the engine's optimizer steps, where it hides both."""
        self._foreign = 0

    def backward_ended(self) -> None:
        """Note that a backward pass of ours ended."""
        self._passed = True

    def foreign_steps(self, gradients: Gradients, *, pending: bool) -> str | None:
        """Count a step of an optimizer that owns none of the parameters; after a few, do without `.grad`.

        It counts at most once for each backward pass of ours: other models may train beside this one.

        Args:
            gradients: of the measured parameters.
            pending: gradients of ours wait for a step.

        Returns:
            What the user should know, or None.
        """
        if not self._passed:
            return None
        self._passed = False
        self._foreign += pending
        if self._foreign != FOREIGN:
            return None
        if self._ours or any(g is not None for g in gradients):
            return NOT_OURS
        size = 4 * sum(e.scalars for e in self._entries)
        if size > LOCAL_BYTES:
            return HIDDEN_LARGE.format(size=size)
        if any(e.parameter.numel() != e.scalars for e in self._entries):
            return NOT_OURS
        self.hidden, self._foreign = True, 0
        return None

    def step_begins(self) -> None:
        """Go back to `.grad` where an optimizer that owns parameters has stepped after all."""
        self.hidden = self.hidden and not self._ours


class LastClose:
    """What the step before this one closed on."""

    def __init__(self) -> None:
        self._stamp: Stamp | None = None  # of its gradients
        self._optimizer: int | None = None  # id of the one that closed it

    def by(self, optimizer: object) -> None:
        """Note which optimizer closed a step."""
        self._optimizer = id(optimizer)

    def left(self, gradients: Gradients) -> None:
        """Note the gradients that were there when it closed."""
        self._stamp = Stamp(gradients)

    def closed_by(self, optimizer: object) -> bool:
        """Whether it was this optimizer, or none that is known."""
        return self._optimizer in (None, id(optimizer))

    def new(self, gradients: Gradients) -> bool:
        """Whether gradients are there that it did not close on.

        A wrapped optimizer steps with the gradient that its wrapper closed the step on.
        """
        if self._stamp is not None and self._stamp.untouched(gradients):
            return False
        return any(g is not None for g in gradients)
