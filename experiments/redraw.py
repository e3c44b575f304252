"""`python -m experiments.redraw` (`make figures`): every published figure and page, from committed rows only.

Nothing is measured. Texts written by hand (`notes.md`, gpu/README.md) stay as they are.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import (
    frozen_rank,
    line_search,
    live,
    rows,
    rowsfile,
)
from experiments.configs import RunError
from experiments.coverage import frozen_page
from experiments.coverage import page as coverage_page
from experiments.evidence import __main__ as evidence
from experiments.overhead import page as overhead
from experiments.overhead import table as overhead_table
from experiments.packed import speed

RESULTS = Path(__file__).parent / "results"


def redraw(name: str, results: Path = RESULTS) -> list[Path]:
    """Make the figures and pages of one study again.

    Args:
        name: of `STUDIES`.
        results: folder of the studies' folders, with their rows.

    Returns:
        What was written.

    Raises:
        RunError: it has no rows there.
    """
    if not (results / name).is_dir():
        raise RunError(f"{results / name}: no such folder of rows")
    return STUDIES[name](results / name)


def _coverage(folder: Path) -> list[Path]:
    steps, frozen = rows.read(folder / "rows.jsonl.gz"), rows.read(folder / "frozen.jsonl.gz")
    return coverage_page.report(steps, folder) + frozen_page.report(frozen, folder)


def _evidence(folder: Path) -> list[Path]:
    return evidence.draw(evidence.read(folder), folder)


def _frozen_rank(folder: Path) -> list[Path]:
    found = [row for path in sorted(folder.glob("*.jsonl")) for row in rowsfile.objects(path)]
    return [_save(frozen_rank.figure(found), folder / "frozen_rank.png")]


def _gpu(folder: Path) -> list[Path]:
    found = overhead_table.read(sorted(folder.glob("*second-overhead*.jsonl")))
    (folder / "overhead.md").write_text(overhead_table.table(found) + "\n", encoding="utf-8")
    return [folder / "overhead.md", _save(overhead_table.figure(found), folder / "overhead.png")]


def _line_search(folder: Path) -> list[Path]:
    return [_save(line_search.draw(rows.read(folder / "rows.jsonl.gz")), folder / "line_search.png", 150)]


def _live(folder: Path) -> list[Path]:
    with (folder / "rows.csv").open(newline="") as file:
        found = [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]
    live.draw(found, folder / "live.png")
    return [folder / "live.png"]


def _packed(folder: Path) -> list[Path]:
    written = []
    for path in sorted(folder.glob("*.jsonl")):
        written.append(path.with_suffix(".md"))
        written[-1].write_text(speed.table(rowsfile.objects(path)), encoding="utf-8")
    return written


STUDIES: dict[str, Callable[[Path], list[Path]]] = {
    "coverage": _coverage,
    "evidence": _evidence,
    "frozen_rank": _frozen_rank,
    "gpu": _gpu,
    "line_search": _line_search,
    "live": _live,
    "overhead": overhead.write,
    "packed": _packed,
}


def _save(figure: Figure, path: Path, dpi: float | str = "figure") -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=dpi)
    return path


def _number(text: str) -> float | str:
    """A figure as such; everything else stays text."""
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if value.is_integer() and "." not in text else value


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, redraw; exit with 2 and a word on what is missing if that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m experiments.redraw", description=__doc__)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)} (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the studies' rows")
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.studies if name not in STUDIES]:
        parser.error(f"unknown study {', '.join(unknown)}; known: {', '.join(STUDIES)}")
    try:
        for name in asked.studies or STUDIES:
            print("\n".join(map(str, redraw(name, asked.results))), flush=True)
    except RunError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
