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

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gns.curvature.operations import Bent, Call, Moved, Operation
from gns.curvature.parts import Point
from gns.curvature.rulebook import operation
from gns.curvature.tape import NoTape, Tape
from gns.curvature.vectors import dots, norm

# Between ∇L·v pushed along the tape and by the gradient, relative to ‖∇L‖‖v‖: more is an operation left out.
SLOPE_RTOL = {"double": 1e-5, "single": 1e-4, "half": 0.1}  # a "double" model may take norms in float32

# of a rule that meets a call it was not made for: there is another way, so none of them is the user's
_FAILS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


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
        self._rtol: float | None = SLOPE_RTOL[point.precision]  # None: the tape was checked
        tape = Tape(self.parameters.values())
        try:
            with sdpa_kernel(SDPBackend.MATH), tape:
                self.loss = point.value(batch)
            self.mass = point.mass()
            tape.check(self.loss)
        except RuntimeError as error:
            raise _no_tape(error) from error
        if not self.mass > 0:
            return  # there is nothing to multiply with
        try:
            self.operations = [operation(call) for call in _needed(tape.calls, self.loss)]
            self.gradient = self._prepare()
        except _FAILS as error:
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
        """H v.

        Raises:
            NoTape: an operation cannot be differentiated twice, or the tape misses one.
        """
        try:
            return self._product(vector)
        except _FAILS as error:
            raise _no_tape(error) from error

    def _product(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        slope, bent = self.pushed(vector)
        self._check(slope, vector)
        total = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        own = {id(p): name for name, p in self.parameters.items()}
        for key in own.keys() & bent.sums.keys():
            total[own[key]] += bent.sums.pop(key)
        if bent.sums:
            xs, zs = [bent.tensors[key] for key in bent.sums], list(bent.sums.values())
            found = torch.autograd.grad(
                xs, list(self.parameters.values()), zs, retain_graph=True, allow_unused=True
            )
            for name, g in zip(self.parameters, found, strict=True):
                if g is not None:
                    total[name] += g
        return total

    def _check(self, slope: Tensor | None, vector: Mapping[str, Tensor]) -> None:
        """Compare ∇L·v by both ways, once: what the tape leaves out would be missing in one."""
        if self._rtol is None:
            return
        found = 0.0 if slope is None else float(slope)
        size = norm(self.gradient) * norm(vector)
        if abs(found - float(dots(self.gradient, vector).sum())) > self._rtol * size:  # NaN is said later
            raise NoTape("the tape's slope is not the gradient's")
        self._rtol = None

    def pushed(self, vector: Mapping[str, Tensor]) -> tuple[Tensor | None, Bent]:
        """Push a vector forward.

        Returns:
            The loss's tangent ∇L·v, and z by tensor.
        """
        bent = Bent()
        return self._walk(vector, lambda o, moved: o.push(moved, bent)), bent

    @torch.no_grad()
    def quadratic(self, vector: Mapping[str, Tensor]) -> float:
        """vᵀHv = Σ_f ⟨λ_y, f″[ẋ, ẋ]⟩, without a pass back.

        Raises:
            NoTape: an operation cannot be differentiated twice, or the tape misses one.
        """
        found: list[Tensor] = []

        def bend(o: Operation, moved: Moved) -> None:
            if (term := o.bend(moved)) is not None:
                found.append(term.double())

        try:
            self._check(self._walk(vector, bend), vector)
        except _FAILS as error:
            raise _no_tape(error) from error
        return float(torch.stack(found).sum()) if found else 0.0

    def _walk(self, vector: Mapping[str, Tensor], visit: Callable[[Operation, Moved], None]) -> Tensor | None:
        """Visit the operations that a vector moves, in their order; give the loss's tangent."""
        moved: Moved = {id(p): vector[name].to(p) for name, p in self.parameters.items()}
        for o, done in zip(self.operations, self._last, strict=True):
            if any(id(x) in moved for x in o.call.live):
                visit(o, moved)
            for key in done:
                moved.pop(key, None)
        return moved.get(id(self.loss))

    def here(self) -> dict[str, Tensor]:
        """The gradient; zero where none arrives."""
        return dict(self.gradient)


def _needed(calls: Sequence[Call], loss: Tensor) -> list[Call]:
    """The calls that the loss depends on: what a model only reports may have no second derivative."""
    wanted, found = {id(loss)}, []
    for call in reversed(calls):
        if any(id(y) in wanted for y in call.outs):
            found.append(call)
            wanted |= {id(x) for x in call.live}
    return found[::-1]


def _no_tape(error: Exception) -> NoTape:
    """The same as a reason to go the other way; want of memory is one, that way needs less."""
    return NoTape(" ".join(str(error).split())[:160])
