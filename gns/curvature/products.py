"""Products with the Hessian of one part's mean loss: exact, by differencing gradients, or from losses alone.

exact        H v = ∇(∇L · v), on one graph of the gradient that all vectors share
difference   [∇L(w + hv) − ∇L(w − hv)] / 2h, or [∇L(w + hv) − ∇L(w)] / h for vectors of random sign, whose
             error in h is odd in the sign and so averages out
forward      vᵀHv = [L(w + hv) − 2L(w) + L(w − hv)] / h², or 2 [L(w + hv) − L(w) − h ∇L·v] / h² for the same
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gns.curvature.errors import CurvatureError
from gns.curvature.parts import Point, dots, norm
from gns.curvature.smooth import Smooth

Vector = Mapping[str, Tensor]
METHODS = ("exact", "difference", "forward")
# Change of the gradient, relative to it, that a step is to make. Differences of gradients,
# which are rounded to 2⁻⁵³, 2⁻²⁴ or 2⁻⁹, bear a small one; second differences of losses, what is left of a
# cancellation, do not.
GRADIENT_CHANGE = {"double": 1e-5, "single": 3e-4, "half": 0.2}
LOSS_CHANGE = 0.3  # the same for 16 bits; wider ones are judged by the losses
# First trials: shifts of these shares of the weights' norm. On the shipped base model a small shift changes
# the gradient by about 10 times its share, so the first one for gradients will do.
START = {"double": 1e-6, "single": 3e-5, "half": 1e-3}
START_LOSS = 1e-3
# Of second differences of losses where one side stands for both: the odd part that is aimed at, relative to
# the even one, and rounding that is put up with. Both average out over signs, and are in the probes' spread.
ODD = {"double": 0.005, "single": 0.02}
NOISE = 0.01
FOURTH = 2.5  # error of both sides' difference in squares of odd / even: 0.022 at 0.095, 0.08 at 0.185 (base)
SILENT = 1e3  # steps shorter by this factor show nothing but rounding and the slope
TRIALS = 8
TINY = 1e-12


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


@dataclass
class _Search:
    """The length of a step, being found."""

    length: float
    largest: float = math.inf  # steps this long break the loss
    trials: int = 0
    settled: bool = False


class Steps:
    """How far to shift the weights, found on the first vector of each kind and kept: ‖hv‖ = length.

    The first trial is a share of the weights' norm. What it shows is used if it will do, so that a search
    that starts well costs nothing.

    Args:
        point: whose weights.
    """

    def __init__(self, point: Point):
        self._point = point
        self._weights = norm({name: p.detach() for name, p in point.parameters.items()}) or 1.0
        self._found: dict[str, _Search] = {}
        self.one_sided = False  # second differences of losses

    def length(self, kind: str) -> float:
        """Give the length to take, or to try next, for vectors of a kind."""
        if kind not in self._found:
            share = START_LOSS if kind == "loss" else START[self._point.precision]
            self._found[kind] = _Search(share * self._weights)
        return self._found[kind].length

    def settled(self, kind: str) -> bool:
        """Whether the length is found."""
        return kind in self._found and self._found[kind].settled

    def judge(self, kind: str, seen: float) -> bool:
        """Say whether the step that was tried will do; if not, the next length is another.

        Args:
            kind: of the vector.
            seen: change of the gradient that the step made, relative to it.

        Raises:
            NoStep: no step changes anything, or every one breaks the loss.
        """
        search = self._found[kind]
        target = LOSS_CHANGE if kind == "loss" else GRADIENT_CHANGE[self._point.precision]
        search.trials += 1
        if not math.isfinite(seen):
            search.largest, search.length = search.length, search.length / 30
        elif target / 5 <= seen <= 5 * target:
            search.settled = True
            return True
        else:
            factor = target / seen if seen > 0 else 30.0
            search.length = min(search.length * min(30.0, max(1 / 30, factor)), search.largest / 3)
            # close enough to trust the power law
            search.settled = seen >= target / 300 and 1 / 30 < factor < 30
        if search.trials >= TRIALS and not search.settled:
            raise NoStep(
                f"no step along a {kind} vector changes the gradient by a measurable amount: the Hessian "
                'looks like zero there; take method="exact"'
            )
        return False

    def judge_losses(self, odd: float, even: float, noise: float) -> None:
        """Choose the length and the sides of second differences of losses by what a trial showed.

        With a step f times as long odd / even is f times as large, noise / even 1 / f² times.

        Args:
            odd: what the loss changes by beyond its slope, the part that is odd in the step.
            even: the even part, half a second difference.
            noise: what rounding alone changes.
        """
        search, limit = self._found["loss"], ODD[self._point.precision]
        search.trials += 1
        if not math.isfinite(odd + even):
            search.largest, search.length = search.length, search.length / 30
            search.settled = search.trials >= TRIALS
            return
        odd, noise = (max(v / even if even > 0 else math.inf, TINY) for v in (odd, noise))
        factor = 1.0 if odd <= 1.5 * limit and noise <= NOISE else limit / odd
        self.one_sided = noise / factor**2 <= NOISE if factor > 0 else False
        if not self.one_sided:
            factor = (noise / (FOURTH * odd**2)) ** 0.25 if math.isfinite(odd) else 30.0
        factor = min(30.0, max(1 / 30, factor))
        search.length = min(search.length * factor, search.largest / 3)
        search.settled = 1 / 5 <= factor <= 5 or search.trials >= TRIALS


class Exact:
    """Products on one graph of the gradient.

    Fused attention has no second derivative; inside, attention runs as plain matrix products.
    See `gns.curvature.smooth` for what else is called otherwise.

    Raises:
        NoSecondDerivative: another operation of the model has none.
    """

    def __init__(self, point: Point, batch: Any):
        self.names, ps = list(point.parameters), list(point.parameters.values())
        try:
            with sdpa_kernel(SDPBackend.MATH), Smooth():
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

    def here(self) -> dict[str, Tensor]:
        """The gradient; zero where none arrives."""
        found = {name: torch.zeros_like(p) for name, p in zip(self.names, self.parameters, strict=True)}
        return found | {name: g.detach() for g, name in self.gradient}


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
    """Products from two gradients.

    Args:
        point: the model.
        batch: the part.
        steps: lengths of steps, shared by all parts.
        here: the gradient of the part, if it is known.
    """

    def __init__(self, point: Point, batch: Any, steps: Steps, here: Vector | None = None):
        self.point, self.batch, self.steps = point, batch, steps
        self.here = point.gradient(batch) if here is None else here
        self.mass = point.mass()
        self._size = norm(self.here) or 1.0

    def _there(self, vector: Vector, h: float) -> dict[str, Tensor]:
        with self.point.shifted(vector, h):
            return self.point.gradient(self.batch)

    def _moved(self, kind: str, vector: Vector) -> tuple[float, dict[str, Tensor]]:
        """A step of a good length, and the gradient after it."""
        size = norm(vector)
        while True:
            h, known = self.steps.length(kind) / size, self.steps.settled(kind)
            there = self._there(vector, h)
            if known or self.steps.judge(kind, self._change(there)):
                return h, there

    def _change(self, there: Vector) -> float:
        """‖∇L(w + hv) − ∇L(w)‖ / ‖∇L(w)‖."""
        return norm({name: g.double() - self.here[name].double() for name, g in there.items()}) / self._size

    def settle(self, kind: str, vector: Vector) -> float:
        """Give the step for a vector, from what steps along the first of its kind change."""
        size = norm(vector)
        while not self.steps.settled(kind):
            self.steps.judge(kind, self._change(self._there(vector, self.steps.length(kind) / size)))
        return self.steps.length(kind) / size

    def ahead(self, vector: Vector, kind: str = "mean") -> dict[str, Tensor]:
        """H v from one gradient beside the one here, at the price of an error of first order in the step."""
        h, there = self._moved(kind, vector)
        return _slope(there, self.here, h)

    def product(self, vector: Vector, *, signed: bool = False) -> dict[str, Tensor]:
        """H v."""
        if not norm(vector) > 0:
            return {name: torch.zeros_like(v) for name, v in vector.items()}
        if signed and self.point.precision != "half":
            return self.ahead(vector, "random")
        h, there = self._moved("random" if signed else "mean", vector)
        return _slope(there, self._there(vector, -h), 2 * h)


def _slope(ahead: Vector, behind: Vector, width: float) -> dict[str, Tensor]:
    """(ahead − behind) / width, in float32 or wider."""
    out = {}
    for name, g in ahead.items():
        wide = torch.promote_types(g.dtype, torch.float32)
        out[name] = (g.to(wide) - behind[name].to(wide)) / width
    return out


class Forward:
    """vᵀHv from losses; H v, which they do not give, by differencing.

    For vectors of random sign the loss behind is not asked for where the third derivative is small: what it
    takes off, the slope ∇L·v, is known from the one gradient here, and the rest is odd in the sign.
    """

    def __init__(self, point: Point, batch: Any, steps: Steps):
        self.point, self.batch, self.steps = point, batch, steps
        self.gradients = Difference(point, batch, steps)
        self.mass = self.gradients.mass
        self.here = point.forward_value(batch)

    def product(self, vector: Vector, *, signed: bool = False) -> dict[str, Tensor]:
        """H v; one gradient beside the one here will do, where it is not rounded much."""
        if signed or self.point.precision == "half" or not norm(vector) > 0:
            return self.gradients.product(vector, signed=signed)
        return self.gradients.ahead(vector)

    def quadratics(self, vectors: Sequence[Vector]) -> np.ndarray:
        """vᵀHv of vectors of random sign, [S, 1]."""
        if self.point.precision != "half":
            self._settle([v for v in vectors if norm(v) > 0][:2])
        return np.array([[self._quadratic(v)] for v in vectors])

    def _quadratic(self, vector: Vector) -> float:
        size = norm(vector)
        if not size > 0:
            return 0.0
        if self.point.precision == "half":  # no gradient is good enough to stand for a loss
            h = self.gradients.settle("loss", vector)
        else:
            h = self.steps.length("loss") / size
        if not self.steps.one_sided:
            return 2 * self._odd_even(vector, h)[1] / h**2
        return 2 * (self._loss(vector, h) - self.here - h * self._slope(vector)) / h**2

    def _loss(self, vector: Vector, h: float) -> float:
        with self.point.shifted(vector, h):
            return self.point.forward_value(self.batch)

    def _slope(self, vector: Vector) -> float:
        return float(dots(self.gradients.here, vector).sum())

    def _odd_even(self, vector: Vector, h: float) -> tuple[float, float]:
        """What the loss changes by beyond its slope: its part that is odd in h, and its even part."""
        ahead, behind = self._loss(vector, h), self._loss(vector, -h)
        return (ahead - behind) / 2 - h * self._slope(vector), (ahead - 2 * self.here + behind) / 2

    def _settle(self, tried: Sequence[Vector]) -> None:
        """Find the length of the step, from losses along some vectors, unless it is known."""
        while tried and not self.steps.settled("loss"):
            length = self.steps.length("loss")
            found = [self._odd_even(v, length / norm(v)) for v in tried]
            least = length / SILENT
            noise = [
                self._loss(v, least / norm(v)) - self.here - least / norm(v) * self._slope(v) for v in tried
            ]
            odd, even = np.sqrt(np.mean(np.square(found), axis=0))
            self.steps.judge_losses(float(odd), float(even), float(np.sqrt(np.mean(np.square(noise)))))
