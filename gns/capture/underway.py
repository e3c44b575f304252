"""The step under way: what the collector has noted since the last one closed, and how it is handed on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gns.capture.calls import Call
from gns.capture.gradients import Stamp, all_empty
from gns.capture.host import HostValues
from gns.capture.openstep import OpenStep
from gns.capture.plan import Entry
from gns.capture.pooling import Pool
from gns.capture.tally import Tallies
from gns.capture.weights import Weights
from gns.examples import RowMap
from gns.reasons import PACKED_UNSEEN, REPEATED, TWICE
from gns.taps import Tap


@dataclass
class StepUnderWay:
    """Everything about one optimizer step that is not on a leaf."""

    calls: list[Call] = field(default_factory=list)  # those that were run backward
    reason: str | None = None
    misfits: dict[str, str] = field(default_factory=dict)  # parameter → why its rows are not examples
    placed: set[int] = field(default_factory=set)  # taps that were called outside compiled regions
    doubled: set[int] = field(default_factory=set)  # graph tasks that made a graph of their gradient
    to_gather: set[int] = field(default_factory=set)  # taps that fired more than once in a call
    loss_scaled: bool = False
    stamp: Stamp | None = None  # of the gradients when last read
    sq_norms: list[Tensor] = field(default_factory=list)
    in_metric: list[Tensor] = field(default_factory=list)  # the same in a metric that weighs entries, or none
    mismatches: list[Tensor] = field(default_factory=list)  # or projections, see `SelfCheck.compare`
    leftover: Tensor | None = None  # largest gradient entry before the first backward pass
    scale: Tensor | None = None  # loss scale
    learning_rate: float | None = None
    eager: bool = False  # layers were called outside compiled regions
    local: bool = False  # `sq_norms` are of Σcᵢ of this rank's examples, `.grad` being hidden
    without_gradient: set[str] = field(default_factory=set)  # parameters whose `.grad` is None

    def count(self, running: Sequence[tuple[Call, int]]) -> None:
        """Count the calls that a backward pass ran through, each with its graph task."""
        for call, task in running:
            if call.task is None:
                call.task = task
                self.calls.append(call)
            elif call.task != task:
                self.reason = TWICE

    def discarded(self, gradients: Sequence[Tensor | None], from_output: bool) -> bool:
        """Whether the loop threw away the gradients that were summed so far.

        Args:
            gradients: as they are when a further backward pass begins.
            from_output: the pass was heard of at the model's output, before it reached any of them.
        """
        if all(g is None for g in gradients):  # FSDP2 hides them until it reduces: then none were there
            return self.stamp is None or self.stamp.any()
        if self.stamp is None or self.stamp.untouched(gradients):
            # `grad.data.zero_()` leaves no trace but the values: look where looking does not stall a device
            on_host = all(g is None or g.device.type == "cpu" for g in gradients)
            was_there = on_host and from_output and any(bool(q) for q in self.sq_norms)
            return was_there and all_empty(gradients)
        # without the output's hook some gradients of this very pass may be there already
        return all_empty(gradients) if from_output else self.stamp.replaced(gradients)

    def discard(self) -> None:
        """Forget the backward passes so far: the loop threw their gradients away."""
        self.calls, self.reason, self.leftover, self.stamp = [], None, None, None

    def hand_on(
        self,
        step: int,
        reason: str | None,
        tallies: Tallies,
        entries: Sequence[Entry],
        checked: tuple[str, ...],
        pool: Pool | None,
        weights: Weights,
    ) -> OpenStep:
        """Start the copy to the host.

        Args:
            step: number of the optimizer step.
            reason: why the boundary refuses it, or None.
            tallies: of all taps.
            entries: measured parameters.
            checked: parameters of the self-check, as in `mismatches`.
            pool: of the data-parallel ranks, or None for one process.
            weights: the metric.
        """
        rows = [call.rows for call in self.calls if call.rows is not None]
        seen = bool(rows) and len(rows) == len(self.calls)
        repeated = REPEATED if self.to_gather else None
        taps = tallies.taps
        holding = [tap for tap in taps if tap.holds]
        return OpenStep(
            step=step,
            entries=entries,
            tallies=tallies,
            holding=holding,
            n=sum(r.n for r in rows) if seen else None,
            loss_scaled=self.loss_scaled,
            learning_rate=self.learning_rate,
            reason=reason or self.reason or repeated,
            misfits=self.misfits | self._packed_unseen(taps),
            without_gradient=self.without_gradient,
            checked=checked if self.mismatches or pool is not None else (),
            values=self._values(tallies, holding, weights, each=seen and not self.local),
            seen_backward=bool(self.sq_norms),
            dtypes=_lowest(entries) if self.mismatches else {},
            pool=pool,
            local=self.local,
            metric=weights.metric.name,
            unready=weights.missing(self.placed),
        )

    def _values(
        self, tallies: Tallies, holding: Sequence[Tap], weights: Weights, *, each: bool
    ) -> HostValues:
        """Start the copy of all device values, with `each` or without; see `OpenStep` for their names."""
        one = torch.ones(1)
        known = [(call, call.rows) for call in self.calls if call.rows is not None]
        return HostValues(
            counted=[tally.read() for tally in tallies.members],
            sums=[tap.read() for tap in holding],
            sums_in_metric=[tap.read_weighed() for tap in tallies.taps] if weights.weighs else [],
            each=[call.sq_norms(rows.n) for call, rows in known if each],
            q=self.sq_norms,
            q_in_metric=self.in_metric,
            check=self.mismatches,
            totals=_totals([rows for _, rows in known]),
            leftover=[self.leftover.max().reshape(1) if self.leftover is not None else 0 * one],
            scale=[self.scale.reshape(1) if self.scale is not None else one],
        )

    def _packed_unseen(self, taps: Sequence[Tap]) -> dict[str, str]:
        """Name the parameters of layers that ran compiled, or not, in a step whose examples are not rows."""
        if all(call.rows is None or call.rows.segments is None for call in self.calls):
            return {}
        unplaced = [tap for tap in taps if id(tap) not in self.placed and tap.leaf.grad is not None]
        return {tap.full_name(p): PACKED_UNSEEN for tap in unplaced for p in tap.parameters}


def _lowest(entries: Sequence[Entry]) -> dict[str, torch.dtype]:
    """Lowest precision between each entry's activations and its gradient; those not seen are left out."""
    out = {}
    for entry in entries:
        seen = [tap.activation_dtype for tap, _ in entry.sites]
        known = [dtype for dtype in (*seen, entry.parameter.dtype) if dtype is not None]
        if len(known) > len(seen):
            out[entry.name] = max(known, key=lambda dtype: torch.finfo(dtype).eps)
    return out


def _totals(rows: list[RowMap]) -> list[Tensor]:
    """Tokens, Σw and Σw² over the calls of a step: [3], NaN where unknown; empty without calls."""
    if not rows:
        return []
    parts = [(r.n_tokens, r.weight_sum, r.weight_sq_sum) for r in rows]
    return [_sum([p[i] for p in parts]) for i in range(3)]


def _sum(parts: list[Tensor | None]) -> Tensor:
    there = [p for p in parts if p is not None]
    if len(there) < len(parts):
        return torch.full((), float("nan"))
    return functools.reduce(torch.add, [p.to(there[0].device) for p in there])
