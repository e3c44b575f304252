"""Adds up what the layers of one call hand in, once for all of them.

A tap that summed its own norms and added them to those of the other layers would launch four small kernels
more for every layer. Instead each call of the model makes *carriers*, one a tap and parameter: a tap returns
its ‖cᵢ‖², [n], as a carrier's gradient. When a backward pass has been through all taps that it reaches,
autograd hands the tally all of them at once. It returns their sums over the examples as the gradient of one
persistent leaf, which adds up over micro-batches, and their sum over the layers as that of the call's own.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gns.capture.guard import plainly

if TYPE_CHECKING:
    from gns.capture.plan import Entry
    from gns.taps import Tap

Kind = tuple[torch.device, torch.dtype]


class Tally:
    """The squared norms of the layers on one device, in one dtype.

    Args:
        places: a tap and the name of its parameter, a column each; a tap's follow one another.
        kind: device and dtype of the sums.
    """

    def __init__(self, places: Sequence[tuple[Tap, str]], kind: Kind):
        self.places, self.kind = tuple(places), kind
        self.leaf = torch.zeros(2, len(self.places), device=kind[0], dtype=kind[1], requires_grad=True)
        self._rows: tuple[Any, Tensor] | None = None  # rows seen by column, of the last call like this one

    def read(self) -> Tensor:
        """Give what was collected: [2, C], sums of squared norms and rows seen."""
        found = self.leaf.grad
        return torch.zeros_like(self.leaf).detach() if found is None else found.detach()

    def added(self, found: Sequence[Tensor | None], n: int) -> tuple[Tensor, Tensor]:
        """Give the gradients of the persistent leaf, [2, C], and of the call's, [n]."""
        zero = next(norms for norms in found if norms is not None).new_zeros(n)
        each = torch.stack([zero if norms is None else norms for norms in found])
        sums = torch.stack([each.sum(1), self._seen(tuple(norms is not None for norms in found), n)])
        counted = [i for i, (tap, p) in enumerate(self.places) if p not in tap.left_out]
        if len(counted) < len(self.places):  # not by an index: the host's would be waited for
            each = torch.stack([zero, *(each[i] for i in counted)])
        return sums, each.sum(0)

    def _seen(self, there: tuple[bool, ...], n: int) -> Tensor:
        """Rows seen by each column, [C]; made once as long as it stays the same."""
        if self._rows is None or self._rows[0] != (there, n):
            rows = self.leaf.detach().new_full((len(there),), n)
            if not all(there):
                rows = torch.stack([rows[0] if yes else torch.zeros_like(rows[0]) for yes in there])
            self._rows = (there, n), rows
        return self._rows[1]


class Carriers:
    """What the taps return the norms of one call's examples to.

    Args:
        n: examples of the call.
    """

    def __init__(self, n: int):
        self.n = n
        self._each: dict[Kind, Tensor] = {}
        self._made: dict[int, tuple[Tally, tuple[Tensor, ...]]] = {}

    def each(self, kind: Kind) -> Tensor:
        """Give the leaf, [n], whose gradient collects the examples' ‖cᵢ‖² over the layers of a kind.

        Unlike the leaves of tallies and taps it lives as long as the call: sums add over calls, these do not.
        """
        leaf = self._each.get(kind)
        if leaf is None:
            leaf = self._each[kind] = torch.zeros(self.n, device=kind[0], dtype=kind[1], requires_grad=True)
        return leaf

    def of(self, tap: Tap) -> tuple[Tensor, ...]:
        """Give the carriers of a tap's parameters; none where no tally counts it."""
        tally = tap.tally
        if tally is None:
            return ()
        made = self._made.get(id(tally))
        if made is None:
            new = _AddedUp.apply(tally.leaf, self.each(tally.kind), tally, self.n)
            made = self._made[id(tally)] = tally, new
        return made[1][tap.column : tap.column + len(tap.parameters)]

    def sq_norms(self) -> list[Tensor]:
        """‖cᵢ‖² of the call's examples, [n] a kind, as far as layers have returned them."""
        return [leaf.grad.detach() for leaf in self._each.values() if leaf.grad is not None]


class _AddedUp(torch.autograd.Function):
    """Makes the carriers, [n] each; their gradients' sums become the leaves'."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, each: Tensor, tally: Tally, n: int) -> tuple[Tensor, ...]:
        """Give a carrier, [n], for each parameter."""
        ctx.tally, ctx.n = weakref.ref(tally), n  # it leads to the call that holds the carriers
        ctx.set_materialize_grads(False)
        return tuple(leaf.new_empty(n) for _ in tally.places)  # nobody reads them

    @staticmethod
    def backward(ctx: Any, *norms: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Give the norms that the layers returned, added up, to the leaves."""
        tally: Tally | None = ctx.tally()
        if tally is None or all(found is None for found in norms):
            return None, None, None, None
        try:
            with plainly(tally.kind[0].type):
                return *tally.added(norms, ctx.n), None, None
        except Exception as error:  # nothing of ours may reach the user's backward
            tally.places[0][0].failed(error)
            return None, None, None, None


class Tallies:
    """All tallies of a model, and which of their columns are whose.

    Args:
        taps: that they count; each is told its place.
        entries: the measured parameters.
    """

    def __init__(self, taps: Sequence[Tap], entries: Sequence[Entry]):
        self.taps = taps
        places: dict[Kind, list[tuple[Tap, str]]] = defaultdict(list)
        for tap in taps:
            there = places[tap.leaf.device, tap.leaf.dtype]
            tap.column = len(there)
            there += [(tap, p) for p in tap.parameters]
        made = {kind: Tally(there, kind) for kind, there in places.items()}
        for tap in taps:
            tap.tally = made[tap.leaf.device, tap.leaf.dtype]
        self.members = tuple(made.values())
        order = [tap for tally in self.members for tap, p in tally.places if p == tap.parameters[0]]
        self._starts = np.cumsum([0] + [len(tap.parameters) for tap in order[:-1]])
        self._number = {id(tap): i for i, tap in enumerate(order)}
        sites = [[self._number[id(tap)] for tap, _ in entry.sites] for entry in entries]
        self._sites = np.concatenate([*map(np.array, sites), np.zeros(0, int)]).astype(int)
        self._first = np.cumsum([0] + [len(each) for each in sites[:-1]])
        self._columns = np.array([self._column(*entry.sites[0]) for entry in entries], dtype=int)

    def _column(self, tap: Tap, parameter: str) -> int:
        return int(self._starts[self._number[id(tap)]]) + tap.parameters.index(parameter)

    def drop(self) -> None:
        """Forget what was collected."""
        for tally in self.members:
            tally.leaf.grad = None

    def by_entry(
        self, counted: Sequence[np.ndarray], own: Iterable[tuple[Tap, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Join what was read, on the host.

        Args:
            counted: [2, C] of each tally, sums of squared norms and rows seen.
            own: taps that have sums of their own, with them, [P + 1], the last the rows.

        Returns:
            Of each measured parameter the sum of squared norms and the rows seen, float64.
        """
        sums, rows = np.concatenate(list(counted), axis=1).astype(np.float64)
        rows = np.maximum.reduceat(rows, self._starts)  # [taps]
        for tap, values in own:
            number = self._number[id(tap)]
            start = self._starts[number]
            sums[start : start + len(tap.parameters)] += values[:-1]
            rows[number] += values[-1]
        return sums[self._columns], np.maximum.reduceat(rows[self._sites], self._first)
