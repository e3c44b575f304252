"""How the rows of an activation map onto examples: one to one, folded, shared by all, or in segments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gns.capture.tally import Carriers
from gns.reasons import PACKED, SHARED
from gns.rules import Rule

_Nothing = TypeVar("_Nothing")


class Segments:
    """Examples that are not rows: several in one row (packing), or several rows each (preference pairs).

    Args:
        ids: [R] or [R, T], which example each row or each position belongs to; below 0: none. Any integers;
            equal ones are one example.
        device: where the activations are.
    """

    def __init__(self, ids: np.ndarray, device: torch.device):
        self.by_position = ids.ndim == 2
        labels, where = np.unique(ids, return_inverse=True)
        where = where.reshape(-1) - int((labels < 0).sum())
        self.n = int((labels >= 0).sum())
        members = np.flatnonzero(where >= 0)
        members = members[np.argsort(where[members], kind="stable")]
        self.lengths = np.bincount(where[members], minlength=self.n)
        starts = np.cumsum(self.lengths) - self.lengths
        self.groups: list[tuple[Tensor, Tensor, Tensor]] = []
        for examples in _of_similar_length(self.lengths):
            longest = int(self.lengths[examples].max())
            position = np.arange(longest)
            there = position < self.lengths[examples][:, None]
            index = members[np.where(there, starts[examples][:, None] + position, 0)]
            found = (torch.from_numpy(a).to(device) for a in (examples, index, there))
            self.groups.append((next(found), next(found), next(found)))
        self.example_of = torch.from_numpy(where).to(device)  # [R] or [R·T], below 0: none

    def per_example(self, values: Tensor) -> Tensor:
        """Add up values [R] or [R, T] example by example, [n]."""
        flat, to = values.reshape(-1), self.example_of
        kept = torch.where(to >= 0, flat, torch.zeros_like(flat))
        return flat.new_zeros(self.n).index_add_(0, to.clamp(min=0), kept)

    def parts(self, x: Tensor, dy: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield groups of examples of similar length.

        That is x [E, L, ...], dy [E, L, ...] and the examples' numbers [E].
        Places beyond an example's length hold some x and a dy of zero, and so add nothing.
        """
        lead = 2 if self.by_position else 1
        x, dy = (t.flatten(0, 1) if lead == 2 else t for t in (x, dy))
        for examples, index, there in self.groups:
            mask = there.reshape(*there.shape, *[1] * (dy.ndim - 1))
            yield x[index], torch.where(mask, dy[index], dy.new_zeros(())), examples


def _of_similar_length(lengths: np.ndarray) -> list[np.ndarray]:
    """Group examples so that the longest of a group is at most twice the shortest."""
    if not len(lengths):
        return []
    octave = np.frexp(np.maximum(lengths, 1).astype(float) - 0.5)[1]
    return [np.flatnonzero(octave == o) for o in np.unique(octave)]


@dataclass(frozen=True)
class Placement:
    """What a tap needs to know of the call it fires in; it travels with the tap's own forward pass.

    Args:
        n: examples of the call.
        segments: where examples are not rows.
        along: dimension of the positions, where examples are not rows (after the heads, in some attention).
        fold: (R, T), where the activation is [R·T, ...].
        shared_by: rows that share an activation whose batch dimension is 1, as position ids have it; else 0.
        misfit: why the rows are no examples, if they are not.
        ambiguous: it is not known which call this is.
        carriers: of that call, which collect its examples' ‖cᵢ‖²; None where it is not known.
        each: leaf of that call, [n], whose gradient collects ‖cᵢ‖² over all layers; None where there is none.
        contraction: [K, n], weights of the sums that the tap's `contracted` leaves collect; None where none.
    """

    n: int
    segments: Segments | None = None
    along: int = 1
    fold: tuple[int, int] | None = None
    shared_by: int = 0
    misfit: str | None = None
    ambiguous: bool = False
    each: Tensor | None = None
    contraction: Tensor | None = None
    carriers: Carriers | None = None

    @property
    def plain(self) -> bool:
        """Whether row b is example b, whatever else there is to know."""
        return self.segments is None and self.fold is None and self.along == 1

    def parts(self, rule: Rule, x: Tensor, dy: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield x and dy [E, ...] with one row an example, and the examples' numbers (None: in order).

        A rule that does not add over positions gets the rows of an example one after the other, and the same
        example's number several times.
        """
        if self.fold is not None:
            x, dy = x.unflatten(0, self.fold), dy.unflatten(0, self.fold)
        elif self.along != 1:
            x, dy = x.movedim(self.along, 1), dy.movedim(self.along, 1)
        if self.segments is None:
            yield x, dy, None
            return
        for a, b, examples in self.segments.parts(x, dy):
            if rule.tokenwise and not self.segments.by_position and a.ndim > 2 + (not rule.ids):
                yield a.flatten(1, 2), b.flatten(1, 2), examples
            elif rule.tokenwise:
                yield a, b, examples
            else:
                yield a.flatten(0, 1), b.flatten(0, 1), examples.repeat_interleave(a.shape[1])

    def per_example(self, parts: Iterable[tuple[Tensor, Tensor | None]], none: _Nothing) -> Tensor | _Nothing:
        """Put values of the examples that `parts` yields in the order of the examples, [n, ...].

        Args:
            parts: values [E, ...] with the examples' numbers, or None where they are all and in order.
            none: what to give where no row is an example.
        """
        total = None
        for values, examples in parts:
            if examples is None:
                return values
            total = values.new_zeros(self.n, *values.shape[1:]) if total is None else total
            total.index_add_(0, examples, values)
        return none if total is None else total


@dataclass(frozen=True)
class Shape:
    """Leading dimensions of a call of the model: R rows and, for token models, T positions."""

    rows: int
    positions: int | None = None


def place(
    rule: Rule,
    x: Tensor,
    shape: Shape,
    n: int,
    segments: Segments | None,
    *,
    shareable: bool = False,
    each: Tensor | None = None,
) -> Placement:
    """Decide how the rows of an activation map onto the examples of a call.

    Args:
        rule: of the layer.
        x: what the rule captured.
        shape: of the call.
        n: examples of the call.
        segments: where examples are not rows.
        shareable: ids [1, T] may be given one row an example; the model is known to only add the result.
        each: leaf of the call for the examples' squared norms.
    """
    lead = tuple(x.shape) if rule.ids else tuple(x.shape[:-1])
    rows, positions = shape.rows, shape.positions
    by_position = segments is not None and segments.by_position
    if not lead:
        return Placement(n, misfit=f"its input has shape {tuple(x.shape)}, without a batch dimension")
    if lead == (rows,) == (positions,) and rule.ids:
        return Placement(n, misfit=f"its input has shape {lead}: one id an example, or one a position?")
    if lead[0] == rows:
        if not by_position:
            return Placement(n, segments, each=each)
        along = [d for d in range(1, len(lead)) if lead[d] == positions] if rule.tokenwise else []
        if len(along) != 1:
            return Placement(n, misfit=PACKED.format(shape=tuple(x.shape)))
        return Placement(n, segments, along=along[0], each=each)
    if rule.ids and lead in ((1, positions), (positions,)):
        if shareable and len(lead) == 2:
            return Placement(n, segments, shared_by=rows, each=each)
        return Placement(n, misfit=SHARED.format(shape=lead, rows=rows, positions=positions))
    if rule.tokenwise and positions is not None and lead[0] == rows * positions:
        return Placement(n, segments, fold=(rows, positions), each=each)
    return Placement(n, misfit=f"its input has {lead[0]} rows where the model's call has {rows} examples")
