"""Follows one model through training: from hook events to the device sums of each optimizer step.

It owns the taps, the boundary, and the hooks on the model's own call and on optimizers. What it hands on
is an `OpenStep`: device values on their way to the host.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gns.boundary import Boundary, Close
from gns.capture import sharing
from gns.capture.attachment import compiled_autograd, crossed, hooks_of, notify, reached
from gns.capture.calls import Call, Calls, outputs
from gns.capture.gradients import Stamp, largest_entries, sq_norms
from gns.capture.guard import guarded, in_backward
from gns.capture.openstep import OpenStep
from gns.capture.owners import Owners, learning_rate
from gns.capture.ownership import LastClose, Ownership
from gns.capture.placement import Placement
from gns.capture.plan import Plan, batch_norms
from gns.capture.pooling import Pool, joined, unwrapped
from gns.capture.projections import local
from gns.capture.ranks import world_size
from gns.capture.selfcheck import SelfCheck
from gns.capture.tally import Tallies
from gns.capture.underway import StepUnderWay
from gns.capture.weights import Weights
from gns.metrics import EUCLIDEAN, Metric
from gns.reasons import (
    ABORTED,
    BATCH_NORM,
    COMPILED_AUTOGRAD,
    CROSSED,
    HIDDEN,
    IDLE_RANK,
    JOINED,
    LATE,
    MIXED,
    SECOND_ORDER,
    UNSEEN,
)
from gns.segments import SegmentsOf
from gns.taps import Tap

if TYPE_CHECKING:
    from gns.curvature.watching import CurvatureWatch


class Collector:
    """Collects the sums of one model's optimizer steps.

    Args:
        model: the module whose calls are watched.
        plan: taps and entries.
        every: measure one optimizer step in so many.
        weights: of the examples in the loss, see `gns.examples.row_map`.
        segments: which rows or positions are which example, see there.
        scaler: the loop's gradient scaler, or None.
        on_step: receives each measured step when it ends.
        on_error: receives an exception of ours; may raise it.
        on_notice: receives what the user should know beyond steps.
        first_step: number of the next optimizer step.
        metric: in which norms are taken.
        alone: measure this process's own examples, whatever other ranks there are.
        share: let layers have their weight's gradient out of the product of its norms, see
            `gns.capture.sharing`.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        every: int,
        weights: str,
        segments: SegmentsOf | str | None,
        scaler: Any,
        on_step: Callable[[OpenStep], None],
        on_error: Callable[[Exception], None],
        on_notice: Callable[[str], None] = warnings.warn,
        first_step: int = 0,
        metric: Metric = EUCLIDEAN,
        alone: bool = False,
        share: bool = False,
    ):
        self.model, self.taps, self.entries = unwrapped(model), plan.taps, plan.entries
        self._wrapper = model
        self.every, self.scaler, self._alone, self._share = every, scaler, alone, share
        self.on_step, self.on_error, self.on_notice = on_step, on_error, on_notice
        self.dead = False
        self.step = first_step
        self.calls = Calls(self.model, weights, segments)
        self.tallies = Tallies(self.taps, self.entries)
        self._norms = batch_norms(self.model)
        self.owners = Owners(self.model, plan.entries, {e.name for e in plan.entries} | plan.reasons.keys())
        self.check = SelfCheck(plan.entries)
        self.boundary = Boundary()
        self.handles: list[Any] = []
        self.now = StepUnderWay()
        self._running: list[tuple[Call, int]] = []  # calls in the backward pass under way, with graph tasks
        self._task = -1  # graph task of the backward pass under way
        self._queued = False  # its end is being waited for
        self._touched = False  # it reached a leaf, so it is no torch.autograd.grad
        self._open = False  # it began and has not ended; one that raised never does
        self.ownership = Ownership(plan.entries)
        self._last = LastClose()
        self.watch: CurvatureWatch | None = None  # makes readings of B_noise
        self._ended: tuple[int, float | None] | None = None  # step that closed, for the watch
        self.weights = Weights(metric, plan.entries)
        self.pool: Pool | None = None  # of the data-parallel ranks, where there are more than one

    @property
    def hidden(self) -> bool:
        """Whether the engine hides `.grad`: each rank's own batch stands for a step."""
        return self.ownership.hidden

    # life

    def attach(self) -> None:
        """Register every hook."""
        for tap in self.taps:
            tap.listen(self._on_leaf, weighs=self.weights.weighs)
            tap.on_error, tap.on_misplaced, tap.on_doubled = self.fail, self._misplaced, self._doubled
            tap.on_pass = self.pass_seen
        self._listen()
        self.handles = hooks_of(self)
        self._activate()

    def detach(self) -> None:
        """Remove every hook and free every leaf."""
        self.active = False
        for handle in self.handles:
            handle.remove()
        self.handles = []
        for tap in self.taps:
            tap.drop()
            tap.close_checks()
            tap.shares = False
            tap.on_leaf = tap.on_error = tap.on_misplaced = tap.on_doubled = tap.on_pass = tap.tally = None
        if self.pool is not None:
            self.pool.close()

    def fail(self, error: Exception) -> None:
        """Stand down: nothing is measured any more, training goes on.

        The taps stay in the graph until the next optimizer step: a checkpointed layer whose recomputation
        saved other tensors than its first run would raise in the user's backward.
        """
        known, self.dead = self.dead, True
        if self.pool is not None:
            self.pool.close()  # the other ranks hear of it
        if not known:
            self.on_error(error)

    def leave_out(self, names: Collection[str]) -> None:
        """From now on do not count some parameters in the norms of single examples."""
        for entry in self.entries:
            if entry.name in names:
                entry.leave_out()

    # the model's own call

    @guarded
    def call_begins(self, args: tuple, kwargs: dict) -> None:
        """Read the examples of a call of the model."""
        if in_backward():
            return
        self._queued = False  # a backward pass that raised never came to its end
        self._end(self.boundary.forward())
        if self.watch is not None:
            self.watch.call(self.step, args, kwargs)
        if not self.active:
            return
        for name in (name for name, norm in self._norms if norm.training):
            self.on_notice(BATCH_NORM.format(name=f"`{name}`"))
            break
        self.weights.read()
        rows = self.calls.begin(args, kwargs)
        if rows is None:
            return
        if rows.notice is not None:
            self.on_notice(rows.notice)
        call = self.calls.under_way
        for gather in {id(g): g for tap in self.taps for g in tap.gathers.values()}.values():
            leaf = gather.leaf
            gather.begin(rows.n, None if call is None else call.each(leaf.device, leaf.dtype))

    @guarded
    def call_ends(self, out: Any) -> None:
        """Watch the outputs, so that a call counts when its backward runs."""
        call = self.calls.end()
        for entry in self.entries:
            gather = entry.meeting
            if gather is not None:
                gather.end()
                if gather.refusal is not None:
                    tap, local = entry.sites[0]
                    self.now.misfits[tap.full_name(local)] = gather.refusal
                if gather.outgrown:
                    self.now.to_gather.update(id(tap) for tap, _ in entry.sites)
        if in_backward():
            return
        told: Callable[..., None] | None = None
        if call is not None:
            told = functools.partial(notify, weakref.ref(self), call)
        elif not self.active and (self.step + 1) % self.every == 0 and not self.dead:
            told = functools.partial(crossed, weakref.ref(self), self.step)  # its layers are not tapped
        for tensor in outputs(out) if told is not None else ():
            tensor.register_hook(told)

    def crosses(self, step: int) -> None:
        """Note that a graph made in a step between measured ones runs backward."""
        if self.active and self.step != step:
            self.now.reason = CROSSED

    @guarded
    def forward_seen(self) -> None:
        """Note a layer's training forward pass between measured steps."""
        if not in_backward():
            self._end(self.boundary.forward())

    @guarded
    def place(self, tap: Tap, x: Tensor, out: Tensor) -> Placement | None:
        """Note a layer's call on x, and find out how its rows map onto the examples of the model's call.

        Returns:
            The placement, or None where the model's own call was not seen: rows stand for examples then.
        """
        seen = x if x.is_floating_point() else out
        tap.activation_dtype, self.now.eager = seen.dtype, True
        self.now.placed.add(id(tap))
        tap.follow_device()
        self.weights.read()
        if tap.checks:
            self.check.follow(tap, out.device)
        backward = in_backward()
        running = [call for call, _ in self._running] if backward else ()
        where = self.calls.place(tap, x, out.device, running, in_backward=backward)
        if where is None or where.misfit is not None:
            if where is not None and not tap.admits(x, where):
                self._misplaced(tap, where)  # it will not be there to tell in backward
        elif self.calls.used_again(tap) and any(p not in tap.gathers for p in tap.parameters):
            self.now.to_gather.add(id(tap))
        return where

    @guarded
    def _doubled(self) -> None:
        """Note, inside backward, that a graph of the gradient is being made."""
        self.now.doubled.add(torch._C._current_graph_task_id())

    @guarded
    def _misplaced(self, tap: Tap, where: Placement) -> None:
        """Note, inside backward, that a call ran whose rows are no examples, or nobody knows whose."""
        if where.ambiguous:
            self.now.reason = MIXED
        else:
            self.now.misfits.update({tap.full_name(p): str(where.misfit) for p in tap.parameters})

    # backward

    def _listen(self) -> None:
        """Hear of every tally's sums before they reach its leaf."""
        for tally in self.tallies.members:
            tally.leaf.register_hook(functools.partial(reached, weakref.ref(self)))

    def _on_leaf(self, _: Tensor) -> None:
        self.leaf_reached()

    def leaf_reached(self) -> None:
        """Note that sums are about to reach a leaf: the pass under way is no `torch.autograd.grad`."""
        self.pass_seen()
        self._touched = True

    def pass_seen(self) -> None:
        """Note that a backward pass is under way, wherever a tap is."""
        if not self._queued:
            self.backward_event(None)

    @guarded
    def backward_event(self, call: Call | None) -> None:
        """Note that a backward pass is under way: of a call, or wherever a tap is."""
        if not self.active:
            return
        if not self._queued:
            self._task = torch._C._current_graph_task_id()
            self._queued, self._touched, self._running = True, False, []
            self._backward_begins(from_output=call is not None)
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: queue(self._backward_ended))  # the second one runs after data-parallel reduction
        if call is not None:
            self._running.append((call, torch._C._current_graph_task_id()))

    def _backward_begins(self, from_output: bool) -> None:
        self.weights.read()
        gradients, aborted, self._open = self._gradients(), self._open, True
        if self.boundary.pending:
            if self.boundary.backward_begins(self.now.discarded(gradients, from_output)):
                self._drop()
            elif aborted:
                self.now.reason = ABORTED
            return
        if aborted:
            self._drop()
        there = [g for g in gradients if g is not None]
        # in eager mode the first leaf hears of a pass before any parameter receives its gradient
        self.now.leftover = largest_entries(there) if there and (from_output or self.now.eager) else None

    def _drop(self) -> None:
        self._drop_sums()
        self.now.discard()

    def _drop_sums(self) -> None:
        self.tallies.drop()
        for tap in self.taps:
            tap.drop()

    @guarded
    def _backward_ended(self) -> None:
        self._queued = self._open = False
        if not self.active or not self._touched:  # torch.autograd.grad: nothing reached `.grad`
            return
        self.ownership.backward_ended()
        self.now.count(self._running)
        if self.now.doubled - {self._task}:
            self.now.reason = SECOND_ORDER
        gradients = self._gradients()
        read = self.check.totals() if self.hidden else gradients
        like = [e.parameter for e in self.entries] if any(g is None for g in read) else ()
        self.now.sq_norms = sq_norms(read, like)
        self.now.in_metric = self.weights.sq_norms(read)
        self.now.local = self.hidden
        if not self.hidden:
            seed = len(self.entries) * self.step if self._ranks() > 1 else None
            self.now.mismatches = self.check.compare(gradients, seed)
            if seed is not None and self.check.crossed():  # ranks compare the same parameters, or none
                self.now.reason, self.now.mismatches = CROSSED, []
        half = any(tap.activation_dtype is torch.float16 for tap in self.taps)
        self.now.loss_scaled = half and self.scaler is None
        self.now.stamp = Stamp(gradients)
        self.now.without_gradient = {e.name for e, g in zip(self.entries, read, strict=True) if g is None}
        scale = getattr(self.scaler, "_get_scale_async", lambda: None)()
        self.now.scale = None if scale is None else scale.detach().clone()
        self._end(self.boundary.backward_ends())

    def _gradients(self) -> list[Tensor | None]:
        grads = [e.parameter.grad for e in self.entries]
        return [g if type(g) is Tensor or g is None else local(g) for g in grads]

    def _ranks(self) -> int:
        return 1 if self._alone else world_size()

    # the optimizer

    @guarded
    def _on_pre(self, optimizer: Any, args: tuple, kwargs: dict) -> None:
        late = self.owners.late(optimizer) if self.active and not in_backward() else []
        if late:  # a switched adapter, a layer unfrozen
            self.on_notice(f"{len(late)} trainable parameter(s) are not measured, e.g. {late[0]}: {LATE}")
        if self.owners.owns(optimizer):
            self.ownership.owner_steps()
            self.weights.owned_by(optimizer)
        elif not self.hidden:
            self._foreign_steps()
            return
        else:
            self.ownership.engine_steps()
        if not in_backward():
            self._queued = False
        self.now.learning_rate = learning_rate(optimizer)
        self._refuse_what_broke_off()
        closure = callable(kwargs.get("closure", args[1] if len(args) > 1 else None))
        blind = not closure and self._blind()
        idle = not closure and self._idle(optimizer)
        close = self.boundary.optimizer_pre(id(optimizer), closure=closure, in_backward=in_backward())
        if close is not None or idle:
            self._last.by(optimizer)
        self._end(Close(UNSEEN) if blind else Close(IDLE_RANK) if idle else close)
        self._read_curvature()

    def _foreign_steps(self) -> None:
        """Count steps of an optimizer that owns none of our parameters; after a few, do without `.grad`."""
        if in_backward():
            return
        notice = self.ownership.foreign_steps(self._gradients(), pending=self.boundary.pending)
        if notice is not None:
            self.on_notice(notice)
        if self.hidden:
            self.boundary.pending, self.now.mismatches = False, []
            self._end(Close(HIDDEN))

    @guarded
    def _on_post(self, optimizer: Any, args: tuple, kwargs: dict) -> None:
        if not self.hidden and not self.owners.owns(optimizer):
            return
        self.weights.stepped()
        self._refuse_what_broke_off()
        awaited = self.boundary.awaits(id(optimizer))
        blind = awaited and self._blind()
        close = self.boundary.optimizer_post(id(optimizer), in_backward=in_backward())
        self._end(Close(UNSEEN) if blind else close)
        self._read_curvature()

    def _read_curvature(self) -> None:
        """Let the watch read where a step has just closed: outside any call or backward pass."""
        ended, self._ended = self._ended, None
        if self.watch is not None and ended is not None:
            self.watch.step_ends(*ended)

    def _refuse_what_broke_off(self) -> None:
        """Refuse the step if its last backward pass began and never ended: the leaves hold a part of it."""
        if self._open and not in_backward() and self.active:
            self.now.reason = ABORTED

    def _blind(self) -> bool:
        """Whether new gradients are there though no backward pass was noticed since the last step closed."""
        if not self.active or self.boundary.pending or in_backward():
            return False
        return self._last.new(self._gradients())

    def _idle(self, optimizer: Any) -> bool:
        """Whether this data-parallel rank had no backward pass in a step; the others wait for its sums.

        A wrapped optimizer also steps without one, but then another optimizer closed the step before.
        """
        known = self._last.closed_by(optimizer) and not self.hidden
        return known and not self.boundary.pending and not in_backward() and self._ranks() > 1

    # the step

    @guarded
    def end_step(self) -> None:
        """End a step here, where no optimizer does: for measurements without training."""
        self._end(self.boundary.close())

    def _end(self, close: Close | None) -> None:
        if close is None:
            return
        if self.active:
            names = () if self.hidden else self.check.open_names()
            reason = CROSSED if self.now.reason == CROSSED else close.reason
            if joined(self._wrapper):
                reason, self.now.mismatches = JOINED, []
            elif self.pool is None and self._ranks() > 1:
                about = f"step {self.step}, every {self.every}, {self.weights.metric.name}"
                self.pool = Pool(self.entries, about, weighs=self.weights.weighs)
            pool = self.pool if reason != JOINED else None
            told = self.step, reason, self.tallies, self.entries, names
            self.on_step(self.now.hand_on(*told, pool, self.weights))
        self._ended = self.step, self.now.learning_rate
        self.step += 1
        self.weights.end()
        self._drop_sums()
        self.check.end()
        for entry in self.entries:
            again = entry.meeting is None or entry.meeting.outgrown
            if again and any(id(tap) in self.now.to_gather for tap, _ in entry.sites):
                entry.gather()
        self.now = StepUnderWay()
        self._last.left(self._gradients())
        self._open = False
        self.calls.end()  # one that raised never came to its end
        self._activate()

    def _activate(self) -> None:
        self.active = self.step % self.every == 0 and not self.dead
        if self.active and any(tap.tally is None for tap in self.taps):  # the model has moved
            self.tallies = Tallies(self.taps, self.entries)
            self._listen()
        if self.active and compiled_autograd():
            self.active = False
            self.on_notice(COMPILED_AUTOGRAD)
        self.ownership.step_begins()
        self.boundary.measuring = self.active
        if self.active:
            self.check.begin(self.step // self.every, everything=self.hidden)
            if self._share:
                sharing.choose(self.entries, self.check.verified)
