"""Where an optimizer step begins and ends: a small state machine over events, with no torch in it.

Events, in the orders that real loops produce (tests/gns/test_boundary.py has the table): a forward pass, a
backward pass that begins and ends, and an optimizer's step hooks PRE and POST. A step closes at PRE, or at
POST where a closure was passed, and only if a backward pass ended since the last close.
"""

from __future__ import annotations

from dataclasses import dataclass, field

IN_BACKWARD = "the optimizer steps inside backward: the gradient is used up before it is complete"


@dataclass(frozen=True)
class Close:
    """A step ends here; `reason` says why it is not usable, if it is not."""

    reason: str | None = None


@dataclass
class Boundary:
    """Follow one training loop. Each event method returns what is to be done.

    Args:
        measuring: whether backward passes of this step reach the taps; off, a forward pass stands in.
    """

    measuring: bool = True
    pending: bool = False  # a backward pass ended since the last close
    restarts: int = 0  # passes discarded since the last close or the last PRE with a closure
    consumed: bool = False  # an optimizer stepped inside the backward pass under way
    stale: bool = False  # a pass ended before the PRE with a closure; the closure may discard it
    _closures: list[int] = field(default_factory=list)  # optimizers whose POST will close the step

    @property
    def hears_forward(self) -> bool:
        """Whether a training forward pass says anything new."""
        return not self.measuring and (self.consumed or not self.pending)

    def forward(self) -> Close | None:
        """Note a training forward pass; between measured steps it stands for its backward.

        Returns:
            A close, if an optimizer stepped inside the backward pass before it and nothing else said so.
        """
        if self.measuring:
            return None
        closed = self._close(IN_BACKWARD) if self.consumed else None
        self.pending = True
        return closed

    def backward_begins(self, grads_empty: bool) -> bool:
        """Note the start of a backward pass.

        Args:
            grads_empty: every covered gradient is None or zero.

        Returns:
            True if what was summed so far was discarded by the loop and must be dropped.
        """
        if self.pending and grads_empty:
            self.pending = False
            self.restarts += not self.stale
            self.stale = False
            return True
        return False

    def backward_ends(self) -> Close | None:
        """Note that a backward pass ended, gradients reduced; closes if an optimizer stepped inside it."""
        self.pending = True
        if self.consumed:
            return self._close(IN_BACKWARD)
        return None

    def optimizer_pre(self, optimizer: int, *, closure: bool, in_backward: bool) -> Close | None:
        """Note the PRE hook of an optimizer that owns covered parameters.

        Args:
            optimizer: its identity.
            closure: whether its step was given one.
            in_backward: whether a backward pass is under way.
        """
        if in_backward:
            self.consumed = True
            return None
        if closure:
            self._closures.append(optimizer)
            self.restarts, self.stale = 0, self.pending
            return None
        return self._close() if self.pending else None

    def awaits(self, optimizer: int) -> bool:
        """Whether the POST hook of an optimizer would close the step: it was passed a closure."""
        return optimizer in self._closures

    def optimizer_post(self, optimizer: int, *, in_backward: bool = False) -> Close | None:
        """Note the POST hook of an optimizer that owns covered parameters."""
        if in_backward or optimizer not in self._closures:
            return None
        self._closures.remove(optimizer)
        if not self.pending:
            return None
        if self.restarts:
            passes = self.restarts + 1
            return self._close(
                f"the closure took {passes} gradients for one step (as LBFGS does): none is the step's own"
            )
        return self._close()

    def close(self) -> Close | None:
        """End the step by hand, if a backward pass ended since the last close."""
        return self._close() if self.pending else None

    def _close(self, reason: str | None = None) -> Close:
        self.pending = self.consumed = self.stale = False
        self.restarts = 0
        return Close(reason)
