"""The model's own calls: what their arguments say of examples, and where a layer's rows stand in them."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gns.capture.arguments import tensors_in
from gns.capture.placement import Placement, place
from gns.capture.tally import Carriers
from gns.examples import RowMap, row_map
from gns.reasons import OTHER_MODE
from gns.segments import SegmentsOf
from gns.taps import Tap

REMEMBERED = 64  # calls that a recomputation may belong to


class Call:
    """One forward pass of the model.

    Args:
        rows: its examples, or None where they cannot be read off its arguments.
        weights: [K, n], of weighted sums of its examples' gradients, or None where none are collected.
    """

    def __init__(self, rows: RowMap | None, weights: Tensor | None = None):
        self.rows, self.weights = rows, weights
        self.uses: dict[int, int] = {}  # tap → how often it fired
        self.task: int | None = None  # graph task that ran it backward
        self._carriers = None if rows is None else Carriers(rows.n)
        self._placed: dict[Hashable, Placement] = {}

    def each(self, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """Give the leaf, [n], whose gradient collects the examples' ‖cᵢ‖² over the layers on a device."""
        return None if self._carriers is None else self._carriers.each((device, dtype))

    def place(self, tap: Tap, x: Tensor, device: torch.device) -> Placement:
        """Find out how the rows of a layer's input map onto the examples; asked once for layers alike."""
        assert self.rows is not None
        rule, dtype = tap.rule, tap.leaf.dtype
        known = (x.shape, rule.ids, rule.tokenwise, tap.shareable, _off(tap), device, dtype)
        where = self._placed.get(known)
        if where is None:
            where = _placement(tap, x, self.rows, self.each(device, dtype), self.weights, self._carriers)
            self._placed[known] = where
        return where

    def sq_norms(self, n: int) -> Tensor:
        """‖cᵢ‖² of the call's n examples, as far as layers have returned them."""
        there = [] if self._carriers is None else self._carriers.sq_norms()
        return functools.reduce(lambda a, b: a + b.to(a), there) if there else torch.zeros(n)


class Calls:
    """Follows the calls of a model.

    Args:
        model: the module whose calls are watched.
        weights: of the examples in the loss, see `gns.examples.row_map`.
        segments: which rows or positions are which example, see there.
    """

    def __init__(self, model: nn.Module, weights: str, segments: SegmentsOf | str | None):
        self.model, self.weights, self.segments = model, weights, segments
        self.weigh: Callable[[RowMap], Tensor] | None = None  # gives a call the weights of its weighted sums
        self.under_way: Call | None = None
        self._recent: deque[RowMap] = deque(maxlen=REMEMBERED)

    def begin(self, args: tuple, kwargs: Mapping[str, Any]) -> RowMap | None:
        """Read the examples of a call that begins."""
        rows = row_map(self.model, args, kwargs, self.weights, self.segments)
        weights = None if rows is None or self.weigh is None else self.weigh(rows)
        self.under_way = Call(rows, weights)
        if rows is not None:
            self._recent.append(rows)
        return rows

    def end(self) -> Call | None:
        """Give the call that ends."""
        call, self.under_way = self.under_way, None
        return call

    def place(
        self, tap: Tap, x: Tensor, device: torch.device, running: Iterable[Call], *, in_backward: bool
    ) -> Placement | None:
        """Find out how the rows of a layer's input map onto the examples of the call it is in.

        Outside the model's call it is, as a rule, a recomputation inside backward. That must save as many
        tensors as the first run did, so it needs a placement if that had one.

        Args:
            tap: of the layer.
            x: what its rule captured.
            device: where it computes.
            running: calls in the backward pass under way.
            in_backward: whether there is one.

        Returns:
            The placement, or None where the model's own call was not seen.
        """
        call = self.under_way
        if call is not None and call.rows is not None:
            return call.place(tap, x, device)
        if not in_backward:
            return None
        calls = {id(each): each for each in running}.values()
        found = [each.place(tap, x, device) for each in calls if each.rows is not None]
        fitting = [where for where in found if where.misfit is None]
        if len(fitting) == 1:
            # several uses of a layer would meet in its carrier unseen; its own leaf counts the rows of each
            return dataclasses.replace(fitting[0], carriers=None)
        if not fitting:
            found = [_placement(tap, x, each) for each in reversed(self._recent)]
            fitting = [where for where in found if where.misfit is None][:1]
        where = next(iter(fitting or found), None)
        if where is None:
            return None
        unknown = any(each.segments is not None for each in fitting)
        unknown |= len({(each.n, each.fold, each.along, each.shared_by) for each in fitting}) > 1
        # nobody knows whose examples
        return dataclasses.replace(where, each=None, contraction=None, carriers=None, ambiguous=unknown)

    def used_again(self, tap: Tap) -> bool:
        """Count a use of a layer in the call under way; whether it is not the first."""
        if self.under_way is None:
            return False
        uses = self.under_way.uses[id(tap)] = self.under_way.uses.get(id(tap), 0) + 1
        return uses > 1


def _off(tap: Tap) -> bool:
    """Whether a layer is in the mode, training or evaluation, that its rule is not for."""
    return tap.rule.mode is not None and tap.module.training != tap.rule.mode


def _placement(
    tap: Tap,
    x: Tensor,
    rows: RowMap,
    each: Tensor | None = None,
    weights: Tensor | None = None,
    carriers: Carriers | None = None,
) -> Placement:
    if _off(tap):
        return Placement(rows.n, misfit=OTHER_MODE)
    where = place(tap.rule, x, rows.shape, rows.n, rows.segments, shareable=tap.shareable, each=each)
    carriers = None if where.misfit is not None else carriers
    return dataclasses.replace(where, contraction=weights, carriers=carriers)


def outputs(out: Any) -> list[Tensor]:
    """Give the tensors of a model's output that a loss can be made of."""
    if dataclasses.is_dataclass(out) and not isinstance(out, (type, dict)):
        out = vars(out)
    return [t for t in tensors_in(out) if t.grad_fn is not None]  # a parameter says nothing of the call
