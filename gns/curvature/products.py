"""Products with the Hessian of one part's mean loss: exact, by differencing gradients, or from losses alone.

exact        H v = ∇(∇L · v), on one graph of the gradient that all vectors share; vᵀHv alone, where a
             model allows it, comes cheaper from `gns.curvature.tangents`
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
from gns.curvature.parts import Point, label_kind
from gns.curvature.smooth import Smooth
from gns.curvature.steps import Steps
from gns.curvature.vectors import along, norm

Vector = Mapping[str, Tensor]
METHODS = ("exact", "difference", "forward")
SILENT = 1e3  # steps shorter by this factor show nothing but rounding and the slope
# Between what a step changes a model's own loss and our token mean by: more is another loss. Own ones of
# models in float64 are in float32 too.
MOVES_RTOL, OWN_ROUNDING = 0.01, 2.0**-20


OTHERWISE = "take method='difference', which needs none"


class NoSecondDerivative(CurvatureError):
    """The model has an operation without a second derivative."""


HIDDEN = (
    "`{name}` has a gradient in backward() and none on the graph of torch.autograd.grad, which second "
    "derivatives are made from: reentrant gradient checkpointing? Turn checkpointing off for the reading, or "
)


class Part(Protocol):
    """One part of the examples for H."""

    mass: float

    def product(self, vector: Vector, *, signed: bool = False) -> dict[str, Tensor]:
        """H v; `signed` vectors have a random sign."""
        ...


class Exact:
    """Products on one graph of the gradient.

    Fused attention has no second derivative; inside, attention runs as plain matrix products.
    See `gns.curvature.smooth` for what else is called otherwise.

    Raises:
        NoSecondDerivative: another operation of the model has none, or gradients come past the graph.
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
        lost = [name for g, name in zip(found, self.names, strict=True) if g is None]
        if (name := point.hidden(batch, lost)) is not None:
            raise NoSecondDerivative(HIDDEN.format(name=name) + OTHERWISE)
        self.parameters = ps
        self.gradient = [(g, n) for g, n in zip(found, self.names, strict=True) if g is not None]

    def product(self, vector: Vector, *, signed: bool = False) -> dict[str, Tensor]:
        """H v."""
        there = [(g, vector[name].to(g)) for g, name in self.gradient if g.requires_grad]
        found: tuple[Tensor | None, ...] = (None,) * len(self.names)
        if there:
            outputs, weights = zip(*there, strict=True)
            try:
                with sdpa_kernel(SDPBackend.MATH), Smooth():  # checkpointed layers are called anew in here
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


def without_second(error: RuntimeError) -> str | None:
    """What an error says, if it is that something has no second derivative; None of any other."""
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
        return None
    return f"an operation of the model has no second derivative ({text[:160]})"


def _no_second(error: RuntimeError) -> Exception:
    said = without_second(error)
    return error if said is None else NoSecondDerivative(f"{said}; {OTHERWISE}")


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


@dataclass(frozen=True)
class _Ray:
    """A vector of random sign, its norm, and the slope ∇L·v of the loss along it."""

    vector: Vector
    size: float
    slope: float


