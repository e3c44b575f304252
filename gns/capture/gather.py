"""Where the blocks of a parameter with several uses in one call meet, so that cross terms are not lost.

Squared norms of uses do not add: on a tied Llama they are 5–12 % off. Each call of the model makes
*carriers*: every use returns what it has as a carrier's gradient, autograd adds these up, and the carriers'
own backward squares the sum and returns it as the gradient of a persistent leaf, and example by example as
that of the call's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gns import reducers
from gns.capture.placement import Placement
from gns.metrics import of_blocks
from gns.reasons import TOO_LARGE
from gns.rules import Rule
from gns.rules.base import wide
from gns.rules.embedding import rows_of, table_sq_norms


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype that sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


class Gather:
    """All uses return their blocks, [n, *shape], to one carrier.

    A recomputation finds no carrier and gets a stand-in: without reentrance only what it saves is used, and
    with reentrance the blocks of different uses cannot meet, which is seen later as a gradient without its
    examples.

    Args:
        parameter: the parameter.
        limit: bytes of blocks that may be alive.
    """

    def __init__(self, parameter: Tensor, limit: int = reducers.MAX_BYTES):
        self.shape, self.limit, self.n = parameter.shape, limit, 0
        self.leaf = torch.zeros(2, dtype=sum_dtype(parameter.dtype), device=parameter.device)
        self.leaf.requires_grad_()
        self.carriers: tuple[Tensor, ...] | None = None
        self.refusal: str | None = None  # why the uses of the call under way cannot meet
        self.outgrown = False  # the uses need the general form of this class
        self.root: Tensor | None = None  # √ of the metric, of this step, where it weighs entries
        self.left_out = False  # it does not count in the norms of single examples

    def begin(self, n: int, each: Tensor | None) -> None:
        """Start a call of the model on n examples, with its leaf for their squared norms."""
        self.n = n
        fits = self.leaf.element_size() * n * self.shape.numel() <= self.limit
        self.refusal = None if fits else TOO_LARGE.format(limit=self.limit)
        self.carriers = (_SquareOfSum.apply(self.leaf, each, self),) if fits else None

    def end(self) -> None:
        """End the call; recomputation after it finds no carrier."""
        self.carriers = None

    def sites(self, rule: Rule, x: Tensor, where: Placement) -> tuple[Tensor, ...]:
        """Give what a use of the parameter returns its blocks to."""
        return (self.leaf.detach(),) if self.carriers is None else self.carriers

    def note(self, rule: Rule) -> Any:
        """Give what a use must remember of the call for its backward."""
        return None

    def contribute(
        self, rule: Rule, layer: nn.Module, x: Tensor, dy: Tensor, local: str, where: Placement, noted: Any
    ) -> tuple[Tensor | None, ...]:
        """Give the gradients of the carriers that come from one use."""
        parts = (
            (reducers.blocks(rule, layer, a, b, local), examples)
            for a, b, examples in where.parts(rule, x, dy)
        )
        return (where.per_example(parts, None),)

    def leaf_gradients(self, sq_norms: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give ‖cᵢ‖² [n], or [n, 2] with those in the metric, as gradients of own leaf and call's."""
        found = sq_norms.to(self.leaf.dtype).reshape(len(sq_norms), -1)
        sums = nn.functional.pad(found.sum(0), (0, 2 - found.shape[1]))
        return sums, None if self.left_out else found[:, -1]

    def read(self, column: int = 0) -> Tensor:
        """Σ of squared norms collected so far, [], as they are or (1) in the metric."""
        found = torch.zeros_like(self.leaf) if self.leaf.grad is None else self.leaf.grad
        return found.detach()[column]


class _SquareOfSum(torch.autograd.Function):
    """Makes a carrier of blocks [n, *shape]; its gradient's squared norms become the leaves'."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, each: Tensor | None, gather: Gather) -> Tensor:
        """Give the carrier, [n, *shape]: zeros, as nobody reads it."""
        ctx.gather = gather
        return leaf.new_zeros(()).expand(gather.n, *gather.shape)

    @staticmethod
    def backward(ctx: Any, blocks: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Give the squared norms of the uses' sum, [n, *shape], to the leaves."""
        return *ctx.gather.leaf_gradients(of_blocks(blocks, ctx.gather.root)), None


class _Norms(torch.autograd.Function):
    """Makes a carrier of squared norms [n]; its gradient becomes the leaves'."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, each: Tensor | None, gather: Gather) -> Tensor:
        """Give the carrier, [n]: zeros, as nobody reads it."""
        ctx.gather = gather
        return leaf.new_zeros(gather.n)

    @staticmethod
    def backward(ctx: Any, sq_norms: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Give squared norms, [n], to the leaves."""
        return *ctx.gather.leaf_gradients(sq_norms), None


