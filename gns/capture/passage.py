"""The passage of a layer's output through a tap: the identity, whose backward measures the examples.

What leaves as gradients of the leaves is added up by autograd itself; the gradient of the output goes on
unchanged. Nothing of ours may raise there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gns import reducers
from gns.capture.gather import sum_dtype
from gns.capture.guard import plainly
from gns.capture.placement import Placement
from gns.reasons import IN_PLACE, WRONG_SHAPE
from gns.rules.base import added

if TYPE_CHECKING:
    from gns.taps import Tap


class TapFunction(torch.autograd.Function):
    """Identity on the output; the sums leave as gradients of the leaves."""

    @classmethod
    def apply_outright(cls, *args: Any) -> Tensor:
        """Do what `apply` does outside function transforms, without its look for what one may have left."""
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[reportAttributeAccessIssue]

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        x: Tensor,
        tap: Tap,
        live: tuple[str, ...],
        where: Placement | None,
        each: Tensor | None,
        weighed: Tensor | None,
        leaf: Tensor | None,
        *extra: Tensor,
    ) -> Tensor:
        """Give the output on, and keep what the backward needs."""
        if not tap.needing.isdisjoint(live):  # else the layer itself does not keep x either
            ctx.save_for_backward(x)
        ctx.tap, ctx.live, ctx.n_extra, ctx.where, ctx.alone = tap, live, len(extra), where, out.shape
        if not torch.compiler.is_compiling():
            ctx.checks = tap.checks
        ctx.carried = leaf is None  # norms go to the call's carriers, the first of the others
        ctx.more = not ctx.carried or bool(tap.checks) or bool(tap.contracted)
        if ctx.more:
            ctx.contracted, ctx.checked = tuple(tap.contracted), tuple(tap.checks)
            ctx.weighs = weighed is not None
            gathers = {} if where is not None and where.misfit is not None else tap.gathers
            ctx.gathered = tuple((p, gather, gather.note(tap.rule)) for p, gather in gathers.items())
            ctx.shapes = {p: check.shape for p, check in tap.checks.items()}
        seen = out.detach()  # neither a view nor the input itself: users change outputs in place
        return seen.expand(where.shared_by, *out.shape[1:]) if where is not None and where.shared_by else seen

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Give the gradient on, and the sums as gradients of the leaves."""
        onward = dy.sum(0, keepdim=True) if dy.shape != ctx.alone else dy  # as the addition itself would
        none = (onward, *[None] * (7 + ctx.n_extra))
        try:
            saved = ctx.saved_tensors  # to be asked for once only: checkpointing recomputes on demand
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise  # checkpointing's own
            ctx.tap.misplaced(Placement(0, misfit=IN_PLACE))
            return none
        x = saved[0] if saved else dy
        if torch.compiler.is_compiling():
            return onward, None, None, None, None, *_leaf_gradients(ctx, x, dy)
        if ctx.carried and ctx.tap.on_pass is not None:
            ctx.tap.on_pass()  # a tap's own leaf would have told before any parameter had its gradient
        if torch.is_grad_enabled() and ctx.tap.on_doubled is not None:
            ctx.tap.on_doubled()
        try:
            return onward, None, None, None, None, *_leaf_gradients(ctx, x, dy)
        except Exception as error:  # nothing of ours may reach the user's backward
            ctx.tap.failed(error)
            return none


class Echo(torch.autograd.Function):
    """Identity on the output that saves what a tap would and measures nothing, for a recomputation."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor | None) -> Tensor:
        """Give the output on."""
        if x is not None:
            ctx.save_for_backward(x)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Give the gradient on."""
        return dy, None


