"""The self-check: contributions must sum to the gradient, Σᵢ cᵢ = ḡ, parameter by parameter.

It runs on the first measured step, a few early ones and every hundredth, in rounds that go on over the
following measured steps until every parameter had a non-zero gradient to be compared with (factor A has none
at initialisation) or had three tries. The extra memory of a step is bounded by `BUDGET_BYTES`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gns.capture.plan import Entry
from gns.capture.projections import project, whole
from gns.taps import Tap

ROUND = 100  # measured steps from one round to the next
EARLY = (3, 10, 30)  # measured steps that begin a round too: what is wrong shows early in a run
TRIES = 3  # usable steps that a parameter with a zero gradient is looked at in one round
SHOWN = 30  # steps in all, usable or not: fp16 may overflow for a while
BUDGET_BYTES = 128 * 2**20  # of check sums alive in one step

# Relative tolerance by dtype of the gradient, on ‖ḡ‖. float32: products of up to 10⁵ rows summed in two
# orders, possibly in TF32. 16-bit: each entry of the gradient is rounded
# once, and again with each micro-batch.
_RTOL = {torch.float64: 1e-6, torch.float32: 5e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Relative to √n·(Σ‖cᵢ‖²)^½, for gradients that are what is left of a cancellation.
_ATOL = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# Relative to the norm of the whole gradient: what is below it cancels over the tokens of each example, as at
# the bias of attention keys, whose gradient is zero but for rounding. It adds nothing to either sum.
_FLOOR = {torch.float64: 1e-14}


def tolerance(dtype: torch.dtype, norm: float, spread: float, whole: float = 0.0) -> float:
    """Largest ‖Σcᵢ − ḡ‖ that rounding explains.

    Args:
        dtype: the lowest precision on the way: of the activations or of the gradient.
        norm: ‖ḡ‖ of the parameter.
        spread: √n (Σ‖cᵢ‖²)^½, an upper bound of ‖Σcᵢ‖.
        whole: ‖ḡ‖ over all parameters.
    """
    relative = _RTOL.get(dtype, 5e-2) * norm + _ATOL.get(dtype, 2e-2) * spread
    return relative + _FLOOR.get(dtype, 1e-6) * whole


class SelfCheck:
    """Which parameters are compared in the current step.

    Args:
        entries: all measured parameters.
    """

    def __init__(self, entries: Sequence[Entry]):
        self._entries = entries
        self._todo: list[Entry] = []
        self._tries: dict[str, int] = {}
        self._shown: dict[str, int] = {}
        self._open: list[Entry] = []
        self.verified: set[str] = set()  # parameters whose Σcᵢ has once been equal to their gradient

    def begin(self, measured: int, *, everything: bool = False) -> None:
        """Open the sums of this step's share of the round.

        Args:
            measured: counts measured steps from 0.
            everything: open all parameters, whatever the round and the memory say.
        """
        if measured % ROUND == 0 or measured in EARLY or not self._tries:
            self._todo = list(self._entries)
            self._tries = {e.name: 0 for e in self._entries}
            self._shown = dict(self._tries)
        budget = BUDGET_BYTES
        self._open = []
        for entry in self._todo:
            size = 4 * entry.scalars
            if self._open and size > budget:
                break
            budget -= size
            self._open.append(entry)
        self._open = list(self._entries) if everything else self._open
        self._open = [e for e in self._open if e.parameter.numel() == e.scalars]  # else taken apart since
        for entry in self._open:
            p = entry.parameter
            dtype = torch.float64 if p.dtype is torch.float64 else torch.float32
            leaf = torch.zeros(p.shape, dtype=dtype, device=p.device, requires_grad=True)
            for tap, local in entry.sites:
                tap.open_check(local, leaf)

    def crossed(self) -> bool:
        """Whether a graph made before this step ran backward in it, whose Σcᵢ the check has missed."""
        return len(self._compared()) < len(self._open)

    def _compared(self) -> list[Entry]:
        """Give the open parameters whose Σcᵢ is whole."""
        return [e for e in self._open if not any(tap.crossed for tap, _ in e.sites)]

    def compare(self, gradients: Sequence[Tensor | None], seed: int | None = None) -> list[Tensor]:
        """Compare Σcᵢ and ḡ of each open parameter, but for those that an older graph has touched.

        Args:
            gradients: of all measured parameters; the parts that are on this rank.
            seed: of the projections that ranks exchange; None for one process.

        Returns:
            One tensor a parameter, on its device: ‖Σcᵢ − ḡ‖, or with a seed S Σcᵢ and S ḡ, [2, K].
        """
        rows = {e.name: i for i, e in enumerate(self._entries)}
        found = []
        for entry in self._compared():
            tap, name = entry.sites[0]
            total, gradient = tap.checks[name].grad, gradients[rows[entry.name]]
            zero = torch.zeros((), dtype=tap.checks[name].dtype, device=tap.checks[name].device)
            total = zero.expand(tap.checks[name].shape) if total is None else total.detach()
            here = zero if gradient is None else whole(gradient.detach(), entry.parameter)
            gradient = here.to(total).expand(total.shape)
            if seed is None:
                found.append(torch.linalg.vector_norm(total - gradient))
            else:
                found.append(project([total, gradient], seed + rows[entry.name]))
        return found

    def totals(self) -> list[Tensor | None]:
        """Σcᵢ of every parameter so far, None where no example reached it."""
        leaves = [e.sites[0][0].checks.get(e.sites[0][1]) for e in self._entries]
        return [None if leaf is None else leaf.grad for leaf in leaves]

    def follow(self, tap: Tap, device: torch.device) -> None:
        """Move the sums of a layer's parameters to where it computes; the model may have moved since."""
        if all(leaf.device == device for leaf in tap.checks.values()):
            return
        for entry in self._open:
            if all(site is not tap for site, _ in entry.sites):
                continue
            first, name = entry.sites[0]
            if (leaf := first.checks[name]).device != device:
                leaf = torch.zeros_like(leaf, device=device, requires_grad=True)
                for site, each in entry.sites:
                    site.checks[each] = leaf

    def open_names(self) -> tuple[str, ...]:
        """Name the parameters compared in this step."""
        return tuple(e.name for e in self._compared())

    def end(self) -> None:
        """Close the step's sums; what was shown too often leaves the round."""
        for entry in self._open:
            self._shown[entry.name] += 1
            for tap, _ in entry.sites:
                tap.close_checks()
        self._todo = [e for e in self._todo if self._shown[e.name] < SHOWN]
        self._open = []

    def conclude(self, checked: Collection[str], verified: Collection[str], *, usable: bool) -> None:
        """Take out of the round what was settled, or was looked at often enough without a gradient.

        Args:
            checked: parameters compared in a step.
            verified: those of them that had a non-zero gradient.
            usable: whether the step was.
        """
        self.verified.update(verified)
        for name in checked:
            self._tries[name] += usable
        self._todo = [e for e in self._todo if e.name not in verified and self._tries[e.name] < TRIES]
