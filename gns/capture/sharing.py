"""The weight gradient of a linear layer out of the product that its examples' norms are read from.

The blocks C_b = Σ_t dy_bt x_btᵀ add up to the weight's gradient, which autograd forms a second time. A layer
that shares leaves that to the tap: its output goes on with the graph of `SharedFunction` in place of its own
(the values are the same, and the layer's own graph is let go), whose backward gives the gradients of input,
weight and bias. Nothing of the module is touched, so that there is nothing to be put back.

Which layers may is decided anew for every step, and for every call:
- only where Σ_b C_b has once been equal to the gradient that autograd formed independently, and in no step of
  a self-check of theirs: the comparison stays one of two things;
- exactly `nn.Linear` with plain parameters, which nothing else hooks or patches; one place in the model, one
  use a call; rows that are examples; outside compiled regions and function transforms;
- where it is cheaper.

What the backward keeps is what a tap keeps anyway, the layer's input: a checkpointed layer whose
recomputation decides otherwise saves as many tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooked_globally

from gns import reducers
from gns.capture.guard import plainly
from gns.capture.passage import norms_carried, norms_summed
from gns.capture.placement import Placement
from gns.rules import LINEAR
from gns.rules.linear import sharing_pays

if TYPE_CHECKING:
    from gns.capture.plan import Entry
    from gns.taps import Tap

WEIGHT = "weight"
# Ends of the graph of x Wᵀ + b as torch makes it: for 2 dimensions, for more, and where x is not contiguous.
_OWN = {"MmBackward0", "AddmmBackward0", "ViewBackward0", "UnsafeViewBackward0", "AddBackward0"}
_FORWARD = nn.Linear.forward
_CHANGED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: "
    "the weight of a linear layer, shape {shape}, is at version {now}; expected version {then} instead"
)


def may_share(entry: Entry) -> bool:
    """Whether a parameter is of the kind whose gradient can come out of the norms' product."""
    tap, local = entry.sites[0]
    return local == WEIGHT and tap.rule is LINEAR and type(tap.module) is nn.Linear and len(entry.sites) == 1


def choose(entries: Iterable[Entry], verified: Collection[str]) -> None:
    """Decide which layers may share in the step that begins.

    Args:
        entries: the measured parameters.
        verified: names of those whose contributions have summed to autograd's gradient.
    """
    for entry in entries:
        if may_share(entry):
            tap = entry.sites[0][0]
            # between steps a sharding engine shows its pieces; in a layer's forward it shows plain parameters
            whole = type(entry.parameter) is nn.Parameter and entry.parameter.numel() == entry.scalars
            trusted = whole and entry.name in verified and not entry.left_out
            more = tap.checks or tap.gathers or tap.contracted or tap.weighed is not None
            tap.shares = trusted and not more


def shared_by(entries: Iterable[Entry], out: Collection[str]) -> frozenset[str]:
    """Name the weights whose gradient has come from here, without those that are left out since."""
    return frozenset(e.name for e in entries if may_share(e) and e.sites[0][0].shared and e.name not in out)


def fits(tap: Tap, x: Tensor, out: Tensor, live: tuple[str, ...], where: Placement | None) -> bool:
    """Whether this call of a layer that may share can: its output is x Wᵀ + b and nothing else.

    Args:
        tap: of the layer.
        x: its input, as the layer saw it.
        out: its output, as the layer gave it.
        live: its parameters that train now.
        where: how rows map onto examples; None: they are.
    """
    layer = tap.module
    weight = layer._parameters[WEIGHT]
    return (
        WEIGHT in live
        and type(layer) is nn.Linear
        and (where is None or where.plain)
        and type(weight) is nn.Parameter
        and type(x) is type(out) is Tensor
        and x.dtype is out.dtype
        and (weight.dtype is out.dtype or torch.is_autocast_enabled(out.device.type))
        and out.grad_fn is not None
        and out.grad_fn.name() in _OWN
        and "forward" not in layer.__dict__
        and nn.Linear.forward is _FORWARD
        and not _hooked_by_others(layer)
        and sharing_pays(x, out)
    )


