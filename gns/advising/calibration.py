"""What B_simple was worth where batch sizes were measured beside it: constants with intervals, as data.

Made by `python -m experiments.evidence` from committed runs; nothing here is fitted.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from importlib import resources

from gns.advising.phrases import whole

FILE = "calibration.json"
PREDICTS = "predicts"


@dataclass(frozen=True)
class Calibration:
    """A measured batch size over B_simple, over configurations.

    Args:
        says: the measured batch size in words.
        constant: c in measured = c · B_simple of factor B, progress-weighted over the run.
        low: lower end of its 95 % interval.
        high: upper end.
        share: of the configurations within a factor of two of c · B_simple, c fitted to the others.
        share_low: lower end of its 95 % interval.
        share_high: upper end.
        configurations: with both numbers.
        planned: configurations of the study; None where their number was not fixed beforehand.
        parameters: of the smallest and the largest model.
        verdict: "predicts", "does not" or "undecided", by the rule that was fixed before the runs.
    """

    says: str
    constant: float
    low: float
    high: float
    share: float
    share_low: float
    share_high: float
    configurations: int
    planned: int | None
    parameters: tuple[int, int]
    verdict: str

    def applied(self, ends: tuple[float, float]) -> tuple[float, float]:
        """Give the measured batch size that a reading speaks for, if what the study found holds for it.

        Args:
            ends: of the confidence set of B_simple, examples.

        Returns:
            Ends in examples: the product of both intervals' ends, wider than 95 %.
        """
        return ends[0] * self.low, ends[1] * self.high

    def sentence(self, ends: tuple[float, float]) -> str:
        """Say what was found, and what follows for a reading."""
        of = "" if self.planned is None else f" of {self.planned} planned"
        found = (
            f"{self.says[0].upper()}{self.says[1:]} was {_three(self.constant)} ({_three(self.low)} … "
            f"{_three(self.high)}) times B_simple of factor B in {self.configurations}{of} configurations, "
            f"of models with {self._models} parameters; {100 * self.share:.0f} % "
            f"({100 * self.share_low:.0f} … {100 * self.share_high:.0f} %) lay within a factor of two of that"
        )
        here = self._here(ends)
        if self.verdict == PREDICTS:
            return f"{found}: by that, {here} examples here."
        if self.verdict == "does not":
            return f"{found}: it does not predict, so nothing is corrected by it."
        return f"{found}: undecided, so nothing is corrected by it. If it holds here, that is batch {here}."

    def brief(self, ends: tuple[float, float]) -> str:
        """Say it in short, for a summary."""
        found = (
            f"Where both were measured (models of {self._models} parameters), {self.says} was "
            f"{_three(self.low)} … {_three(self.high)} × B_simple of factor B"
        )
        if self.verdict == PREDICTS:
            return f"{found}: batch {self._here(ends)} here."
        if self.verdict == "does not":
            return f"{found}, which does not predict it."
        return f"{found}. If it holds here, which is undecided, that is batch {self._here(ends)}."

    @property
    def _models(self) -> str:
        return " to ".join(f"{n / 1e6:.2g} M" for n in sorted(set(self.parameters)))

    def _here(self, ends: tuple[float, float]) -> str:
        low, high = self.applied(ends)
        if math.isinf(high):
            return f"at least {whole(low)}"
        return " … ".join(dict.fromkeys((whole(low), whole(high))))  # one where both read alike


@functools.cache
def calibrations() -> tuple[Calibration, ...]:
    """Read what ships with the package; nothing where no study has been made.

    Raises:
        ValueError: the file is damaged.
    """
    file = resources.files("gns") / "assets" / FILE
    if not file.is_file():
        return ()
    return parsed(file.read_text(encoding="utf-8"))


def parsed(text: str) -> tuple[Calibration, ...]:
    """Read calibrations from JSON.

    Raises:
        ValueError: it is no list of them, or a number is missing or not finite.
    """
    try:
        found = tuple(
            Calibration(**(each | {"parameters": tuple(each["parameters"])})) for each in json.loads(text)
        )
        finite = all(math.isfinite(x) for each in found for x in (each.constant, each.low, each.high))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{FILE}: no list of calibrations: {error}; reinstall the package") from error
    if not finite:
        raise ValueError(f"{FILE}: a constant without a finite interval; reinstall the package")
    return found


def _three(value: float) -> str:
    return f"{value:.3g}"
