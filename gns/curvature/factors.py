"""Products of two factors on a tape, whose second derivative is the product of both tangents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gns.curvature.operations import Bent, Call, Moved, Operation, fitted, flat, inner, shaped


class Kind:
    """Elementwise products."""

    def times(self, a: Any, b: Any) -> Tensor:
        """a∘b."""
        return a * b

    def both(self, da: Tensor, b: Tensor, a: Tensor, db: Tensor) -> Tensor:
        """ȧ∘b + a∘ḃ."""
        return torch.addcmul(da * b, a, db)

    def in_a(self, bent: Bent, a: Tensor, slope: Tensor, db: Tensor) -> None:
        """Add the gradient of ⟨λ, a∘ḃ⟩ in a."""
        bent.add(a, fitted(slope * db, a))

    def in_b(self, bent: Bent, b: Tensor, slope: Tensor, da: Tensor) -> None:
        """Add the gradient of ⟨λ, ȧ∘b⟩ in b."""
        bent.add(b, fitted(slope * da, b))


class Quotient(Kind):
    """By what does not move."""

    def times(self, a: Any, b: Any) -> Tensor:
        """A / b."""
        return a / b


class Matrix(Kind):
    """a b, of matrices."""

    def times(self, a: Any, b: Any) -> Tensor:
        """A b."""
        return a @ b

    def both(self, da: Tensor, b: Tensor, a: Tensor, db: Tensor) -> Tensor:
        """ȧ b + a ḃ."""
        if a.ndim == b.ndim == 3 and len(a) == len(b):
            return torch.baddbmm(torch.bmm(da, b), a, db)
        return da @ b + a @ db

    def in_a(self, bent: Bent, a: Tensor, slope: Tensor, db: Tensor) -> None:
        """λ ḃᵀ."""
        bent.add(a, fitted(slope @ db.transpose(-1, -2), a))

    def in_b(self, bent: Bent, b: Tensor, slope: Tensor, da: Tensor) -> None:
        """ȧᵀ λ."""
        if b.ndim == 2:
            bent.add(b, flat(da).t() @ flat(slope))
        else:
            bent.add(b, fitted(da.transpose(-1, -2) @ slope, b))


class Rows(Kind):
    """x wᵀ of rows: a linear layer."""

    def times(self, a: Any, b: Any) -> Tensor:
        """X wᵀ."""
        return functional.linear(a, b)

    def both(self, da: Tensor, b: Tensor, a: Tensor, db: Tensor) -> Tensor:
        """ẋ wᵀ + x ẇᵀ."""
        found = functional.linear(a, db)
        found.view(-1, found.shape[-1]).addmm_(flat(da), b.t())
        return found

    def in_a(self, bent: Bent, a: Tensor, slope: Tensor, db: Tensor) -> None:
        """λ ẇ."""
        bent.add_product(a, slope, db)

    def in_b(self, bent: Bent, b: Tensor, slope: Tensor, da: Tensor) -> None:
        """λᵀ ẋ."""
        bent.add(b, flat(slope).t() @ flat(da))


class Product(Operation):
    """c · a∘b + beta · bias, with ∘ elementwise or a matrix product.

    Args:
        call: recorded.
        a: left factor.
        b: right factor.
        kind: of product.
        scale: c.
        bias: what is added, if it moves.
        beta: of the bias.
    """

    def __init__(
        self,
        call: Call,
        a: Any,
        b: Any,
        kind: Kind,
        *,
        scale: float = 1.0,
        bias: Any = None,
        beta: float = 1.0,
    ):
        super().__init__(call)
        self.a, self.b, self.kind, self.scale = a, b, kind, scale
        self.bias, self.beta = bias if call.moves(bias) else None, beta
        self.curved = call.moves(a) and call.moves(b)
        self.slope: Tensor | None = None
        self.shape, self.dtype = call.outs[0].shape, call.outs[0].dtype

    def prepare(self, slopes: Sequence[Tensor | None]) -> None:
        """Keep cλ."""
        (slope,) = slopes
        self.slope = slope if slope is None or self.scale == 1 else self.scale * slope

    def push(self, moved: Moved, bent: Bent) -> None:
        """ẏ = ȧ∘b + a∘ḃ; in a λ∘ḃ, in b ȧ∘λ."""
        da, db = self._forward(moved)
        if self.slope is not None and db is not None:
            self.kind.in_a(bent, self.a, self.slope, db)
        if self.slope is not None and da is not None:
            self.kind.in_b(bent, self.b, self.slope, da)

    def bend(self, moved: Moved) -> Tensor | None:
        """2⟨λ, ȧ∘ḃ⟩, by way of the smaller factor."""
        da, db = self._forward(moved)
        if self.slope is None or da is None or db is None:
            return None
        bent = Bent()
        if self.a.numel() <= self.b.numel():
            self.kind.in_a(bent, self.a, self.slope, db)
            return 2 * inner(bent.sums[id(self.a)], da)
        self.kind.in_b(bent, self.b, self.slope, da)
        return 2 * inner(bent.sums[id(self.b)], db)

    def _forward(self, moved: Moved) -> tuple[Tensor | None, Tensor | None]:
        da, db = moved.get(id(self.a)), moved.get(id(self.b))
        if da is not None and db is not None:
            total = self.kind.both(da, self.b, self.a, db)
        else:
            total = None if da is None else self.kind.times(da, self.b)
            total = self.kind.times(self.a, db) if db is not None else total
        if total is not None and self.scale != 1:
            total = self.scale * total
        if self.bias is not None and (dc := moved.get(id(self.bias))) is not None:
            total = self.beta * dc if total is None else torch.add(total, dc, alpha=self.beta)
        if total is not None:
            self._set(moved, shaped(total, self.shape, self.dtype))
        return da, db