def _hooked_by_others(layer: nn.Module) -> bool:
    """Whether others than the tap's two hooks may change what goes in or comes out, or look at gradients."""
    everywhere = (
        hooked_globally._global_forward_hooks,
        hooked_globally._global_backward_hooks,
        hooked_globally._global_backward_pre_hooks,
    )
    return (
        len(layer._forward_hooks) > 1
        or len(layer._forward_pre_hooks) > 1
        or bool(layer._backward_hooks or layer._backward_pre_hooks)
        or any(everywhere)
    )


def passed(
    out: Tensor,
    x: Tensor,
    tap: Tap,
    live: tuple[str, ...],
    where: Placement | None,
    carriers: tuple[Tensor, ...],
) -> Tensor:
    """Give a layer's output on with the graph of `SharedFunction`.

    Args:
        out: the output.
        x: the layer's input.
        tap: of the layer.
        live: its parameters that train now.
        where: how rows map onto examples; None: they are.
        carriers: what the call's norms are returned to; empty where they go to the tap's own leaf.
    """
    own = tap.module._parameters
    each, leaf = (None, None) if carriers else (None if where is None else where.each, tap.leaf)
    given = [out], x, own[WEIGHT], own["bias"], tap, live, where, each, leaf, *carriers
    return super(torch.autograd.Function, SharedFunction).apply(*given)  # type: ignore[reportAttributeAccessIssue]


class SharedFunction(torch.autograd.Function):
    """A linear layer as one node; its norms leave as gradients of leaves, as those of a tap do."""

    @staticmethod
    def forward(
        ctx: Any,
        held: list[Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tap: Tap,
        live: tuple[str, ...],
        where: Placement | None,
        each: Tensor | None,
        leaf: Tensor | None,
        *carriers: Tensor,
    ) -> Tensor:
        """Give the output on (held in a list, so that its own graph is not part of this one)."""
        ctx.save_for_backward(x)
        # by hand, where `save_for_backward` would keep one tensor more than a tap does; a view, as autograd
        # keeps one: what is put into `weight.data` before the backward is not what made this output
        with torch.enable_grad():
            ctx.weight, ctx.version = weight.view_as(weight), weight._version
        ctx.tap, ctx.live, ctx.n_carriers, ctx.checks = tap, live, len(carriers), tap.checks
        ctx.where, ctx.carried, ctx.weighs = where, leaf is None, False
        return held[0].detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Give the gradients of input, weight and bias, and the sums as gradients of the leaves."""
        weight = ctx.weight
        (x,) = ctx.saved_tensors
        _, for_x, for_weight, for_bias, *_ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = None
        if for_x:
            if weight._version != ctx.version:
                about = {"shape": tuple(weight.shape), "now": weight._version, "then": ctx.version}
                raise RuntimeError(_CHANGED.format(**about))
            dx = rows.mm(weight.to(dy.dtype)).reshape(x.shape)
        total, leaves = _measured(ctx, x, dy)
        if total is None:  # as autograd would
            total = rows.t().mm(x.reshape(-1, x.shape[-1])) if for_weight else None
        dw = None if total is None else total.to(weight.dtype)
        db = rows.sum(0) if for_bias else None
        return None, dx, dw, db, None, None, None, *leaves


def _measured(ctx: Any, x: Tensor, dy: Tensor) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """Σ_b C_b, or None where the weight's gradient must be formed apart; and the gradients of the leaves."""
    tap, total = ctx.tap, None
    if ctx.carried and tap.on_pass is not None:
        tap.on_pass()
    graphed = torch.is_grad_enabled()  # the gradient gets a graph of its own, which our sums are no part of
    if graphed and tap.on_doubled is not None:
        tap.on_doubled()
    where = Placement(dy.shape[0]) if ctx.where is None else ctx.where
    tap.cross(ctx.checks)
    try:
        if where.misfit or where.ambiguous:
            tap.misplaced(where)
        known = {}
        with plainly(dy.device.type):
            if not graphed:
                known[WEIGHT], total = reducers.norms_and_sum(tap.rule, tap.module, x, dy, WEIGHT, tap.limit)
            if ctx.carried:
                found = None, None, *norms_carried(ctx, x, dy, where, known)
            else:
                each, _, own = norms_summed(ctx, x, dy, where, list(ctx.live), known)
                found = each, own
        tap.shared = tap.shared or not graphed
        return total, found
    except Exception as error:  # nothing of ours may reach the user's backward, nor cost it a gradient
        tap.failed(error)
        return None, (None,) * (2 + ctx.n_carriers)
