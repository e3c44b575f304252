"""`Summaries`: what a monitor's history amounts to, asked once, at every step, or by progress."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gns.coverage import Coverage
from gns.estimate import Estimate, estimate
from gns.packing import pack_estimate, unpack_estimate
from gns.statistics import live as looking
from gns.statistics import views
from gns.sums import StepSums


class Summaries(ABC):
    """The estimates of a monitor, which itself has the `history` and knows the `coverage`."""

    def __init__(self) -> None:
        self._shown: dict[float, tuple[int, Estimate]] = {}  # level → the last look: its steps and estimate
        self._let_go = False  # the history has lost early steps: no look can be made as it should be

    @property
    @abstractmethod
    def history(self) -> list[StepSums]:
        """The measured optimizer steps, oldest first."""

    @abstractmethod
    def coverage(self) -> Coverage:
        """Say which trainable parameters are measured, which not and why."""

    def estimate(self, last: int | None = None, *, level: float = 0.95) -> Estimate:
        """Estimate B_simple over the history: a set for a single look. For a look at any time, see `live`.

        Args:
            last: only the last so many measured steps.
            level: nominal coverage of the confidence set.

        Returns:
            The estimate, with the share of trainable parameters that it covers.

        Raises:
            ValueError: `last` is below 1, or `level` outside (0, 1).
        """
        if last is not None and last < 1:
            raise ValueError(f"last is {last}; 1 or more steps are needed, or None for all")
        steps = self.history if last is None else self.history[-last:]
        return self._with_share(estimate(steps, level=level))

    def live(self, *, level: float = 0.95) -> Estimate:
        """Estimate B_simple so that it may be looked at after every step; see `gns.statistics.live.live`.

        The set is renewed at 20, 25, 32, 40, … usable steps and stands in between. Where the history has
        become full and lets go of early steps, the last set stands from then on, also where the training is
        resumed from `state_dict()`; one asked for only then is made once, of the steps that are left.
        Resumed without it, a run counts as a new one.

        Args:
            level: coverage of everything shown in the run, together.

        Raises:
            ValueError: `level` is outside (0, 1).
        """
        steps = self.history
        made = looking.looks(sum(step.usable for step in steps))
        known = self._shown.get(level)
        if known is not None and (self._let_go or not made or made[-1] <= known[0]):
            return known[1]
        found = self._with_share(looking.live(steps, level=level))
        if made:
            self._shown[level] = (made[-1], found)
        return found

    def _pack_looks(self) -> dict[str, Any]:
        """Give the sets that stand as plain data; those that the history still gives are left out."""
        shown = [[steps, level, pack_estimate(found)] for level, (steps, found) in self._shown.items()]
        return {"let_go": self._let_go, "looks": shown if self._let_go else []}

    def _unpack_looks(self, state: Mapping[str, Any]) -> None:
        """Go on with what `_pack_looks` gave; a state of before there were looks has none."""
        self._let_go = state.get("let_go", False)
        looks = state.get("looks", [])
        self._shown = {level: (steps, unpack_estimate(found)) for steps, level, found in looks}

    def progress_weighted(self, *, batch_size: float | None = None, level: float = 0.95) -> Estimate:
        """Estimate the mean of B over the history by progress, for a comparison with a critical batch size.

        Args:
            batch_size: B_train, examples; by default the mean of the steps.
            level: nominal coverage of the confidence set.

        Raises:
            ValueError: see `gns.statistics.views.progress_weighted`.
        """
        return self._with_share(views.progress_weighted(self.history, batch_size=batch_size, level=level))

    def _with_share(self, found: Estimate) -> Estimate:
        return replace(found, coverage=self._share())

    @abstractmethod
    def _share(self) -> float | None:
        """Share of the trainable parameters that is measured; None where unknown."""
