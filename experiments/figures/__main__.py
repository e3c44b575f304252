"""`python -m experiments.figures --preset smoke`: draw the figures of a sweep from its rows.

Reads runs/sweeps/NAME/rows.jsonl (or `--rows`, .jsonl or .jsonl.gz, several of them) and writes a PNG for
each of the preset's figures, and table.md, into runs/sweeps/NAME/figures (or `--out`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from experiments import grids, rowsfile
from experiments.analysis.cells import cells, varied
from experiments.analysis.curves import Curve, curve
from experiments.configs import RunError
from experiments.figures import curves, rates, scales, surface
from experiments.figures.style import LOOK, fixed, heading
from experiments.figures.table import table

DRAW: dict[str, Callable[[Sequence[Curve], Sequence[str]], Figure]] = {
    "curves": curves.draw,
    "rates": rates.draw,
    "surface": surface.draw,
    "scales": scales.draw,
}
NOTES = {
    "curves": "Open markers and arrows: beyond what was tried.",
    "rates": "Off by: root mean square of measured/fitted, over the degrees of freedom that are left.",
    "surface": "Mean over seeds; line: best rate; ×: at least one seed diverged; white: not run.",
    "scales": "Open markers: at the edge of what was tried.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and draw; exit with 2 and a word on what is missing if that cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.figures", description="Draw a sweep's figures."
    )
    parser.add_argument("--preset", required=True, help="name, or path of a TOML file")
    parser.add_argument("--rows", type=Path, nargs="+", help="(default: runs/sweeps/NAME/rows.jsonl)")
    parser.add_argument("--out", type=Path, help="folder (default: figures beside the rows)")
    asked = parser.parse_args(arguments)
    try:
        preset = grids.load(asked.preset)
        paths = asked.rows or [Path("runs/sweeps") / preset.name / "rows.jsonl"]
        written = draw_all(preset, read(paths), asked.out or paths[0].parent / "figures")
    except RunError as error:
        parser.exit(2, f"{error}\n")
    print("\n".join(str(path) for path in written))


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read rows of a sweep, each run once.

    Raises:
        RunError: a file is missing.
    """
    if missing := [str(path) for path in paths if not path.exists()]:
        raise RunError(
            f"{', '.join(missing)}: no such file; python -m experiments.sweep --preset NAME makes it"
        )
    found = [row for path in paths for row in rowsfile.read(path)]
    return list(rowsfile.results(found).values())


def draw_all(preset: grids.Preset, found: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Draw a preset's figures and write its table.

    Args:
        preset: whose runs they are; rows of other runs are left out.
        found: rows.
        out: folder, made if missing.

    Returns:
        What was written.

    Raises:
        RunError: none of the rows is a result of the preset.
    """
    own = preset.own(found)
    sorted_cells = [cell for cell in cells(own) if (cell.validation < float("inf")).any()]
    if not sorted_cells:
        raise RunError(f"preset {preset.name}: none of {len(found)} rows is a finished run of it")
    series = preset.series or tuple(varied(sorted_cells))
    drawn = [curve(cell) for cell in sorted_cells]
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "table.md"]
    below = _below(preset, own, fixed(sorted_cells, series))
    text = f"{preset.title}: {preset.question}\n\n{table(drawn, series)}\n\n{below}\n"
    written[0].write_text(text, encoding="utf-8")
    for name in preset.figures:
        with matplotlib.rc_context(LOOK):
            figure = DRAW[name](drawn, series)
            heading(figure, preset.title, f"{below} {NOTES[name]}")
            written.append(out / f"{name}.png")
            figure.savefig(written[-1], dpi=130, metadata={"Software": None})
    return written


def _below(preset: grids.Preset, own: Sequence[dict[str, Any]], common: str) -> str:
    """Say what a figure was drawn from, and how to read its intervals."""
    statuses = [row["status"] for row in own]
    runs = f"{statuses.count('done')} of {len(preset.configs)} runs"
    if diverged := statuses.count("diverged"):
        runs += f", {diverged} diverged (censored)"
    seeds = len({(row["config"]["seed"], row["config"]["data_seed"]) for row in own})
    return (
        f"{common}. {runs}, {seeds} seed(s); rates chosen on validation, losses on test data. Intervals: "
        "95\N{NO-BREAK SPACE}%, bootstrap over seeds, what a seed does to all batch sizes left out."
    )


if __name__ == "__main__":
    main()
