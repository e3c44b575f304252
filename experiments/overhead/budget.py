"""How a run shares its minutes: each part has work that it needs and work that it wishes for.

Work is estimated, in multiply-adds; what a machine does of it in a second is timed when the run starts. A
part may take what it needs and, of the seconds that nobody needs, what it wishes for. So a run on a machine
half as fast makes fewer pairs, and ends in time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.overhead.settings import SHAPES, Setting

LAYER = 5 * 10**9  # multiply-adds that take as long as what a layer does besides them in a step
ATTENTION = 17  # 3.5 passes of two causal products, four to five times slower than those of layers
MARGIN = 1.05  # of needs, which are estimates


def work(setting: Setting) -> float:
    """Multiply-adds of an untouched step, roughly: to share time, not to be shown."""
    shape = SHAPES[setting.shape]
    layers = shape.layers if setting.layers is None else setting.layers
    weights = layers * (4 * shape.width**2 + 3 * shape.width * shape.inner) + shape.vocab * shape.width
    products = (4 if setting.rank is not None else 6) * weights
    attention = ATTENTION * layers * setting.tokens * shape.width
    return setting.accumulate * (setting.batch * setting.tokens * (products + attention) + layers * LAYER)


@dataclass(frozen=True)
class Part:
    """A part of a run.

    Args:
        name: of the part.
        need: work that is done in any case.
        wish: work that is done where there is time for it.
    """

    name: str
    need: float
    wish: float = 0.0


def kind(name: str) -> str:
    """Give the section that a part belongs to: what stands before the colon."""
    return name.partition(":")[0]


class Budget:
    """Seconds for each part, in their order.

    Args:
        seconds: for all of it.
        parts: in the order in which they are run.
        rate: work that the machine does in a second.
        clock: seconds since some time.
    """

    def __init__(
        self,
        seconds: float,
        parts: Sequence[Part],
        rate: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.until = clock() + seconds
        self.parts = list(parts)
        self.rate = rate
        self.clock = clock

    def forecast(self) -> dict[str, float]:
        """Seconds of the parts that are left, by what stands before the colon of their names.

        What they need and, where all of it fits, what they wish for.
        """
        need, wish = (sum(getattr(part, of) for part in self.parts) for of in ("need", "wish"))
        spare = max(0.0, (self.until - self.clock()) * self.rate - MARGIN * need)
        share = min(1.0, spare / wish) if wish else 0.0
        found: dict[str, float] = {}
        for part in self.parts:
            seconds = (part.need + share * part.wish) / self.rate
            found[kind(part.name)] = found.get(kind(part.name), 0.0) + seconds
        return found

    def take(self, name: str) -> float:
        """Give the seconds of the next part, which is thereby begun.

        Where not all fits, that is its share of what is left: needs are estimates, and a part that takes all
        of a need that was put too high would leave nothing to the last ones.

        Raises:
            ValueError: it is not the next.
        """
        if not self.parts or self.parts[0].name != name:
            raise ValueError(f"part {name!r} is not next: {[part.name for part in self.parts]} are left")
        part = self.parts.pop(0)
        later = MARGIN * sum(each.need for each in self.parts) / self.rate
        need, wish = part.need / self.rate, part.wish / self.rate
        left = self.until - self.clock()
        spare = left - later - need
        if spare < 0:
            return need * max(0.0, left) / (later + need) if need else 0.0
        # of what is spare, later parts of a kind get as much as they wish for
        others = [each.wish for each in self.parts if kind(each.name) == kind(part.name)]
        wished = part.wish + sum(others)
        return need + (min(wish, spare * part.wish / wished) if part.wish else 0.0)
