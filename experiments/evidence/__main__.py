"""`python -m experiments.evidence`: judge the predictions from committed rows; figures and a page.

    python -m experiments.evidence --collect runs/sweeps/laptop-critical    # take over a sweep's rows first
    python -m experiments.evidence                                          # figures and page from rows only
    python -m experiments.evidence --pages README.md experiments/README.md  # and the short form in those
    python -m experiments.evidence --notebook notebooks/optimal_batch.ipynb # and the notebook that shows them

Rows are read from experiments/results/evidence, one compressed file a sweep, frozen.jsonl.gz of
`experiments.evidence.frozen` and what `experiments.evidence.again` adds; figures and README.md are
written beside them, and the constants that `gns advise` names go into the package.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from experiments import rows, rowsfile
from experiments.configs import RunError
from experiments.evidence import calibrated, figures, front, page, paper, picture, story
from experiments.evidence.files import BRANCHES, CURVATURE, FOLDER, FROZEN, runs_in
from experiments.evidence.readout import Readout, read_out
from experiments.figures.style import LOOK, heading
from gns.advising.calibration import FILE

CALIBRATION = Path("gns/assets") / FILE  # what the package says of it


def collect(sweep: Path, folder: Path) -> Path:
    """Take over the results of a sweep's folder, as one compressed file.

    Raises:
        RunError: there are no rows.
    """
    source = sweep / "rows.jsonl"
    if not source.exists():
        raise RunError(f"{source}: no such file of rows")
    found = rowsfile.results(rowsfile.read(source)).values()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{sweep.name}.jsonl.gz"
    rows.write(target, [row for row in found if row["status"] in rowsfile.RESULTS])
    return target


def read(folder: Path) -> Readout:
    """Read everything that the rows of a folder say.

    Raises:
        RunError: there are none.
    """
    runs, frozen = runs_in(folder), rows.read(folder / FROZEN)
    if not runs and not frozen:
        raise RunError(f"{folder}: no rows; run a sweep, then --collect its folder")
    return read_out(runs, frozen, rows.read(folder / CURVATURE), rows.read(folder / BRANCHES))


def draw(found: Readout, folder: Path) -> list[Path]:
    """Draw what there are rows for, and write the page."""
    below = f"{found.runs:,} runs, {found.diverged} diverged (censored). Intervals: 95 %."
    drawn: dict[str, paper.Drawn] = {}
    with matplotlib.rc_context(LOOK):
        if any(each.noise for each in found.compared.values()):
            drawn[front.PICTURE] = paper.Drawn(picture.picture(found), picture.title(found))
            figure = figures.referee(found.compared, found.judged)
            drawn["referee"] = paper.Drawn(figure, "Noise scale and critical batch size")
        if found.compared:
            figure = figures.efficiency(found.compared)
            drawn["efficiency"] = paper.Drawn(figure, "Examples to one loss, over batch size")
        if found.frozen:
            figure = figures.frozen(found.frozen)
            drawn["frozen"] = paper.Drawn(figure, "Noise scales at initialisation, nothing trained")
        said_of = {"frozen": f"{len(found.frozen)} frozen probes.", front.PICTURE: picture.below(found)}
        for name, each in drawn.items():
            said = said_of.get(name, below)
            heading(each.figure, each.title, said)
        drawn |= paper.figures(found.rows, found.found)
        written = []
        for name, each in drawn.items():
            written.append(folder / f"{name}.png")
            each.figure.savefig(written[-1], dpi=130, metadata={"Software": None})
    text = folder / "README.md"
    text.write_text(page.page(found, drawn), encoding="utf-8")
    return [*written, text]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line; exit with 2 and a word on what is missing if it cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.evidence", description="Judge the predictions."
    )
    parser.add_argument("--collect", type=Path, nargs="+", metavar="SWEEP", help="folders of sweeps")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--pages", type=Path, nargs="+", help="with marks that the short form goes between")
    parser.add_argument(
        "--notebook", type=Path, help="to run again in place, e.g. notebooks/optimal_batch.ipynb"
    )
    asked = parser.parse_args(arguments)
    try:
        for sweep in asked.collect or []:
            print(collect(sweep, asked.folder))
        found = read(asked.folder)
        written = draw(found, asked.folder)
        if asked.folder == FOLDER:
            written.append(calibrated.write(found, CALIBRATION))
        written += front.insert(found, asked.folder, asked.pages or [])
        if asked.notebook is not None:
            written.append(story.rerun(asked.notebook))
        print("\n".join(map(str, written)))
    except RunError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
