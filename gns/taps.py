"""The only code that touches modules: hooks on layers, the identity autograd function, and its leaves.

A tap passes a layer's output through an identity function that keeps a reference to the layer's input. Its
backward hands input and output gradient to rule and reducer and returns their sums as the *gradient* of a
small persistent leaf, so that autograd itself adds them up over micro-batches, checkpoint recomputations
and compiled regions. The gradient of the output goes on unchanged.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gns import reducers
from gns.rules import Rule

if TYPE_CHECKING:
    from gns.collect import Collector


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype that sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


class Tap:
    """One trainable layer: its rule, the parameters it measures, and the leaf that collects their sums.

    Args:
        name: path of the module in the model.
        module: the layer.
        rule: its per-example rule.
        parameters: names of its trainable parameters that the rule knows.
    """

    def __init__(self, name: str, module: nn.Module, rule: Rule, parameters: tuple[str, ...]):
        self.name, self.module, self.rule, self.parameters = name, module, rule, parameters
        self.checks: dict[str, Tensor] = {}  # parameter → leaf of its shape, on self-check steps only
        self.gathers: dict[str, Gather] = {}  # parameter → where its blocks meet, if it has several uses
        self.activation_dtype: torch.dtype | None = None  # of its last input, as the layer saw it
        self.on_leaf: Callable[[Tensor], None] | None = None
        self.on_error: Callable[[Exception], None] | None = None
        self.leaf = self._new_leaf()

    def failed(self, error: Exception) -> None:
        """Hand on an error of a rule or reducer; raise it where nobody handles it."""
        if self.on_error is None:
            raise error
        self.on_error(error)

    def _new_leaf(self) -> Tensor:
        weight = self.parameter(self.parameters[0])
        leaf = torch.zeros(len(self.parameters) + 1, dtype=sum_dtype(weight.dtype), device=weight.device)
        leaf.requires_grad_()
        if self.on_leaf is not None:
            leaf.register_hook(self.on_leaf)  # runs before the leaf's gradient is touched
        return leaf

    def parameter(self, name: str) -> Tensor:
        """Give the parameter as it is now; engines may replace the object."""
        found = self.module._parameters[name]
        assert found is not None
        return found

    def full_name(self, parameter: str) -> str:
        """Name of a parameter in the whole model."""
        return f"{self.name}.{parameter}" if self.name else parameter

    def listen(self, on_leaf: Callable[[Tensor], None] | None) -> None:
        """Let the collector know, inside backward, that sums are about to reach the leaf."""
        self.on_leaf = on_leaf
        self.leaf = self._new_leaf()

    def admits(self, x: Tensor) -> bool:
        """Whether a call on x can be tapped; the same answer in a recomputation, whatever has happened."""
        return x.ndim >= 2 and all(gather.n == x.shape[0] for gather in self.gathers.values())

    def live(self) -> tuple[str, ...]:
        """Name the parameters that train now; some may have been frozen since the tap was made."""
        return tuple(p for p in self.parameters if self.parameter(p).requires_grad)

    def follow_device(self) -> None:
        """Move the leaf to where the layer is now."""
        if self.leaf.device != self.parameter(self.parameters[0]).device:
            self.leaf = self._new_leaf()

    def read(self) -> Tensor:
        """Give what was collected: [P + 1], sums of squared norms and rows seen."""
        found = self.leaf.grad
        sums = torch.zeros_like(self.leaf).detach() if found is None else found.detach()
        if not self.gathers:
            return sums
        parts = [
            self.gathers[p].read() if p in self.gathers else sums[i] for i, p in enumerate(self.parameters)
        ]
        return torch.stack([*parts, sums[-1]])

    def close_checks(self) -> None:
        """Stop collecting Σᵢcᵢ and free it."""
        self.checks = {}

    def drop(self) -> None:
        """Forget what was collected."""
        self.leaf.grad = None
        for gather in self.gathers.values():
            gather.leaf.grad = None
        for check in self.checks.values():
            check.grad = None


class Gather:
    """Where the blocks of a parameter with several uses in one call meet, before they are squared.

    Each call of the model makes one `carrier` of the blocks' shape. All uses return their blocks as its
    gradient; autograd adds them, cross terms included, and the carrier's own backward squares the sum.
    """

    def __init__(self, parameter: Tensor):
        self.shape, self.n = parameter.shape, 0
        self.leaf = torch.zeros(1, dtype=sum_dtype(parameter.dtype), device=parameter.device)
        self.leaf.requires_grad_()
        self.carrier: Tensor | None = None

    def begin(self, n: int) -> None:
        """Start a call of the model on n examples."""
        self.n = n
        self.carrier = _GatherFunction.apply(self.leaf, n, self.shape)

    def end(self) -> None:
        """End the call; recomputation after it finds no carrier."""
        self.carrier = None

    def site(self) -> Tensor:
        """Give what a use of the parameter returns its blocks to.

        A recomputation gets a stand-in: without reentrance only what it saves is used, and with reentrance
        the blocks of different uses cannot meet, which is seen later as a gradient without its examples.
        """
        return self.leaf.detach() if self.carrier is None else self.carrier

    def read(self) -> Tensor:
        """Σ of squared norms collected so far, []."""
        return (
            torch.zeros_like(self.leaf)[0].detach() if self.leaf.grad is None else self.leaf.grad.detach()[0]
        )


class _GatherFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, n: int, shape: torch.Size) -> Tensor:
        return leaf.new_zeros(()).expand(n, *shape)

    @staticmethod
    def backward(ctx: Any, blocks: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return reducers.sq_norm(blocks).reshape(1), None, None


class _TapFunction(torch.autograd.Function):
    """Identity on the output; the sums leave as gradients of the leaves."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, tap: Tap, live: tuple[str, ...], leaf: Tensor, *extra: Tensor
    ) -> Tensor:
        if any(p in tap.rule.needs_input for p in live):  # else the layer itself does not keep x either
            ctx.save_for_backward(x)
        ctx.tap, ctx.live, ctx.dtype, ctx.n_extra = tap, live, leaf.dtype, len(extra)
        ctx.gathered, ctx.checked = tuple(tap.gathers), tuple(tap.checks)
        return out.detach()  # neither a view nor the input itself: users change outputs in place

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors  # to be asked for once only: checkpointing recomputes on demand
        x = saved[0] if saved else dy
        if torch.compiler.is_compiling():
            return dy, None, None, None, *_leaf_gradients(ctx, x, dy)
        try:
            return dy, None, None, None, *_leaf_gradients(ctx, x, dy)
        except Exception as error:  # nothing of ours may reach the user's backward
            ctx.tap.failed(error)
            return (dy, *[None] * (4 + ctx.n_extra))


