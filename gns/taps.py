"""What touches modules: a tap on each trainable layer, and the leaves of the identity function in between.

A tap passes a layer's output through an identity function that keeps a reference to the layer's input. Its
backward hands input and output gradient to rule and reducer and returns their sums as the *gradient* of a
small persistent leaf, so that autograd itself adds them up over micro-batches, checkpoint recomputations
and compiled regions. The gradient of the output goes on unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gns import reducers
from gns.capture.gather import Gather, sum_dtype
from gns.capture.placement import Placement, Segments
from gns.metrics import of_blocks
from gns.rules import Rule
from gns.rules.base import parameter_of

if TYPE_CHECKING:
    from gns.capture.tally import Tally


class Tap:
    """One trainable layer: its rule, the parameters it measures, and the leaf that collects their sums.

    Args:
        name: path of the module in the model.
        module: the layer.
        rule: its per-example rule.
        parameters: names of its trainable parameters that the rule knows.
        limit: bytes of per-example gradients alive at once.
        shareable: the model is known to only add the layer's output to something with a batch dimension.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        rule: Rule,
        parameters: tuple[str, ...],
        *,
        limit: int = reducers.MAX_BYTES,
        shareable: bool = False,
    ):
        self.name, self.module, self.rule, self.parameters = name, module, rule, parameters
        self.limit, self.shareable = limit, shareable
        self.needing = frozenset(p for p in parameters if rule.keeps_input_for(p))  # blocks depend on x
        self.checks: dict[str, Tensor] = {}  # parameter → leaf of its shape, on self-check steps only
        self.crossed = False  # a graph of before the step's check leaves ran backward: they miss its sums
        self.contracted: dict[str, Tensor] = {}  # parameter → leaf [K, *shape] of signed sums
        self.gathers: dict[str, Gather] = {}  # parameter → where its blocks meet, if it has several uses
        # parameter → √ of the metric, of this step, where it weighs entries
        self.roots: dict[str, Tensor] = {}
        self.weighed: Tensor | None = None  # leaf of the sums in that metric
        self.left_out: set[str] = set()  # parameters that do not count in the norms of single examples
        self.shares = self.shared = False  # its weight's gradient may come from here in this step; once did
        self._counted: tuple[int, Tensor] | None = None  # rows of the last call, on the device
        self.activation_dtype: torch.dtype | None = None  # of its last input, as the layer saw it
        self.tally: Tally | None = None  # counts its norms together with those of other layers
        self.column = 0  # of its first parameter there
        self.on_leaf: Callable[[Tensor], None] | None = None
        self.on_pass: Callable[[], None] | None = None
        self.on_error: Callable[[Exception], None] | None = None
        self.on_misplaced: Callable[[Tap, Placement], None] | None = None
        self.on_doubled: Callable[[], None] | None = None
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
        return parameter_of(self.module, name)

    def full_name(self, parameter: str) -> str:
        """Name of a parameter in the whole model."""
        return f"{self.name}.{parameter}" if self.name else parameter

    def listen(self, on_leaf: Callable[[Tensor], None] | None, *, weighs: bool = False) -> None:
        """Let the collector know, inside backward, that sums are about to reach the leaf.

        Args:
            on_leaf: what to call then.
            weighs: whether sums in a metric that weighs entries are collected too.
        """
        self.on_leaf = on_leaf
        self.leaf = self._new_leaf()
        self.weighed = self.leaf.detach()[:-1].clone().requires_grad_() if weighs else None

    def admits(self, x: Tensor, where: Placement | None) -> bool:
        """Whether a call on x can be tapped."""
        if where is None:
            return x.ndim >= (1 if self.rule.ids else 2) and not self.gathers
        return where.misfit is None or bool(x.ndim >= 2 or self.rule.ids)

    def sq_norms(
        self, x: Tensor, dy: Tensor, parameter: str, where: Placement, root: Tensor | None = None
    ) -> Tensor:
        """‖cᵢ‖² of the examples of a call (or its rows), [n]; with a root [n, 2], in that metric too."""
        if where.plain:
            return reducers.sq_norms(self.rule, self.module, x, dy, parameter, self.limit, root)
        if where.segments is not None and not self.rule.tokenwise:
            found = self._joined(x, dy, parameter, where.segments, root)
        else:
            found = (
                (reducers.sq_norms(self.rule, self.module, a, b, parameter, self.limit, root), examples)
                for a, b, examples in where.parts(self.rule, x, dy)
            )
        return where.per_example(found, dy.new_zeros(0) if root is None else dy.new_zeros(0, 2))

    def _joined(
        self, x: Tensor, dy: Tensor, parameter: str, segments: Segments, root: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ‖cᵢ‖² of a rule that does not add over positions: its rows are added, then squared."""
        for a, b, examples in segments.parts(x, dy):
            rows = b.shape[1]
            size = max(1, self.limit // (4 * rows * self.parameter(parameter).numel()))
            for xs, dys, at in zip(a.split(size), b.split(size), examples.split(size), strict=True):
                xs, dys = xs.flatten(0, 1), dys.flatten(0, 1)
                blocks = reducers.blocks(self.rule, self.module, xs, dys, parameter)
                yield of_blocks(blocks.unflatten(0, (-1, rows)).sum(1), root), at

    def count(self, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Give a number of rows as a scalar on the device, made once as long as it stays the same."""
        if torch.compiler.is_compiling():
            return torch.full((), rows, dtype=dtype, device=device)
        known = self._counted
        if known is None or known[0] != rows or known[1].dtype != dtype or known[1].device != device:
            known = self._counted = (rows, torch.full((), rows, dtype=dtype, device=device))
        return known[1]

    def carriers(self, where: Placement | None) -> tuple[Tensor, ...]:
        """Give what the call's norms are returned to; empty where they go to leaves of the tap's own."""
        if where is None or where.carriers is None or self.gathers or self.weighed is not None:
            return ()
        return where.carriers.of(self)

    def sites(self, x: Tensor, where: Placement) -> tuple[Tensor, ...]:
        """Give what gathered parameters return their parts to; nothing where rows are no examples."""
        if where.misfit is not None:
            return ()
        return tuple(site for g in self.gathers.values() for site in g.sites(self.rule, x, where))

    def misplaced(self, where: Placement) -> None:
        """Tell, inside backward, that a call ran whose rows are not known to be examples."""
        if self.on_misplaced is not None:
            self.on_misplaced(self, where)

    def live(self) -> tuple[str, ...]:
        """Name the parameters that train now; some may have been frozen since the tap was made."""
        return tuple(p for p in self.parameters if self.parameter(p).requires_grad)

    def follow_device(self) -> None:
        """Move the leaf to where the layer is now."""
        if self.leaf.device != self.parameter(self.parameters[0]).device:
            self.leaf, self.tally = self._new_leaf(), None  # until the next step
            if self.weighed is not None:
                self.weighed = self.leaf.detach()[:-1].clone().requires_grad_()

    @property
    def holds(self) -> bool:
        """Whether there may be sums that no tally counted."""
        return self.leaf.grad is not None or bool(self.gathers)

    def read(self) -> Tensor:
        """Give what its own leaf collected: [P + 1], sums of squared norms and rows seen."""
        found = self.leaf.grad
        sums = torch.zeros_like(self.leaf).detach() if found is None else found.detach()
        if not self.gathers:
            return sums
        parts = [
            self.gathers[p].read() if p in self.gathers else sums[i] for i, p in enumerate(self.parameters)
        ]
        return torch.stack([*parts, sums[-1]])

    def read_weighed(self) -> Tensor:
        """Give what was collected in the metric: [P], sums of squared norms."""
        assert self.weighed is not None
        found = self.weighed.grad
        sums = torch.zeros_like(self.weighed).detach() if found is None else found.detach()
        parts = [
            self.gathers[p].read(1) if p in self.gathers else sums[i] for i, p in enumerate(self.parameters)
        ]
        return torch.stack(parts) if self.gathers else sums

    def open_check(self, parameter: str, leaf: Tensor) -> None:
        """Collect Σᵢcᵢ of a parameter in a leaf, from graphs that are made from now on."""
        self.checks = {
            **self.checks,
            parameter: leaf,
        }  # another object: graphs know the one they were made with
        self.crossed = False

    def cross(self, checks: dict[str, Tensor]) -> None:
        """Note, inside backward, with which check leaves the graph was made that now runs."""
        self.crossed = self.crossed or (checks is not self.checks and bool(self.checks))

    def close_checks(self) -> None:
        """Stop collecting Σᵢcᵢ and free it."""
        self.checks, self.crossed = {}, False

    def drop(self) -> None:
        """Forget what was collected."""
        self.leaf.grad = None
        if self.weighed is not None:
            self.weighed.grad = None
        for gather in self.gathers.values():
            gather.leaf.grad = None
        for leaf in (*self.checks.values(), *self.contracted.values()):
            leaf.grad = None
