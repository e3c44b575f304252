"""What every bridge needs: the monitor's arguments, the logged readings, and states as plain JSON."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gns.estimate import Estimate
from gns.monitor import GNSMonitor
from gns.notices import GNSWarning

LOGGED = {
    "gns/b_simple": "b_simple",
    "gns/b_simple_low": "low",
    "gns/b_simple_high": "high",
    "gns/trace_sigma": "trace_sigma",
    "gns/grad_sq_norm": "grad_sq_norm",
}
_OPTIONS = tuple(inspect.signature(GNSMonitor).parameters)[1:]

Given = GNSMonitor | Mapping[str, Any] | None


def attached(monitor: GNSMonitor) -> bool:
    """Attach a monitor, or say why nothing is measured: a training must not end over it.

    Raises:
        ValueError: nothing can be measured, and the monitor is to raise errors.
    """
    try:
        monitor.attach()
    except ValueError as error:
        if monitor.on_error == "raise":
            raise
        warnings.warn(f"nothing is measured in this training: {error}", GNSWarning, stacklevel=3)
        return False
    return True


def monitor_or_options(given: Given, more: Mapping[str, Any]) -> tuple[GNSMonitor | None, dict[str, Any]]:
    """Tell a monitor of the user's own from arguments for one to be built.

    Args:
        given: a monitor, a mapping of its arguments, or None.
        more: the same arguments, as keywords.

    Raises:
        TypeError: an argument is none of a `GNSMonitor`.
    """
    if not isinstance(given, GNSMonitor | Mapping | None):
        raise TypeError(f"got a {type(given).__name__}; a GNSMonitor or a mapping of its arguments is needed")
    if isinstance(given, GNSMonitor):
        if more:
            raise TypeError(f"got a GNSMonitor and {', '.join(more)}; give these to the GNSMonitor")
        return given, {}
    options = {**(given or {}), **more}
    if unknown := [name for name in options if name not in _OPTIONS]:
        raise TypeError(f"GNSMonitor has no {', '.join(unknown)}; it has {', '.join(_OPTIONS)}")
    return None, options


class Readings:
    """The estimate over all steps so far, as numbers for a log, with an interval valid at every look.

    Value, tr Σ and |G|² are over all steps so far; interval and status are those of `monitor.live()`, renewed
    at 20, 25, 32, … usable steps, so that the chance that the log of a training ever holds an interval
    without the truth is at most 5 %. From the hundredth step on a value may be up to 1 % of the steps old:
    the longer the run, the dearer it is.
    """

    def __init__(self) -> None:
        self.shown: Estimate | None = None  # the estimate that was logged last
        self._shown_at = -1

    def restart(self) -> None:
        """Estimate anew at the next log."""
        self._shown_at = -1

    def of(self, monitor: GNSMonitor | None) -> dict[str, float]:
        """Give the readings of a monitor; those that are not finite are left out, a gap in the curve.

        So is the interval while the status is "collecting".
        """
        latest = monitor.latest if monitor is not None else None
        if monitor is None or latest is None:
            return {}
        if (
            self.shown is None
            or self._shown_at < 0
            or latest.step - self._shown_at >= self._shown_at // 100 + 1
        ):
            seen = monitor.live()
            of_look = {"low": seen.low, "high": seen.high, "status": seen.status, "set_level": seen.set_level}
            self.shown = replace(monitor.estimate(), **of_look)
            self._shown_at = latest.step
        values = {key: float(getattr(self.shown, name)) for key, name in LOGGED.items()}
        if self.shown.status == "collecting":
            del values["gns/b_simple_low"], values["gns/b_simple_high"]
        return {key: value for key, value in values.items() if math.isfinite(value)}