def _leaf_gradients(ctx: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a tap's leaves: [P + 1] (sums of squared norms, rows), then blocks, then check sums."""
    tap, rule = ctx.tap, ctx.tap.rule
    with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
        rows = torch.full((), dy.shape[0], dtype=ctx.dtype, device=dy.device)
        blocks = [rule.blocks(x, dy, p) for p in ctx.gathered]
        summed = [p for p in ctx.live if p not in ctx.gathered]
        sums = [
            reducers.sum_sq_norms(rule, x, dy, p).to(ctx.dtype) if p in summed else torch.zeros_like(rows)
            for p in tap.parameters
        ]
        totals = [reducers.sum_of_blocks(rule, x, dy, p) for p in ctx.checked]
        return torch.stack([*sums, rows]), *blocks, *totals


class _Hook:
    """A hook that holds one tap or the root; copies and pickles of the model get an inert one."""

    def __init__(self, collector: Collector, tap: Tap | None = None):
        self.collector, self.tap = collector, tap

    def __deepcopy__(self, memo: dict) -> Callable[..., None]:
        return INERT

    def __copy__(self) -> Callable[..., None]:
        return INERT

    def __reduce__(self) -> tuple:
        return functools.partial, (INERT.func, *INERT.args)


# What a copied or unpickled hook becomes. It takes any arguments, returns None and is made of the standard
# library alone: a model that was saved whole while a monitor was attached loads without this package.
INERT = functools.partial(sys.audit, "gns.inert")


class InputHook(_Hook):
    """Cast a layer's input as autocast is about to, so that layer and tap share one saved tensor."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Give the cast arguments, or None to leave them."""
        if not self.collector.active or not torch.is_grad_enabled():
            return None
        x, key = _layer_input(args, kwargs)
        if x is None or not _autocasts(x):
            return None
        cast = x.to(torch.get_autocast_dtype(x.device.type))
        return ((cast, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: cast})


class OutputHook(_Hook):
    """Pass a layer's output through the tap."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Tensor | None:
        """Give the tapped output, or None to leave it."""
        tap, collector = self.tap, self.collector
        assert tap is not None
        compiling = torch.compiler.is_compiling()
        if not torch.is_grad_enabled() or (not compiling and _transformed()):
            return None
        if not collector.active:
            collector.forward_seen()
            return None
        x, _ = _layer_input(args, kwargs)
        if x is None or not isinstance(out, Tensor) or not out.requires_grad:
            return None
        if not compiling:
            collector.note(tap, x)
        live = tap.live()
        if not live or not tap.admits(x):
            return None
        sites = [gather.site() for gather in tap.gathers.values()]
        # outside any guard: checkpointing stops its recomputation by an exception out of this call
        return _TapFunction.apply(out, x, tap, live, tap.leaf, *sites, *tap.checks.values())


class RootInput(_Hook):
    """Tell the collector that a call of the model begins."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Look at the arguments; change nothing."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.collector.call_begins(args, kwargs)


class RootOutput(_Hook):
    """Tell the collector that a call of the model ended, and with which outputs."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        """Look at the outputs; change nothing."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.collector.call_ends(out)


def _layer_input(args: tuple, kwargs: dict) -> tuple[Tensor | None, str | None]:
    """Find the activation among a layer's arguments: the first one, or the only keyword."""
    if args and isinstance(args[0], Tensor):
        return args[0], None
    found = [(v, k) for k, v in kwargs.items() if isinstance(v, Tensor)]
    return found[0] if len(found) == 1 and not args else (None, None)


def _transformed() -> bool:
    """Whether a function transform or a trace is under way, which no tap may enter."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[reportAttributeAccessIssue]
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _autocasts(x: Tensor) -> bool:
    """Whether autocast is about to cast this input."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype is torch.float64:
        return False
    return x.dtype != torch.get_autocast_dtype(kind)


def hooked(model: nn.Module) -> bool:
    """Whether a live hook of a monitor is on any module of the model."""
    hooks = (h for m in model.modules() for h in m._forward_hooks.values())
    return any(isinstance(h, _Hook) for h in hooks)
