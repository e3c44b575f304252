"""Figures and table of the frozen probe's study, from its rows alone: FROZEN.md and two PNGs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiments.coverage.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LEVEL,
    LOOK,
    ORANGE,
    VERMILION,
    Row,
    band,
    curve,
    interval,
    legend,
    named,
    save,
    select,
    stretched,
    truth_axis,
    values_of,
)
from experiments.coverage.noise import SPECTRA
from experiments.coverage.page import percent, share, usable
from experiments.markdown import table
from theory.intervals import planned_detection_limit

ONE_SIDED_5 = 1  # place of the 90 % set, whose upper end is a one-sided test of |G|² > 0 at 5 %
Z_5 = 1.645
STYLE = {
    "score": (BLUE, "o", "all pairs, score set"),
    "jackknife": (GREEN, "D", "all pairs, jackknife"),
    "steps": (ORANGE, "s", "50 training steps"),
}


def report(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write figures and table.

    Args:
        rows: of one file.
        out: folder, made if missing.

    Returns:
        What was written.

    Raises:
        ValueError: no row is finished.
    """
    failed = sum(row["status"] != "done" for row in rows)
    rows = usable(rows)
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(LOOK):
        figures = {"frozen_coverage.png": coverage(rows), "frozen_reach.png": reach(rows)}
    for name, figure in figures.items():
        save(figure, out / name)
    lost = f" **{failed} cells failed and are missing here.**" if failed else ""
    parts = [head(rows, lost), covered(rows), limits(rows), *(f"![{name}]({name})" for name in figures)]
    (out / "FROZEN.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [out / name for name in (*figures, "FROZEN.md")]


def power(row: Row, how: str) -> tuple[int, int]:
    """(probes that saw a gradient at a one-sided 5 %, all probes); how: "flips" or a method."""
    seen = row["flips"] if how == "flips" else row["methods"][how]["bounded"][ONE_SIDED_5]
    return seen, row["config"]["repeats"]


def limit(rows: Sequence[Row], how: str) -> float:
    """True B at which half the probes see the gradient, by interpolation in log B; NaN outside the cells."""
    log_b = [np.log(row["config"]["b_simple"]) for row in rows]
    shares = [power(row, how)[0] / power(row, how)[1] for row in rows]
    for i in range(len(rows) - 1):
        if shares[i] >= 0.5 > shares[i + 1]:
            part = (shares[i] - 0.5) / (shares[i] - shares[i + 1])
            return float(np.exp(log_b[i] + part * (log_b[i + 1] - log_b[i])))
    return float("nan")


def planned(spectrum: str, row: Row) -> tuple[float, float]:
    """Planned limits of training steps and of all pairs pooled, in examples."""
    r_eff, c = 1 / float((SPECTRA[spectrum] ** 2).sum()), row["config"]
    steps = planned_detection_limit(c["n"], c["k"], r_eff, Z_5)
    return steps, planned_detection_limit(c["n"] * c["k"], 1, r_eff, Z_5)


def head(rows: Sequence[Row], lost: str) -> str:
    """What was run."""
    c, repeats = rows[0]["config"], rows[0]["config"]["repeats"]
    low, high = interval(round(0.95 * repeats), repeats)
    made = ", ".join(sorted({row["commit"] for row in rows}))
    return f"""# The frozen probe: coverage and reach

{c["n"] * c["k"]} examples as {c["k"]} batches of {c["n"]} at one parameter point, all pairs pooled
(score set, delete-one-batch jackknife, sign-flip test), and the same batches as {c["k"]} training steps.
{len(rows):,} cells of {repeats:,} simulated probes each.{lost} Written by
`python -m experiments.coverage.frozen` from `frozen.jsonl.gz` (commit {made}, seed {c["seed"]}); do not edit.
Laws, spectra and directions are those of [README.md](README.md). Monte Carlo error of one cell at 95 %:
{percent(low)} … {percent(high)} %."""


def covered(rows: Sequence[Row]) -> str:
    """Coverage of both sets over the cells."""
    body = []
    for law in values_of(rows, "law"):
        for spectrum in values_of(rows, "spectrum"):
            some = select(rows, law=law, spectrum=spectrum)
            line = [named(law), named(spectrum)]
            for method in STYLE:
                for wanted in (True, False):
                    found = [r for r in some if (share(r, method, what="bounded") >= 0.5) is wanted]
                    shares = [share(r, method) for r in found]
                    line.append(f"{percent(min(shares))} … {percent(max(shares))}" if shares else "–")
            body.append(line)
    header = ["law", "spectrum"]
    header += [f"{method}, {where}" for method in STYLE for where in ("mostly bounded", "else")]
    text = """Lowest and highest coverage (%) of the nominal 95 % sets over true B and both directions, in
cells where at least half of the method's own sets are bounded, and in the others."""
    return "\n\n".join(["## Coverage", text, table(header, body)])


def limits(rows: Sequence[Row]) -> str:
    """How far each method sees."""
    body = []
    for law in values_of(rows, "law"):
        for spectrum in values_of(rows, "spectrum"):
            some = select(rows, law=law, spectrum=spectrum, direction="even")
            if not some:
                continue
            found = {how: limit(some, how) for how in ("steps", "score", "jackknife", "flips")}
            plan = planned(spectrum, some[0])
            numbers = (plan[0], found["steps"], plan[1], found["flips"], found["score"], found["jackknife"])
            body.append([named(law), named(spectrum), *(_number(v) for v in numbers)])
    header = ["law", "spectrum", "steps: planned", "steps: found"]
    header += ["all pairs: planned", "sign-flip test: found", "score set: found", "jackknife: found"]
    text = """The true B, in examples, at which half the runs see that there is a gradient, one-sided 5 %
(for the sets: the 90 % set has an upper end), G spread evenly. Planned: √(b(b − 1)K·r_eff/2)/1.645 with
b = 16, K = 50 for steps and b = 800, K = 1 for all pairs, a normal approximation that ignores what G itself
adds to the spread. The jackknife's variance of a U-statistic is twice too large where |G|² is small, so its
set gives up before the sign-flip test does; the score set does not, and takes its upper end only where that
test sees a gradient too."""
    return "\n\n".join(["## Reach", text, table(header, body)])


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{float(f'{value:.3g}'):,.0f}"


def coverage(rows: Sequence[Row]) -> Figure:
    """Coverage of the 95 % sets of both methods over the true B: laws down, spectra across."""
    laws, spectra = values_of(rows, "law"), values_of(rows, "spectrum")
    figure = Figure(figsize=(3.4 * len(spectra) + 0.6, 2.1 * len(laws) + 1.2), layout="constrained")
    panels = figure.subplots(len(laws), len(spectra), sharex=True, sharey=True, squeeze=False)
    floor = min(100 * share(row, method) for row in rows for method in STYLE)
    for i, law in enumerate(laws):
        for j, spectrum in enumerate(spectra):
            axes = panels[i, j]
            band(axes)
            for m, (method, (colour, marker, _)) in enumerate(STYLE.items()):
                for direction, dash, fill in (("even", "-", colour), ("top", ":", "white")):
                    some = select(rows, law=law, spectrum=spectrum, direction=direction)
                    style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": dash}
                    shift = 0.2 * (m - 1) + (0.05 if direction == "top" else -0.05)
                    counts = [(r["methods"][method]["covered"][LEVEL], r["config"]["repeats"]) for r in some]
                    curve(axes, counts, shift, markerfacecolor=fill, **style)
            stretched(axes, min(88.0, floor - 1))
            truth_axis(axes, rows)
            axes.set_title(f"{named(law)}, {named(spectrum)}")
            axes.tick_params(axis="x", labelrotation=45)
            if i == len(laws) - 1:
                axes.set_xlabel("true B (examples)")
            if j == 0:
                axes.set_ylabel("coverage (%)")
    title = "Coverage of nominal 95 % sets: 800 examples at one parameter point, and as 50 training steps"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    handles: list[Any] = [Line2D([], [], color=c, marker=m, label=label) for c, m, label in STYLE.values()]
    top = {"color": INK, "marker": "o", "markerfacecolor": "white", "linestyle": ":"}
    handles += [
        Line2D([], [], label="G where noise is largest", **top),
        Patch(color="#EFEFEF", label="93–97 %"),
    ]
    legend(figure, handles)
    return figure


def reach(rows: Sequence[Row]) -> Figure:
    """Share of Gaussian runs that see the gradient, over the true B, beside the planned limits."""
    rows = select(rows, law=values_of(rows, "law")[0], direction="even")
    spectra = values_of(rows, "spectrum")
    figure = Figure(figsize=(3.6 * len(spectra) + 0.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(spectra), sharey=True, squeeze=False)[0]
    lines = {
        "steps": (ORANGE, "s", "-", "50 training steps, set bounded"),
        "score": (BLUE, "o", "-", "all pairs, score set bounded"),
        "jackknife": (GREEN, "D", "-", "all pairs, jackknife set bounded"),
        "flips": (VERMILION, "^", "--", "all pairs, sign-flip test"),
    }
    for axes, spectrum in zip(panels, spectra, strict=True):
        some = select(rows, spectrum=spectrum)
        truths = [row["config"]["b_simple"] for row in some]
        for how, (colour, marker, dash, _) in lines.items():
            counts = [power(row, how) for row in some]
            axes.plot(truths, [100 * a / b for a, b in counts], color=colour, marker=marker, linestyle=dash)
            ends = 100 * np.array([interval(*pair) for pair in counts]).T
            axes.vlines(truths, ends[0], ends[1], color=colour, linewidth=0.8)
        for value, colour in zip(planned(spectrum, some[0]), (ORANGE, BLUE), strict=True):
            axes.axvline(value, color=colour, linewidth=1, linestyle=":")
            axes.text(value, 103, f"{value:,.0f}", color=colour, ha="center", fontsize=8)
        axes.axhline(50, color=GREY, linewidth=0.8)
        axes.axhline(5, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_ylim(0, 108)
        axes.set_title(f"spectrum {named(spectrum)}\n")
        axes.set_xlabel("true B (examples)")
    panels[0].set_ylabel("runs that see a gradient,\none-sided 5 % (%)")
    title = f"How far 800 examples see ({named(rows[0]['config']['law'])}); dotted: planned limits"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    legend(figure, [Line2D([], [], color=c, marker=m, linestyle=d, label=t) for c, m, d, t in lines.values()])
    return figure
