"""`Summaries`: what a monitor's history amounts to, asked once, at every step, or by progress."""

from __future__ import annotations

from dataclasses import replace

from gns import live as looking
from gns import views
from gns.coverage import Coverage
from gns.estimate import Estimate, estimate
from gns.sums import StepSums


class Summaries:
    """The estimates of a monitor, which itself has the `history` and knows the `coverage`."""

    _shown: tuple[int, float, Estimate] | None = None  # the last look: its steps, level and estimate

    @property
    def history(self) -> list[StepSums]:
        """The measured optimizer steps, oldest first."""
        raise NotImplementedError

    def coverage(self) -> Coverage:
        """Say which trainable parameters are measured, which not and why."""
        raise NotImplementedError

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
        """Estimate B_simple so that it may be looked at after every step; see `gns.live.live`.

        The set is renewed at 20, 25, 32, 40, … usable steps and stands in between. Where the history has
        become full and lets go of early steps, the last set stands from then on.

        Args:
            level: coverage of everything shown in the run, together.

        Raises:
            ValueError: `level` is outside (0, 1).
        """
        steps = self.history
        made = looking.looks(sum(step.usable for step in steps))
        if self._shown is not None and made and self._shown[1] == level and made[-1] <= self._shown[0]:
            return self._shown[2]
        found = self._with_share(looking.live(steps, level=level))
        if made:
            self._shown = (made[-1], level, found)
        return found

    def progress_weighted(self, *, batch_size: float | None = None, level: float = 0.95) -> Estimate:
        """Estimate the mean of B over the history by progress, for a comparison with a critical batch size.

        Args:
            batch_size: B_train, examples; by default the mean of the steps.
            level: nominal coverage of the confidence set.

        Raises:
            ValueError: see `gns.views.progress_weighted`.
        """
        return self._with_share(views.progress_weighted(self.history, batch_size=batch_size, level=level))

    def _with_share(self, found: Estimate) -> Estimate:
        return replace(found, coverage=self._share())

    def _share(self) -> float | None:
        """Share of the trainable parameters that is measured; None where unknown."""
        raise NotImplementedError
