"""Products with the Hessian of one part's mean loss: exact, by differencing gradients, or from losses alone.

exact        H v = ∇(∇L · v), on one graph of the gradient that all vectors share
difference   [∇L(w + hv) − ∇L(w − hv)] / 2h, or [∇L(w + hv) − ∇L(w)] / h for vectors of random sign, whose
             error in h is odd in the sign and so averages out
forward      vᵀHv = [L(w + hv) − 2L(w) + L(w − hv)] / h²
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gns.curvature.errors import CurvatureError
from gns.curvature.parts import Point, dots, norm

Vector = Mapping[str, Tensor]
METHODS = ("exact", "difference", "forward")
START = 1e-3  # first trial: a shift of this share of the weights' norm
# Change of the gradient, relative to it, that a step is to make. Differences of gradients,
# which are rounded to 2⁻⁵³, 2⁻²⁴ or 2⁻⁹, bear a small one; second differences of losses, what is left of a
# cancellation, do not.
GRADIENT_CHANGE = {"double": 1e-5, "single": 3e-4, "half": 0.2}
LOSS_CHANGE = {"double": 3e-3, "single": 3e-2, "half": 0.3}
TRIALS = 8


class NoSecondDerivative(CurvatureError):
    """The model has an operation without a second derivative."""


class NoStep(CurvatureError):
    """No step along a vector changes the gradient by a measurable amount."""


class Part(Protocol):
    """One part of the examples for H."""

    mass: float

    def product(self, vector: Vector, *, signed: bool = False) -> dict[str, Tensor]:
        """H v; `signed` vectors have a random sign."""
        ...

    def quadratic(self, vector: Vector) -> np.ndarray:
        """vᵀHv of a vector of random sign: [P] by parameter, or [1] where only the whole is known."""
        ...


class Steps:
    """How far to shift the weights, found on the first vector of each kind and kept: ‖hv‖ = length.

    Args:
        point: whose weights.
    """

    def __init__(self, point: Point):
        self._point = point
        self._weights = norm({name: p.detach() for name, p in point.parameters.items()}) or 1.0
        self._length: dict[str, float] = {}

    @property
    def gradient_change(self) -> float:
        """What a step for a difference of gradients is to change."""
        return GRADIENT_CHANGE[self._point.precision]

    @property
    def loss_change(self) -> float:
        """The same for a second difference of losses."""
        return LOSS_CHANGE[self._point.precision]

    def h(self, kind: str, vector: Vector, change: Callable[[float], float], target: float) -> float:
        """Give the step for a vector.

        Args:
            kind: of vectors that share a length.
            vector: to be scaled.
            change: h → the change of the gradient, relative to it.
            target: the change that is wanted.

        Raises:
            NoStep: no step changes anything, or every one breaks the loss.
        """
        size = norm(vector)
        if kind not in self._length:
            self._length[kind] = self._find(kind, size, change, target)
        return self._length[kind] / size

    def _find(self, kind: str, size: float, change: Callable[[float], float], target: float) -> float:
        length, largest = START * self._weights, math.inf
        for _ in range(TRIALS):
            seen = change(length / size)
            if not math.isfinite(seen):
                largest, length = length, length / 30
                continue
            if target / 5 <= seen <= 5 * target:
                return length
            factor = target / seen if seen > 0 else 30.0
            length = min(length * min(30.0, max(1 / 30, factor)), largest / 3)
            if seen >= target / 300 and 1 / 30 < factor < 30:  # close enough to trust the power law
                return length
        raise NoStep(
            f"no step along a {kind} vector changes the gradient by a measurable amount: the Hessian looks "
            'like zero there; take method="exact"'
        )


class Exact:
    """Products on one graph of the gradient.

    Fused attention has no second derivative; inside, attention runs as plain matrix products.

    Raises:
        NoSecondDerivative: another operation of the model has none.
    """

    def __init__(self, point: Point, batch: Any):
        self.names, ps = list(point.parameters), list(point.parameters.values())
        try:
            with sdpa_kernel(SDPBackend.MATH):
                loss = point.value(batch)
                self.mass = point.mass()
                found = torch.autograd.grad(loss, ps, create_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise _no_second(error) from error
        self.parameters = ps
        self.gradient = [(g, n) for g, n in zip(found, self.names, strict=True) if g is not None]

    def product(self, vector: Vector, *, signed: bool = False) -> dict[str, Tensor]:
        """H v."""
        there = [(g, vector[name].to(g)) for g, name in self.gradient if g.requires_grad]
        found: tuple[Tensor | None, ...] = (None,) * len(self.names)
        if there:
            outputs, weights = zip(*there, strict=True)
            try:
                found = torch.autograd.grad(
                    outputs, self.parameters, weights, retain_graph=True, allow_unused=True
                )
            except RuntimeError as error:
                raise _no_second(error) from error
        zipped = zip(self.names, self.parameters, found, strict=True)
        return {name: torch.zeros_like(p) if g is None else g.detach() for name, p, g in zipped}

    def quadratic(self, vector: Vector) -> np.ndarray:
        """vᵀHv by parameter, [P]."""
        return np.array(dots(vector, self.product(vector, signed=True)))


def _no_second(error: RuntimeError) -> Exception:
    text = " ".join(str(error).split())
    known = (
        "not implemented",
        "once_differentiable",
        "does not require grad",
        "does not support",
        "not supported",
        "double backward",
        "checkpoint",
        "inference",
    )
    if "out of memory" in text or not any(word in text for word in known):
        return error
    return NoSecondDerivative(
        f"an operation of the model has no second derivative ({text[:160]}); take method='difference', which "
        "needs none"
    )


class Difference:
    """Products from two gradients."""

    def __init__(self, point: Point, batch: Any, steps: Steps):
        self.point, self.batch, self.steps = point, batch, steps
        self.here = point.gradient(batch)
        self.mass = point.mass()

    def _there(self, vector: Vector, h: float) -> dict[str, Tensor]:
        with self.point.shifted(vector, h):
            return self.point.gradient(self.batch)

    def change(self, vector: Vector, h: float) -> float:
        """‖∇L(w + hv) − ∇L(w)‖ / ‖∇L(w)‖."""
        there, size = self._there(vector, h), norm(self.here)
        return norm({name: g.double() - self.here[name].double() for name, g in there.items()}) / (
            size or 1.0
        )

    def product(self, vector: Vector, *, signed: bool = False) -> dict[str, Tensor]:
        """H v."""
        if not norm(vector) > 0:
            return {name: torch.zeros_like(v) for name, v in vector.items()}
        kind = "random" if signed else "mean"
        h = self.steps.h(kind, vector, lambda h: self.change(vector, h), self.steps.gradient_change)
        ahead = self._there(vector, h)
        one_sided = signed and self.point.precision != "half"
        behind, width = (self.here, h) if one_sided else (self._there(vector, -h), 2 * h)
        wide = torch.promote_types
        return {
            name: (g.to(wide(g.dtype, torch.float32)) - behind[name].to(wide(g.dtype, torch.float32))) / width
            for name, g in ahead.items()
        }

    def quadratic(self, vector: Vector) -> np.ndarray:
        """vᵀHv by parameter, [P]."""
        return np.array(dots(vector, self.product(vector, signed=True)))


class Forward:
    """vᵀHv from losses at three points; H v, which they do not give, by differencing."""

    def __init__(self, point: Point, batch: Any, steps: Steps):
        self.point, self.batch, self.steps = point, batch, steps
        self.gradients = Difference(point, batch, steps)
        self.mass = self.gradients.mass
        self.here = point.forward_value(batch)

    def product(self, vector: Vector, *, signed: bool = False) -> dict[str, Tensor]:
        """H v."""
        return self.gradients.product(vector, signed=signed)

    def _second(self, vector: Vector, h: float) -> float:
        values = []
        for sign in (1, -1):
            with self.point.shifted(vector, sign * h):
                values.append(self.point.forward_value(self.batch))
        return values[0] - 2 * self.here + values[1]

    def quadratic(self, vector: Vector) -> np.ndarray:
        """vᵀHv, [1]."""
        if not norm(vector) > 0:
            return np.zeros(1)
        h = self.steps.h("loss", vector, lambda h: self.gradients.change(vector, h), self.steps.loss_change)
        return np.array([self._second(vector, h) / h**2])
