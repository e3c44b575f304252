"""What a terminal shows of a running fine-tune: a live bar; without a terminal, a line now and then."""

from __future__ import annotations

import math
import warnings
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from gns.estimate import Estimate, format_count
from gns.finetune import Progress, Watcher
from gns.notices import GNSWarning

LINES = 10  # without a terminal: how many in all


class Display(Watcher):
    """Shows loss and B_simple with its interval, on standard error; a context.

    Args:
        console: where to; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}", markup=False),
        )
        self.bar = Bar(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("loading model and data", total=None)

    def __enter__(self) -> Self:
        self.bar.start()
        self._show_other, warnings.showwarning = warnings.showwarning, self._show_warning
        return self

    def __exit__(self, *exception: object) -> None:
        warnings.showwarning = self._show_other
        self.bar.stop()

    def _show_warning(self, message: Any, category: type[Warning], *where: Any) -> None:
        """Say what the monitor warns of as a remark; any other warning stays as it is."""
        if issubclass(category, GNSWarning):
            self.remark(str(message))
        else:
            self._show_other(message, category, *where)

    def remark(self, line: str) -> None:
        """Print a remark, above the bar."""
        self.console.print(f"gns: {line}", markup=False)

    def step(self, progress: Progress) -> None:
        """Move the bar; without a terminal, print a line at every tenth of the way."""
        shown = f"loss {progress.loss:.3f}  {brief(progress.estimate)}"
        self.bar.update(self.task, completed=progress.step, total=progress.n_steps, description=shown)
        tenth = max(1, progress.n_steps // LINES)
        if not self.console.is_terminal and (progress.step % tenth == 0 or progress.step == progress.n_steps):
            self.console.print(f"step {progress.step}/{progress.n_steps}  {shown}", markup=False)


def brief(estimate: Estimate | None) -> str:
    """Put an estimate into the width of a progress bar.

    >>> brief(None)
    'B_simple …'
    """
    if estimate is None or estimate.n_steps < 2:
        return "B_simple …"
    interval = f"({format_count(estimate.low)} … {format_count(estimate.high)})"
    if not math.isnan(estimate.point):
        return f"B_simple {format_count(estimate.point)} {interval} {estimate.status}"
    if math.isfinite(estimate.high):  # tr Σ averages below 0
        return f"B_simple {interval} {estimate.status}"
    return f"B_simple ≥ {format_count(estimate.low)} {estimate.status}"
