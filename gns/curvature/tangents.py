"""Products with the Hessian by a tangent pass forward and an ordinary gradient pass back.

With ẋ the tangents of all intermediates x along v, and λ = ∂L/∂y known at the output of every operation
y = f(x), the change λ̇ of the gradients along v obeys the gradient's own recursion, but for what the
operations' own curvature adds:

    λ̇ₓ = Σ_f f′ᵀ λ̇_y + zₓ      zₓ = ∂⟨λ_y, f′ẋ⟩/∂x      H v = λ̇ at the parameters

So one graph, the gradient's, serves all vectors: v is pushed forward along a tape of its operations
(`gns.curvature.operations`), and the z are given to one pass back. Against differentiating the gradient's
own graph, what is saved is most of what operations without curvature cost, frozen layers above all.

Source: Pearlmutter 1994, Neural Comput. 6:147 (the R-operator).
Slow twin: `gns.curvature.products.Exact`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gns.curvature.operations import Changed, Moved
from gns.curvature.parts import Point
from gns.curvature.tape import NoTape, Tape


class Tangents:
    """Products along a tape of one part's loss.

    Args:
        point: the model.
        batch: the part.

    Raises:
        NoTape: the loss is made of something that cannot be followed, or not differentiated twice.

    Memory: the gradient's graph, about as much again for factors of the operations' rules, and in a product
    once more for z.
    """

    def __init__(self, point: Point, batch: Any):
        self.parameters = dict(point.parameters)
        tape = Tape(self.parameters.values())
        try:
            with sdpa_kernel(SDPBackend.MATH), tape:
                self.loss = point.value(batch)
            self.mass = point.mass()
            tape.check(self.loss)
            self.operations = tape.operations
            self.gradient = self._prepare()
        except (Changed, RuntimeError, NotImplementedError) as error:
            raise _no_tape(error) from error
        self._last = self._last_uses()

    def _prepare(self) -> dict[str, Tensor]:
        """Give every operation its λ, out of one pass back; the gradient is left."""
        wanted = [y for o in self.operations if o.curved for y in o.call.outs]
        ps = list(self.parameters.values())
        found = torch.autograd.grad(self.loss, [*wanted, *ps], retain_graph=True, allow_unused=True)
        slopes = iter(found[: len(wanted)])
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            for o in self.operations:
                if o.curved:
                    o.prepare([next(slopes) for _ in o.call.outs])
        zipped = zip(self.parameters.items(), found[len(wanted) :], strict=True)
        return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zipped}

    def _last_uses(self) -> list[tuple[int, ...]]:
        """By operation, the ids of tensors whose tangent is asked for no more after it."""
        last = {id(x): k for k, o in enumerate(self.operations) for x in o.call.live}
        out: list[list[int]] = [[] for _ in self.operations]
        for key, k in last.items():
            out[k].append(key)
        return [tuple(keys) for keys in out]

    @torch.no_grad()
    def product(self, vector: Mapping[str, Tensor], *, signed: bool = False) -> dict[str, Tensor]:
        """H v."""
        _, bent = self.pushed(vector)
        total = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        own = {id(p): name for name, p in self.parameters.items()}
        for key in own.keys() & bent.keys():
            total[own[key]] += bent.pop(key)[1]
        if bent:
            xs, zs = zip(*bent.values(), strict=True)
            found = torch.autograd.grad(
                xs, list(self.parameters.values()), zs, retain_graph=True, allow_unused=True
            )
            for name, g in zip(self.parameters, found, strict=True):
                if g is not None:
                    total[name] += g
        return total

    def pushed(self, vector: Mapping[str, Tensor]) -> tuple[Tensor | None, dict[int, tuple[Tensor, Tensor]]]:
        """Push a vector forward.

        Returns:
            The loss's tangent ∇L·v, and id → (tensor, z).
        """
        moved: Moved = {id(p): vector[name].to(p) for name, p in self.parameters.items()}
        bent: dict[int, tuple[Tensor, Tensor]] = {}
        for o, done in zip(self.operations, self._last, strict=True):
            if not any(id(x) in moved for x in o.call.live):
                continue
            for x, z in o.push(moved):
                known = bent.get(id(x))
                bent[id(x)] = (x, z if known is None else known[1] + z)
            for key in done:
                moved.pop(key, None)
        return moved.get(id(self.loss)), bent

    def here(self) -> dict[str, Tensor]:
        """The gradient; zero where none arrives."""
        return dict(self.gradient)


def _no_tape(error: Exception) -> Exception:
    return error if "out of memory" in str(error) else NoTape(" ".join(str(error).split())[:160])
