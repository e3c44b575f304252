"""What is kept of all products: inner products, by part of the examples for H, by probe, by parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from gns.curvature.errors import CurvatureError
from gns.curvature.gathering import Sums, Vector
from gns.curvature.ggn import GaussNewton
from gns.curvature.parts import Point
from gns.curvature.products import Difference, Exact, Forward, NoSecondDerivative, Part
from gns.curvature.steps import NoStep, Steps
from gns.curvature.tangents import Tangents
from gns.curvature.tape import NoTape
from gns.curvature.vectors import along, dots, inner, norm

OPERATORS = ("hessian", "ggn")
ERROR = 0.05  # of the sum of second differences of losses: more is said
ROUNDED = (
    "rounding of the loss, and the long steps that it asks for, may put its second differences off by "
    "{share}, which does not average out: take method='difference' or 'exact'"
)
# Between an exact product and a difference, relative: more is another derivative, not rounding.
AGREE = {"double": 0.02, "single": 0.1, "half": 0.7}
# The same where exact products go along a tape: below what an operation of a wrong rule would show, and to be
# wrong about it costs time alone, that of products by double backward.
TAPE_AGREE = {"double": 0.02, "single": 0.05, "half": 0.7}
TANGENTS, DOUBLE = "tangents", "double backward"


@dataclass(frozen=True)
class Contractions:
    """Inner products with an operator H, taken on M parts of its examples.

    Args:
        probes: [M, S, P], uₛᵀHuₛ by parameter; P = 1 where only the whole is known.
        groups: [M, S, P], ḡₛᵀHḡ with ḡₛ = Σ c̃ᵢ over the probe's examples: over the probes they sum to ḡᵀHḡ.
        weighted: [M, P], (Σ ãᵢ c̃ᵢ)ᵀHḡ.
        mass: [M], weight of each part, Σ = 1.
        method: how products were made.
        products: how many vectors were multiplied, over the examples of all parts.
        notes: what to know of them.
        weight: of all parts, in examples or tokens.
        derivatives: how exact products with H were made, "tangents" or "double backward"; None: none were.
    """

    probes: np.ndarray
    groups: np.ndarray
    weighted: np.ndarray
    mass: np.ndarray
    method: str
    products: int
    notes: tuple[str, ...] = ()
    weight: float = 1.0
    derivatives: str | None = None

    def total(self) -> Contractions:
        """Give the same summed over parameters."""
        probes, groups, weighted = (
            x.sum(-1, keepdims=True) for x in (self.probes, self.groups, self.weighted)
        )
        return replace(self, probes=probes, groups=groups, weighted=weighted)


def identity(sums: Sums) -> Contractions:
    """The contractions with the identity, by parameter: those of B_simple."""
    probes, groups = sums.probe_sq_norms, along(sums.parts, sums.mean)
    weighted = dots(sums.weighted, sums.mean)
    return Contractions(probes[None], groups[None], weighted[None], np.ones(1), "identity", 0)


class Builder:
    """Makes parts of the method asked for, or of the one that works.

    Args:
        point: the model.
        operator: "hessian" or "ggn".
        method: "auto", "exact", "difference" or "forward".
        tapes: vᵀHv will do for most vectors: exact ones come from a tape where there is one.
    """

    def __init__(self, point: Point, operator: str, method: str, *, tapes: bool = False):
        self.point, self.operator = point, operator
        self.auto = method == "auto"
        self.method = ("difference" if point.coarse else "exact") if self.auto else method
        self.notes: list[str] = []
        self.steps = Steps(point)
        self.tapes = tapes  # until one does not work
        if operator == "ggn" and method in ("difference", "forward"):
            raise CurvatureError(f'operator="ggn" has exact products only; method is {method!r}: take "auto"')
        if operator == "ggn":
            self.method = "exact"

    def __call__(self, batch: Any) -> Part:
        """Make the part of a batch."""
        if self.operator == "ggn":
            return GaussNewton(self.point, batch)
        if self.method == "forward":
            return Forward(self.point, batch, self.steps)
        if self.method == "difference":
            return Difference(self.point, batch, self.steps)
        if self.tapes:
            try:
                return Tangents(self.point, batch)
            except NoTape:
                self.tapes = False
        try:
            return Exact(self.point, batch)
        except NoSecondDerivative as error:
            return self.fall_back(error, batch)

    @property
    def derivatives(self) -> str | None:
        """How exact products with H are made."""
        if self.method != "exact" or self.operator != "hessian":
            return None
        return TANGENTS if self.tapes else DOUBLE

    def fall_back(self, error: Exception, batch: Any) -> Part:
        """Go over to differences, if the choice was left to us."""
        if not self.auto:
            raise error
        self.method = "difference"
        self.notes.append(f"products by differencing: {error}")
        return Difference(self.point, batch, self.steps)


def contract(
    point: Point,
    pieces: Sequence[Any],
    sums: Sums,
    *,
    operator: str,
    method: str,
    contributions: bool = True,
) -> Contractions:
    """Multiply every vector with the operator of every part.

    Args:
        point: the model at its weights.
        pieces: parts of the examples for H, one at a time in memory.
        sums: of the gradients.
        operator: "hessian" or "ggn".
        method: "auto", "exact", "difference" or "forward".
        contributions: give them by parameter, unless products are known as a whole only.

    Returns:
        The contractions.

    Raises:
        CurvatureError: a product is not finite, no part has a label, or the method does not work here.
    """
    build = Builder(point, operator, method, tapes=not contributions)
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray, float]] = []
    rounding: list[float] = []
    for number, piece in enumerate(pieces):
        part = None  # its graph goes before the next one is built
        part, found = _multiplied(build, piece, sums, first=not rows)
        if found is None:
            continue  # no label in it
        if not all(np.isfinite(x).all() for x in found):
            raise CurvatureError(
                f"part {number} of the examples for H: a product ({build.method}) is not finite; overflow "
                'of a low precision? Use float32 or bfloat16, or method="exact"'
            )
        rows.append((*found, part.mass))
        rounding.append(part.rounding if isinstance(part, Forward) else 0.0)
    if not rows:
        raise CurvatureError("the examples for H have no label; give batches with some")
    mass = np.array([r[3] for r in rows])
    stacked = [np.stack([r[i] for r in rows]) for i in range(3)]
    probes, groups, weighted = stacked
    if build.method == "forward":
        error = build.steps.error + _drowned(mass / mass.sum(), probes[..., 0], np.array(rounding))
        if error > ERROR:
            share = f"{100 * error:.0f} %" if error < 1 else "all that they are"
            build.notes.append(ROUNDED.format(share=share))
    found = Contractions(
        probes=probes,
        groups=groups,
        weighted=weighted,
        mass=mass / mass.sum(),
        method=build.method,
        products=sums.probes + 1,
        notes=tuple(dict.fromkeys(build.notes)),
        weight=float(mass.sum()),
        derivatives=build.derivatives,
    )
    return found if contributions and build.method != "forward" else found.total()


def _drowned(mass: np.ndarray, probes: np.ndarray, rounding: np.ndarray) -> float:
    """Rounding in the sum of all uₛᵀHuₛ relative to it, or to its own spread where that is larger.

    Args:
        mass: [M], Σ = 1.
        probes: [M, S].
        rounding: [M], in the sum over the probes.
    """
    each = mass @ probes
    size = max(abs(float(each.sum())), float(each.std(ddof=1)) * len(each) ** 0.5)
    off = float(mass @ rounding)
    return off / size if size > 0 else math.inf if off > 0 else 0.0


def joined(found: Sequence[Contractions]) -> Contractions:
    """Join the contractions with one operator, taken on the parts of several processes."""
    mass = np.concatenate([c.weight * c.mass for c in found])
    return replace(
        found[0],
        probes=np.concatenate([c.probes for c in found]),
        groups=np.concatenate([c.groups for c in found]),
        weighted=np.concatenate([c.weighted for c in found]),
        mass=mass / mass.sum(),
        notes=tuple(dict.fromkeys(note for c in found for note in c.notes)),
        weight=float(mass.sum()),
        derivatives=" and ".join(dict.fromkeys(c.derivatives for c in found if c.derivatives)) or None,
    )


def _multiplied(
    build: Builder, piece: Any, sums: Sums, *, first: bool
) -> tuple[Part, tuple[np.ndarray, np.ndarray, np.ndarray] | None]:
    """Make a part and its contractions, those of the first one checked; None where it has no label."""
    part = build(piece)
    if not part.mass > 0:
        return part, None
    try:
        curved = None
        if first and isinstance(part, Exact | Tangents):
            part, curved = _checked(build, part, piece, sums)
        return part, _of_part(part, sums, curved)
    except NoTape:
        build.tapes = False
    except NoSecondDerivative as error:
        part = build.fall_back(error, piece)
        return part, _of_part(part, sums)
    part = None  # there may have been no memory for it
    return _multiplied(build, piece, sums, first=first)


def _of_part(
    part: Part, sums: Sums, curved: Vector | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    vectors = (sums.probe(s) for s in range(sums.probes))
    if isinstance(part, Forward):
        probes = part.quadratics(list(vectors), np.sqrt(sums.probe_sq_norms.sum(1)).tolist())
    elif isinstance(part, Tangents):
        probes = np.array([[part.quadratic(v)] for v in vectors])
    else:
        probes = np.array([dots(v, part.product(v, signed=True)) for v in vectors])
    curved = part.product(sums.mean) if curved is None else curved
    whole = probes.shape[1] < len(sums.names)
    weighted = np.array([inner(sums.weighted, curved)]) if whole else dots(sums.weighted, curved)
    return probes, along(sums.parts, curved, whole=whole), weighted


def _checked(
    build: Builder, part: Exact | Tangents, piece: Any, sums: Sums
) -> tuple[Part, dict[str, Tensor] | None]:
    """Compare one exact product with a difference: an operation may pass none on, in silence.

    Args:
        build: makes parts.
        part: the first one.
        piece: its examples.
        sums: of the gradients.

    Returns:
        The part to go on with, and its H ḡ where known.

    Raises:
        NoTape: it went along a tape that may be wrong.
    """
    mean, taped = sums.mean, isinstance(part, Tangents)
    if not norm(mean) > 0:
        return part, None
    exact = part.product(mean)
    if not np.isfinite(norm(exact)):
        if taped:
            raise NoTape("a product is not finite")
        return part, exact  # it is said when all products are there
    try:
        if build.point.precision == "half":  # other kernels round otherwise: both gradients by the same
            product = Difference(build.point, piece, build.steps).product(mean)
        else:
            product = Difference(build.point, piece, build.steps, part.here()).ahead(mean)
    except NoStep:
        return part, exact  # no step changes the gradient: H ḡ is about zero, and no difference denies it
    differs = norm({n: v.double() - product[n].double() for n, v in exact.items()}) / (norm(product) or 1.0)
    if differs <= (TAPE_AGREE if taped else AGREE)[build.point.precision]:
        return part, exact
    if taped:
        raise NoTape(f"the product is {100 * differs:.0f} % off the difference of two gradients")
    error = NoSecondDerivative(
        f"the exact product is {100 * differs:.0f} % off the difference of two gradients: an operation of "
        "the model passes no second derivative on; take method='difference', which needs none"
    )
    return build.fall_back(error, piece), None