def _leaf_gradients(ctx: Any, x: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of a tap's leaves: norms summed or carried, then gathers', check sums, signed sums."""
    tap, where = ctx.tap, ctx.where
    if not torch.compiler.is_compiling():
        tap.cross(getattr(ctx, "checks", tap.checks))  # a compiled forward pass may run backward uncompiled
    if where is None:
        where = Placement(dy.shape[0])
    elif where.misfit or where.ambiguous:
        tap.misplaced(where)
    rule, layer = tap.rule, tap.module
    if where.shared_by:
        x = x.expand(where.shared_by, *x.shape[1:])
    with plainly(dy.device.type):
        if not ctx.more:
            return None, None, None, *norms_carried(ctx, x, dy, where)
        gathered, met = {p for p, _, _ in ctx.gathered}, []
        for p, gather, noted in ctx.gathered:
            met += gather.contribute(rule, layer, x, dy, p, where, noted)
        if ctx.carried:
            sums = None, None, None, *norms_carried(ctx, x, dy, where)
        else:
            sums = norms_summed(ctx, x, dy, where, [p for p in ctx.live if p not in gathered])
        totals = _checked(ctx, x, dy, where) if ctx.checked else ()
        contracted = [_contracted(tap, x, dy, p, where) for p in ctx.contracted]
        return *sums, *met, *totals, *contracted


def norms_carried(
    ctx: Any, x: Tensor, dy: Tensor, where: Placement, known: Mapping[str, Tensor] | None = None
) -> list[Tensor | None]:
    """‖cᵢ‖² [n] of each parameter, as gradients of the call's carriers; some may be known already."""
    tap, dtype = ctx.tap, ctx.tap.leaf.dtype
    found = dict(known or {})
    found |= {p: tap.sq_norms(x, dy, p, where) for p in ctx.live if p not in found}
    return [found[p].to(dtype) if p in found else None for p in tap.parameters]


def norms_summed(
    ctx: Any,
    x: Tensor,
    dy: Tensor,
    where: Placement,
    parameters: list[str],
    known: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Squared norms, as gradients of three leaves, where the call has no carriers for them.

    For the call ‖cᵢ‖² [n] over the parameters, in the metric where it weighs entries; for the tap the sums
    over the examples, [P] in such a metric, and [P + 1] as they are with the number of rows. Without a
    metric that weighs entries, some may be known already.
    """
    tap, in_metric = ctx.tap, None
    dtype = tap.leaf.dtype
    rows = tap.count(dy.shape[0] if where.misfit else where.n, dtype, dy.device)
    roots = tap.roots if ctx.weighs else {}
    if known is None:
        counted = norms = {p: tap.sq_norms(x, dy, p, where, roots.get(p)).to(dtype) for p in parameters}
    else:
        every = {p: known[p] if p in known else tap.sq_norms(x, dy, p, where) for p in parameters}
        counted = norms = {p: found.to(dtype) for p, found in every.items()}
    if ctx.weighs:
        counted = {p: both[:, 1] for p, both in norms.items() if p in roots}
        norms = {p: found[:, 0] if p in roots else found for p, found in norms.items()}
        in_metric = [counted[p].sum() if p in counted else torch.zeros_like(rows) for p in tap.parameters]
        in_metric = torch.stack(in_metric)
    sums = [norms[p].sum() if p in norms else torch.zeros_like(rows) for p in tap.parameters]
    each = None
    if where.each is not None:
        there = [found for p, found in counted.items() if p not in tap.left_out]
        each = added(there) if there else None
    return each, in_metric, torch.stack([*sums, rows])


def _checked(ctx: Any, x: Tensor, dy: Tensor, where: Placement) -> list[Tensor | None]:
    """Σᵢ cᵢ of the parameters of the self-check; None where the rule does not fit."""
    tap = ctx.tap
    totals: list[Tensor | None] = [_total(tap, x, dy, p, where) for p in ctx.checked]
    for i, p in enumerate(ctx.checked):
        if (total := totals[i]) is not None and total.shape != ctx.shapes[p]:
            tap.misplaced(Placement(0, misfit=WRONG_SHAPE))  # autograd would raise in the user's backward
            totals[i] = None
    return totals


def _contracted(tap: Tap, x: Tensor, dy: Tensor, parameter: str, where: Placement) -> Tensor | None:
    """Σᵢ wₖᵢ cᵢ over the examples, [K, *shape]; None where the call has no weights for them."""
    if where.contraction is None or where.misfit:
        return None
    parts = []
    for a, b, examples in where.parts(tap.rule, x, dy):
        weights = where.contraction if examples is None else where.contraction[:, examples]
        parts.append(reducers.weighted_sums(tap.rule, tap.module, a, b, parameter, weights, tap.limit))
    return added(parts) if parts else None


def _total(tap: Tap, x: Tensor, dy: Tensor, parameter: str, where: Placement) -> Tensor:
    """Σᵢ cᵢ of the rows that are examples."""
    parts = [
        reducers.sum_of_blocks(tap.rule, tap.module, a, b, parameter, tap.limit)
        for a, b, _ in where.parts(tap.rule, x, dy)
    ]
    if not parts:  # no row is an example
        return torch.zeros_like(tap.parameter(parameter), dtype=sum_dtype(dy.dtype))
    return added(parts)