class EmbeddingTie(Gather):
    """An embedding and a linear head on one table [V, D], without forming [n, V, D].

    ‖E + H‖² = ‖E‖² + ‖H‖² + 2⟨E, H⟩,   ⟨E, H⟩ = Σ_tu dl_u[id_t] (dy_t · x_u) = Σ_t dy_t · p_t,

    E = Σ_t e_{id_t} dy_tᵀ from the embedding (ids, dy), H = Σ_u dl_u x_uᵀ from the head (input x, logit
    gradient dl), p_t = Σ_u dl_u[id_t] x_u: T² numbers an example. The head returns ‖H‖² and p, the embedding
    its dy; the carriers' backward joins them. It serves one use of each in a call, the embedding's first;
    else it is outgrown.

    Args:
        parameter: the table.
        embedding: rule of the embedding.
        padding: its padding id, which has no gradient.
        limit: bytes that may be alive.
    """

    def __init__(
        self, parameter: Tensor, embedding: Rule, padding: int | None, limit: int = reducers.MAX_BYTES
    ):
        super().__init__(parameter, limit)
        self.embedding, self.padding = embedding, padding
        self.call: tuple[Tensor, Placement] | None = None  # ids and placement of the call under way
        self.used: list[bool] = []  # the uses in the call under way: whether each is the embedding's
        self.open, self.each = False, None

    def begin(self, n: int, each: Tensor | None) -> None:
        """Start a call of the model on n examples; its carriers are made when the table is used."""
        self.n, self.carriers, self.call, self.used, self.open = n, None, None, [], True
        self.each = each

    def end(self) -> None:
        """End the call; recomputation after it finds no carrier."""
        self.carriers, self.each, self.open = None, None, False

    def sites(self, rule: Rule, x: Tensor, where: Placement) -> tuple[Tensor, ...]:
        """Give what a use of the table returns its part to."""
        stand_in = self.leaf.detach()
        if not self.open:
            return stand_in, stand_in, stand_in
        self.used.append(rule.ids)
        self.outgrown |= self.used not in ([True], [True, False], [False])
        if self.used == [True]:
            self.call = x, where
            self.carriers = _Joined.apply(self.leaf, self.each, self, x, where)
        elif self.used == [False]:  # a model that is given embeddings uses the head alone
            self.carriers = _Norms.apply(self.leaf, self.each, self), stand_in, stand_in
        return self.carriers if self.carriers is not None else (stand_in, stand_in, stand_in)

    def note(self, rule: Rule) -> Any:
        """Give the call's ids and placement, which the head needs in its backward."""
        return None if rule.ids else self.call

    def contribute(
        self, rule: Rule, layer: nn.Module, x: Tensor, dy: Tensor, local: str, where: Placement, noted: Any
    ) -> tuple[Tensor | None, ...]:
        """Give the gradients of the carriers ‖H‖² [n], p [R, T, D], dy [R, T, D]."""
        if rule.ids:
            _, rows = rows_of(x, dy, self.padding)
            return None, None, (rows * rule.scale if rule.scaled else rows).reshape(dy.shape)
        parts = (
            (reducers.sq_norms(rule, layer, a, b, local, self.limit), examples)
            for a, b, examples in where.parts(rule, x, dy)
        )
        head = where.per_example(parts, dy.new_zeros(0)).to(self.leaf.dtype)
        if noted is None:
            return head, None, None
        ids, placed = noted
        return head, self._picked(ids, placed, rule, x, dy, where), None

    def _picked(
        self, ids: Tensor, placed: Placement, rule: Rule, x: Tensor, dl: Tensor, where: Placement
    ) -> Tensor:
        """p_t = Σ_u dl_u[id_t] x_u over the positions u of t's own example, [*ids.shape, D]."""
        out = wide(x).new_zeros(ids.numel(), x.shape[-1])
        places = torch.arange(1, ids.numel() + 1, device=ids.device).reshape(ids.shape)
        heads, tokens = where.parts(rule, x, dl), placed.parts(self.embedding, ids, places)
        for (a, b, _), (i, at, _) in zip(heads, tokens, strict=True):
            a, b = (t.reshape(len(t), -1, t.shape[-1]) for t in (a, b))
            i, at = i.reshape(len(i), -1), at.reshape(len(at), -1)
            index = i.unsqueeze(1).expand(-1, b.shape[1], -1)
            found = torch.bmm(wide(b.gather(2, index)).mT, wide(a))
            real = at > 0  # beyond an example's length there is a 0
            out.index_add_(0, (at - 1).clamp(min=0).flatten(), (found * real.unsqueeze(-1)).flatten(0, 1))
        return out.reshape(*ids.shape, -1)


class _Joined(torch.autograd.Function):
    """Makes the carriers of a tie; their gradients ‖H‖², p and dy become ‖E + H‖² on the leaf."""

    @staticmethod
    def forward(
        ctx: Any, leaf: Tensor, each: Tensor | None, tie: EmbeddingTie, ids: Tensor, where: Placement
    ) -> tuple[Tensor, ...]:
        """Give the carriers of ‖H‖² [n], p and dy, both [*ids.shape, D]: zeros, as nobody reads them."""
        ctx.tie, ctx.ids, ctx.where = tie, ids, where
        ctx.set_materialize_grads(False)
        flat, shape = leaf.new_zeros(()), (*ids.shape, tie.shape[1])
        return leaf.new_zeros(where.n), flat.expand(shape), flat.clone().expand(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Give ‖E + H‖² of the examples, summed, as gradients of the tie's own leaf and the call's."""
        head, p, dy = gradients
        tie, where = ctx.tie, ctx.where
        total = tie.leaf.new_zeros(where.n) if head is None else head
        if dy is not None:
            own = _of_embedding(tie, where, ctx.ids, dy)
            total = total + where.per_example(own, dy.new_zeros(0)).to(total.dtype)
            if p is not None:
                cross = (dy * p).sum(-1, keepdim=True)
                parts = ((c.flatten(1).sum(1), at) for _, c, at in where.parts(tie.embedding, ctx.ids, cross))
                total = total + 2 * where.per_example(parts, dy.new_zeros(0)).to(total.dtype)
        return *tie.leaf_gradients(total), None, None, None


def _of_embedding(
    tie: EmbeddingTie, where: Placement, ids: Tensor, dy: Tensor
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield ‖E‖² of a call's examples, with their numbers."""
    for i, rows, examples in where.parts(tie.embedding, ids, dy):
        i = i.reshape(len(i), -1)
        yield table_sq_norms(i, rows.reshape(*i.shape, -1), tie.limit), examples
