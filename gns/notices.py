"""What a monitor tells its user: warnings, each said once."""

from __future__ import annotations

import warnings

from gns.reasons import NO_CALL, NO_STATE
from gns.sums import StepSums

PATIENCE = 3  # steps without optimizer state before it is said


class GNSWarning(UserWarning):
    """Something about a measurement that its reader must know."""


class Notices:
    """Warns, and remembers of what."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._waited = 0  # steps without a metric, for want of optimizer state

    def once(self, text: str) -> None:
        """Warn of something, the first time."""
        self._once(text, text)

    def step(self, sums: StepSums) -> None:
        """Warn of what is wrong with a step."""
        self._waited += sums.reason == NO_STATE
        if sums.reason == NO_STATE and self._waited <= PATIENCE:
            return  # as it must be before the optimizer's first step
        if sums.reason is not None:
            text = f"optimizer step {sums.step} (and any like it) gives no estimate: {sums.reason}"
            self._once(sums.reason, text)
        elif not sums.call_seen:
            self._once(NO_CALL, NO_CALL)

    def unmeasured(self, reasons: dict[str, str]) -> None:
        """Warn of parameters that are not measured: parameter → why."""
        name, why = next(iter(reasons.items()))
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        _warn(
            f"{len(reasons)} trainable parameter(s) are not measured: {name}{more}: {why}. "
            "`monitor.coverage()` lists them all"
        )

    def stands_down(self, why: str) -> None:
        """Warn that nothing more is measured, after an error of ours or a setting that does not fit."""
        _warn(f"GNSMonitor stands down, training goes on as it was: {why}")

    def _once(self, key: str, text: str) -> None:
        if key not in self._told:
            self._told.add(key)
            _warn(text)


def _warn(text: str) -> None:
    warnings.warn(text, GNSWarning, stacklevel=5)  # about where the monitor was called
