"""How far to shift the weights for a difference of gradients or of losses: found from what they show."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gns.curvature.errors import CurvatureError
from gns.curvature.parts import Point
from gns.curvature.vectors import norm

# Change of the gradient, relative to it, that a step is to make. Differences of gradients,
# which are rounded to 2⁻⁵³, 2⁻²⁴ or 2⁻⁹, bear a small one; second differences of losses, what is left of a
# cancellation, do not.
GRADIENT_CHANGE = {"double": 1e-5, "single": 3e-4, "half": 0.2}
LOSS_CHANGE = 0.3  # the same for 16 bits; wider ones are judged by the losses
# First trials: shifts of these shares of the weights' norm. On the shipped base model a small shift changes
# the gradient by about 10 times its share, so the first one for gradients will do.
START = {"double": 1e-6, "single": 3e-5, "half": 1e-3}
START_LOSS = 5e-3
# Steps of second differences of losses are not longer than this share of the weights' norm: there a fourth
# derivative puts them off by 2.5 % (base), and what is beyond is no property of the point.
LONGEST = 0.1
# Of second differences of losses where one side stands for both: the odd part that is aimed at, relative to
# the even one, and rounding that is put up with. The odd part averages out over signs; so does rounding, but
# for that of the loss where it stands, which all vectors share: so it is kept small.
ODD = {"double": 0.005, "single": 0.02}
NOISE = 0.01
FOURTH = 2.5  # error of both sides' difference in squares of odd / even: 0.022 at 0.095, 0.08 at 0.185 (base)
TRIALS = 8
TINY = 1e-12


class NoStep(CurvatureError):
    """No step along a vector changes the gradient by a measurable amount."""


@dataclass
class _Search:
    """The length of a step, being found."""

    length: float
    largest: float = math.inf  # steps this long break the loss
    trials: int = 0
    settled: bool = False

    def within(self, factor: float) -> float:
        """What of a factor on the length is allowed at once."""
        return min(30.0, max(1 / 30, factor), self.largest / 3 / self.length)


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
        self.same_loss: bool | None = None  # with a graph as without one, bit by bit; None: not yet known
        self.wide = True  # token means are added up in float64; False: the model's own loss is another
        self.bare: bool | None = None  # without labels as with them, bit by bit; None: not yet known
        self.kinds: set[tuple[bool, bool] | None] = set()  # of labels for which that was asked
        self.noise = 0.0  # what rounding alone changes a loss by
        self.error = 0.0  # of second differences, relative, by the length that rounding asks for

    def length(self, kind: str) -> float:
        """Give the length to take, or to try next, for vectors of a kind."""
        if kind not in self._found:
            share = START_LOSS if kind == "loss" else START[self._point.precision]
            largest = 3 * LONGEST * self._weights if kind == "loss" else math.inf
            self._found[kind] = _Search(share * self._weights, largest)
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
            search.length *= search.within(factor)
            # close enough to trust the power law
            search.settled = seen >= target / 300 and 1 / 30 < factor < 30
        if search.trials >= TRIALS and not search.settled:
            raise NoStep(
                f"no step along a {kind} vector changes the gradient by a measurable amount: the Hessian "
                'looks like zero there; take method="exact"'
            )
        return False

    def judge_losses(self, odd: float, even: float) -> None:
        """Choose the length and the sides of second differences of losses by what a trial showed.

        With a step f times as long odd / even is f times as large, noise / even 1 / f² times.

        Args:
            odd: what the loss changes by beyond its slope, the part that is odd in the step.
            even: the even part, half a second difference.
        """
        search, limit, noise = self._found["loss"], ODD[self._point.precision], self.noise
        search.trials += 1
        if not math.isfinite(odd + even):
            search.largest, search.length = search.length, search.length / 30
            search.settled = search.trials >= TRIALS
            return
        odd = math.sqrt(max(odd**2 - 4 * noise**2, 0.0))  # what rounding alone shows is no third derivative
        odd, noise = (max(v / even if even > 0 else math.inf, TINY) for v in (odd, noise))
        enough = max(1.0, 2 * math.sqrt(noise / NOISE))  # longer ones: no less rounding, unseen derivatives
        factor = 1.0 if odd <= 1.5 * limit and noise <= NOISE else min(limit / odd, enough)
        factor = search.within(factor)
        self.one_sided = noise / factor**2 <= NOISE
        if not self.one_sided:
            even_out = (noise / (FOURTH * odd**2)) ** 0.25 if math.isfinite(odd) else math.inf
            factor = search.within(min(even_out, enough))
        search.length *= factor
        search.settled = 1 / 5 <= factor <= 5 or search.trials >= TRIALS
        self.error = 0.0 if self.one_sided else FOURTH * (odd * factor) ** 2