class Forward:
    """vᵀHv from losses; H v, which they do not give, by differencing.

    For vectors of random sign the loss behind is not asked for where the third derivative is small: what it
    takes off, the slope ∇L·v, is known from the one gradient here, and the rest is odd in the sign.
    """

    def __init__(self, point: Point, batch: Any, steps: Steps):
        self.point, self.batch, self.steps = point, batch, steps
        self.gradients = Difference(point, batch, steps)
        self.mass = self.gradients.mass
        self._own = point.last_value(wide=False)
        self._wide = steps.wide and point.adds_up()
        self._stand(self._stands())
        self.rounding = 0.0  # in the sum of all vᵀHv that were asked for

    def _stand(self, here: float) -> None:
        self.here = here
        # half a unit of the loss's own grid; one that was added up wider lies on no such grid
        single = float(np.float32(here)) == here
        self.grid = abs(here) * 2.0 ** (-24 if single else -53)

    def _stands(self) -> float:
        """The loss here: the gradient's own, if that is bit by bit what a call without a graph gives.

        It is asked on the first part. Other kernels round otherwise, which all differences would show.
        Whether labels can be left out is asked again where they show what no part has shown.
        """
        seen, steps = self.point.last_value(wide=self._wide), self.steps
        kind = label_kind(self.batch) if self._wide and steps.bare is not False else None
        if steps.bare and self._wide and kind not in steps.kinds:
            steps.bare = None
        if steps.same_loss and steps.bare is not None:
            return seen
        steps.kinds.add(kind)
        bare = None
        if steps.bare is None:
            bare = self._bare() if self._wide else None
            steps.bare = bare is not None and bare == seen
        alone = bare if steps.bare and bare is not None else self._value()
        if not steps.bare and bare is not None:
            steps.bare = bare == alone  # other kernels with a graph, but the same call
        if steps.same_loss is None:
            steps.same_loss = seen == alone
        return alone

    def _bare(self) -> float | None:
        """The loss of a call without labels; None also where the model does not do without."""
        try:
            return self.point.bare_value(self.batch)
        except Exception as error:
            if "out of memory" in str(error):
                raise
            return None

    def _value(self) -> float:
        """The loss where the weights are now."""
        found = self.point.bare_value(self.batch) if self._wide and self.steps.bare else None
        return self.point.forward_value(self.batch, wide=self._wide) if found is None else found

    def product(self, vector: Vector, *, signed: bool = False) -> dict[str, Tensor]:
        """H v; one gradient beside the one here will do, where it is not rounded much."""
        if signed or self.point.precision == "half" or not norm(vector) > 0:
            return self.gradients.product(vector, signed=signed)
        return self.gradients.ahead(vector)

    def quadratics(self, vectors: Sequence[Vector], sizes: Sequence[float] | None = None) -> np.ndarray:
        """vᵀHv of vectors of random sign, [S, 1].

        Args:
            vectors: S of them.
            sizes: their norms, where they are known.
        """
        rays = self._rays(vectors, [norm(v) for v in vectors] if sizes is None else sizes)
        known = {} if self.point.precision == "half" else self._settle(rays)
        found = [[known[k] if k in known else self._quadratic(ray)] for k, ray in enumerate(rays)]
        # all of them have the rounding of the loss here in common
        squares = sum(ray.size**2 for ray in rays) / self.steps.length("loss") ** 2
        self.rounding = 2 * max(self.steps.noise, self.grid) * squares
        return np.array(found)

    def _rays(self, vectors: Sequence[Vector], sizes: Sequence[float]) -> list[_Ray]:
        here = self.gradients.here
        slopes = along({name: [v[name] for v in vectors] for name in here}, here, whole=True)[:, 0]
        return [_Ray(v, *of) for v, *of in zip(vectors, sizes, slopes.tolist(), strict=True)]

    def _quadratic(self, ray: _Ray) -> float:
        if not ray.size > 0:
            return 0.0
        if self.point.precision == "half":  # no gradient is good enough to stand for a loss
            h = self.gradients.settle("loss", ray.vector)
        else:
            h = self.steps.length("loss") / ray.size
        if not self.steps.one_sided:
            return 2 * self._odd_even(ray, h)[1] / h**2
        return 2 * (self._loss(ray.vector, h) - self.here - h * ray.slope) / h**2

    def _loss(self, vector: Vector, h: float) -> float:
        with self.point.shifted(vector, h):
            return self._value()

    def _odd_even(self, ray: _Ray, h: float, ahead: float | None = None) -> tuple[float, float]:
        """What the loss changes by beyond its slope: its part that is odd in h, and its even part."""
        ahead = self._loss(ray.vector, h) if ahead is None else ahead
        behind = self._loss(ray.vector, -h)
        return (ahead - behind) / 2 - h * ray.slope, (ahead - 2 * self.here + behind) / 2

    def _settle(self, rays: Sequence[_Ray]) -> dict[int, float]:
        """Find the length of the step, unless it is known, from losses along two vectors.

        Returns:
            number of a vector → its vᵀHv, of those for which the last trial shows it.
        """
        settled = self.steps.settled("loss")
        tried = [] if settled else [k for k, ray in enumerate(rays) if ray.size > 0][:2]
        ahead: dict[int, float | None] = {}
        if tried and self._wide:
            ahead[tried[0]] = self._confirm(rays[tried[0]])
        while tried and not self.steps.settled("loss"):
            length = self.steps.length("loss")
            h = {k: length / rays[k].size for k in tried}
            found = np.array([self._odd_even(rays[k], h[k], ahead.pop(k, None)) for k in tried])
            if not self.steps.noise > 0:  # else known: rounding is the same after any short step
                short = [self._silent(rays[k], h[k] / SILENT) for k in tried]
                self.steps.noise = math.hypot(*short) / len(tried) ** 0.5
            odd, even = np.sqrt(np.mean(found**2, axis=0))
            self.steps.judge_losses(float(odd), float(even))
            if self.steps.settled("loss") and self.steps.length("loss") == length:
                return {k: 2 * float(e) / h[k] ** 2 for k, (_, e) in zip(tried, found, strict=True)}
        return {}

    def _confirm(self, ray: _Ray) -> float | None:
        """Give the mean over tokens up where it moves otherwise than the model's own loss, which is another.

        With label smoothing, say, both are about the same where all classes are about as likely.

        Returns:
            The loss after the first step to be tried; None where it was given up.
        """
        with self.point.shifted(ray.vector, self.steps.length("loss") / ray.size):
            wide = self.point.forward_value(self.batch, wide=True)
        own = self.point.last_value(wide=False)
        moved = own - self._own
        if abs(wide - self.here - moved) > MOVES_RTOL * abs(moved) + OWN_ROUNDING * abs(own):
            self.steps.wide = self.steps.bare = self._wide = False
            self._stand(self._value())
            self.steps.same_loss = self.here == self._own
            return None
        return wide

    def _silent(self, ray: _Ray, h: float) -> float:
        """What the loss changes by beyond its slope after a step so short that it is rounding.

        Not less than the loss's own grid: a step that short may not move a loss of few digits at all.
        """
        return max(abs(self._loss(ray.vector, h) - self.here - h * ray.slope), self.grid)
