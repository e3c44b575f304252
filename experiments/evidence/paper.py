"""The paper's figures with what it did not measure in them: noise scales, critical batch sizes, intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from experiments import grids
from experiments.analysis.cells import Cell, Row, cells
from experiments.analysis.curves import Curve, Estimated, curve
from experiments.evidence.configurations import CONFIGURATIONS, differing, per_row
from experiments.evidence.measured import Measured
from experiments.figures import curves, rates
from experiments.figures.style import LOOK, fixed, heading
from experiments.figures.table import table

# preset → what it repeats of arXiv:2602.09492; ours repeat nothing
FIGURES = {
    "laptop-data": "Fig. 2: data",
    "laptop-rank": "Fig. 2: rank",
    "laptop-model": "Fig. 2: model",
    "laptop-adapters": "Fig. 1: adapters",
    "laptop-steps": "Fig. 3: a fixed number of steps",
    "laptop-schedule": "Fig. 4: schedule and warm-up",
    "laptop-lr": "Fig. 5: best learning rate",
    "laptop-noise": "",
    "laptop-merged": "",
    "laptop-beta2": "",
    "laptop-foundation": "",
}


class Drawn(NamedTuple):
    """A figure, its title, and the numbers behind it, a table in Markdown; "" where they stand elsewhere."""

    figure: Figure
    title: str
    table: str = ""


def figures(rows: Sequence[Row], found: Mapping[str, Mapping[int, Measured]]) -> dict[str, Drawn]:
    """Draw the sweeps that there are rows of, a figure a preset: name → figure.

    A sweep is drawn from the first two cells on that can be told apart, and says how much of it was run.

    Args:
        rows: of any sweeps.
        found: configuration → N → reading, whose critical batch sizes are marked beside the curves.
    """
    made = {}
    for name in FIGURES:
        preset = grids.load(name)
        own = preset.own(rows)
        drawn = [curve(cell) for cell in cells(own) if (cell.validation < math.inf).any()]
        if len(drawn) < (1 if name == "laptop-lr" else 2):
            continue
        with matplotlib.rc_context(LOOK):
            if preset.figures[0] == "rates":
                figure = rates.draw(drawn, preset.series)
            else:
                figure = curves.draw(drawn, preset.series, [critical(each.cell, found) for each in drawn])
            title = f"{preset.title} ({FIGURES[name]})" if FIGURES[name] else preset.title
            heading(figure, title, _below(own, len(preset.configs), drawn, preset.series))
        made[name] = Drawn(figure, title, table(drawn, preset.series))
    return made


def critical(cell: Cell, found: Mapping[str, Mapping[int, Measured]]) -> Estimated | None:
    """Give the critical batch size of a cell's configuration on its data; None where none was measured.

    Critical batch sizes are of constant learning rates; they are marked beside the curves of every schedule.
    """
    for name in CONFIGURATIONS:
        if not differing(cell.fields, name):
            reading = found.get(name, {}).get(cell.fields["n_train"] * per_row(cell.rows))
            return None if reading is None else reading.doubled
    return None


def _below(own: Sequence[Row], of: int, drawn: Sequence[Curve], series: Sequence[str]) -> str:
    """Say what a figure was drawn from."""
    done = sum(row["status"] == "done" for row in own)
    seeds = len({(row["config"]["seed"], row["config"]["data_seed"]) for row in own})
    common = fixed([each.cell for each in drawn], series)
    runs = f"{done} of {of} runs, {seeds} seed(s)"
    return f"{common}. {runs}; losses on test data. Intervals: 95\N{NO-BREAK SPACE}%."
