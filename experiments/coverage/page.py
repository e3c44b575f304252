"""The table of the coverage study and its figures, from the rows alone: README.md, CELLS.md and PNGs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.coverage.figures import (
    LEVEL,
    METHOD_STYLE,
    Row,
    draw_all,
    interval,
    named,
    save,
    select,
    values_of,
)
from experiments.markdown import table
from gns.estimate import MIN_STEPS

LOWEST, HIGHEST = 0.93, 0.97


def usable(rows: Iterable[Row]) -> list[Row]:
    """Keep the finished rows with the most repeats.

    Args:
        rows: of one file; failed cells and a quicker run may be among them.

    Returns:
        Rows of one number of repeats, in their order.

    Raises:
        ValueError: there is none.
    """
    rows = [row for row in rows if row["status"] == "done"]
    if not rows:
        raise ValueError(
            "no finished cell among the rows: nothing to draw. Run `python -m experiments.coverage` first, "
            "or give the folder of a run with --out."
        )
    most = max(row["config"]["repeats"] for row in rows)
    return select(rows, repeats=most)


def report(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write figures and tables.

    Args:
        rows: of one file.
        out: folder, made if missing.

    Returns:
        What was written.

    Raises:
        ValueError: no row is finished.
    """
    failed = [row for row in rows if row["status"] != "done"]
    rows = usable(rows)
    out.mkdir(parents=True, exist_ok=True)
    figures = draw_all(rows)
    for name, figure in figures.items():
        save(figure, out / name)
    parts = [head(rows, failed), target(rows), levels(rows), conditional(rows), methods(rows), tails(rows)]
    pictures = [f"![{name}]({name})" for name in figures]
    (out / "README.md").write_text("\n\n".join([*parts, "## Figures", *pictures]) + "\n", encoding="utf-8")
    (out / "CELLS.md").write_text(every_cell(rows), encoding="utf-8")
    return [out / name for name in (*figures, "README.md", "CELLS.md")]


def share(row: Row, method: str = "toolkit", level: int = LEVEL, what: str = "covered") -> float:
    """Share of a method's sets that hold the truth, or are bounded."""
    return row["methods"][method][what][level] / row["config"]["repeats"]


def half_bounded(row: Row) -> bool:
    """Whether at least half of the toolkit's 95 % sets have an upper end."""
    return share(row, what="bounded") >= 0.5


def percent(value: float, digits: int = 1) -> str:
    """Write a share in per cent."""
    return f"{100 * value:.{digits}f}"


def place(row: Row) -> str:
    """Name a cell."""
    c = row["config"]
    where = "G in the noisiest direction" if c["direction"] == "top" else "G spread evenly"
    size = f"n = {c['n']}, K = {c['k']}, B = {c['b_simple']:,}"
    return f"{named(c['law'])}, {named(c['spectrum'])}, {where}, {size}"


def head(rows: Sequence[Row], failed: Sequence[Row]) -> str:
    """What was run."""
    repeats, first = rows[0]["config"]["repeats"], rows[0]
    low, high = interval(round(0.95 * repeats), repeats)
    made = ", ".join(sorted({row["commit"] for row in rows}))
    lost = f" **{len(failed)} cells failed and are missing here.**" if failed else ""
    versions = f"Python {first['python']}, numpy {first['numpy']}, scipy {first['scipy']}"
    return f"""# Coverage of the confidence sets

How often do the sets hold the true noise scale? {len(rows):,} cells of {repeats:,} simulated runs each.{lost}
Written by `python -m experiments.coverage` from `rows.jsonl.gz`; do not edit. The rows were made at commit
{made} with {versions}, seed {first["config"]["seed"]}.

- A run is K steps of n examples at one parameter point; each step gives tr Σ and |G|² as the monitor records
  them, and a method turns the K pairs into a set. `toolkit` is what `gns.estimate.estimate` returns, hull and
  widening included, counted as it is reported (but for the one run in 500 that it takes for a drifting one).
- Noise has d = 64 dimensions: flat, 1/j and j⁻² spectra have r_eff = 64, 13.8 and 2.45. Gaussian; t₅:
  multivariate, a whole example is loud or quiet; lognormal: independent coordinates of kurtosis 114, skewed
  towards G.
- G is spread evenly over the eigendirections (the average GᵀΣG), or lies in the noisiest one (the largest).
- Monte Carlo error of one cell at 95 %: {percent(low)} … {percent(high)} % (exact binomial 95 % interval).
  Cells of one law, spectrum and n share a noise, so that neighbours err together.
- Every cell of the toolkit's 95 % set: [CELLS.md](CELLS.md).
- Since these rows were made a set with |G|² below 0 has no upper end in any case. That changes none of
  108,000 sets of 20 and 50 steps that were drawn to see, and makes 1 % of those of 3 steps wider."""


def _verdict(rows: Sequence[Row], low: float, high: float) -> list[str]:
    """Count the cells of a group, those within the wanted range, and give the range that was found."""
    found = [share(row) for row in rows]
    inside = sum(low <= value <= high for value in found)
    ends = (f"{percent(min(found))} … {percent(max(found))}") if found else "–"
    return [str(len(rows)), str(inside), ends]


def target(rows: Sequence[Row]) -> str:
    """Set the toolkit's 95 % set against what was asked of it before the study."""
    gaussian = [row for row in select(rows, law="gaussian") if row["config"]["k"] >= MIN_STEPS]
    half = [row for row in gaussian if half_bounded(row)]
    rest = [row for row in gaussian if not half_bounded(row)]
    body = [
        ["at least half the sets bounded", "93–97 %", *_verdict(half, LOWEST, HIGHEST)],
        ["elsewhere", "at least 93 %", *_verdict(rest, LOWEST, 1.0)],
    ]
    missed = [row for row in half if not LOWEST <= share(row) <= HIGHEST]
    missed += [row for row in rest if share(row) < LOWEST]
    lines = [_miss(row) for row in missed] or ["No cell misses the target."]
    header = ["Gaussian cells, K ≥ 20", "wanted", "cells", "on target", "coverage (%)"]
    return "\n\n".join(["## Against the target, 95 % nominal", table(header, body), "\n".join(lines)])


def _miss(row: Row) -> str:
    """One cell off target, with its Monte Carlo interval and whether noise explains it."""
    repeats = row["config"]["repeats"]
    low, high = interval(row["methods"]["toolkit"]["covered"][LEVEL], repeats)
    noise = low <= HIGHEST and high >= LOWEST
    reason = "within Monte Carlo error of the target" if noise else "beyond Monte Carlo error"
    return f"- {place(row)}: {percent(share(row))} % ({percent(low)} … {percent(high)}), {reason}."


def levels(rows: Sequence[Row]) -> str:
    """Coverage at each nominal level, where sets are mostly bounded and where not."""
    body = []
    for law in values_of(rows, "law"):
        for k in values_of(rows, "k"):
            some = select(rows, law=law, k=k)
            line = [named(law), str(k)]
            for level in range(3):
                for wanted in (True, False):
                    found = [
                        share(row, level=level)
                        for row in some
                        if (share(row, "toolkit", level, "bounded") >= 0.5) is wanted
                    ]
                    line.append(f"{percent(min(found))} … {percent(max(found))}" if found else "–")
            body.append(line)
    header = ["law", "K"] + [f"{p} %, {where}" for p in (80, 90, 95) for where in ("bounded", "not")]
    text = """Lowest and highest coverage (%) of the toolkit's sets over spectra, n, directions and true
B: cells where at least half the sets of that level are bounded, and the others."""
    return "\n\n".join(["## Every level", text, table(header, body)])


def conditional(rows: Sequence[Row]) -> str:
    """Coverage among the runs that said `measured`."""
    body = []
    for law in values_of(rows, "law"):
        some = [row for row in select(rows, law=law) if row["config"]["k"] >= MIN_STEPS]
        for low, high in ((0.9, 1.01), (0.5, 0.9), (0.1, 0.5), (0.0, 0.1)):
            cells = [row for row in some if low <= share(row, what="bounded") < high]
            tallies = [row["methods"]["toolkit"] for row in cells]
            measured = sum(t["bounded"][LEVEL] for t in tallies)
            right = sum(t["covered_bounded"][LEVEL] for t in tallies)
            wrong = [share(r, what="bounded") - share(r, what="covered_bounded") for r in cells]
            if measured:
                of = f"{100 * low:.0f}–{min(100, 100 * high):.0f} %"
                line = [named(law), of, str(len(cells)), percent(right / measured), percent(max(wrong))]
                body.append(line)
    share_name, right_name = "runs that say “measured”", "coverage given “measured” (%)"
    header = ["law", share_name, "cells", right_name, "worst cell: wrong “measured” (% of runs)"]
    text = """How often is a set right *given* that its status is `measured` (95 % nominal, K ≥ 20)?
Where the data resolve B, about as often as nominal. Where they do not, `measured` is itself the
accident, and the rare set that claims it is mostly wrong: what is held there is the chance of the
accident, in the last column. No rule that sees one run alone can tell such a run from one in which B is
small."""
    return "\n\n".join(["## Given the status `measured`", text, table(header, body)])


def methods(rows: Sequence[Row]) -> str:
    """All methods beside each other, K = 50, over the true B."""
    k = 50 if 50 in values_of(rows, "k") else values_of(rows, "k")[-1]
    body = []
    for method in METHOD_STYLE:
        for truth in values_of(rows, "b_simple"):
            some = select(rows, law="gaussian", k=k, b_simple=truth)
            found = sorted(share(row, method) for row in some)
            middle = select(some, spectrum="1/j", n=16, direction="even")
            if not found or not middle:
                continue
            tally = middle[0]["methods"][method]
            span = f"{percent(found[0])} … {percent(found[-1])}"
            body.append(
                [named(method), f"{truth:,}", span, _number(tally["width"][LEVEL]), _number(tally["point"])]
            )
    header = ["method", "true B", "coverage (%)", "median width / B", "median number printed / B"]
    text = f"""Nominal 95 %, Gaussian, K = {k}: coverage over spectra, n and directions; width and the
number itself for the 1/j spectrum, n = 16, G spread evenly; ∞ where |G|² averages below 0. The
exponential averages (decay 0.99, with the usual correction at the start) print a bare number; they are
given the interval that their weights imply. “Clamped”: |G|² of a step is set to 0 where it is negative."""
    return "\n\n".join(["## Beside other methods", text, table(header, body)]) if body else ""


def _number(value: float | None) -> str:
    return "∞" if value is None else f"{value:.3g}"


def tails(rows: Sequence[Row]) -> str:
    """Heavy tails by spectrum and K, without a target."""
    body = []
    for law in values_of(rows, "law"):
        for spectrum in values_of(rows, "spectrum"):
            line = [named(law), named(spectrum)]
            for k in values_of(rows, "k"):
                some = select(rows, law=law, spectrum=spectrum, k=k)
                worst = min(some, key=share) if some else None
                c = worst["config"] if worst else {}
                line.append(
                    f"{percent(share(worst))} (n = {c['n']}, B = {c['b_simple']:,})" if worst else "–"
                )
            body.append(line)
    header = ["law", "spectrum", *(f"K = {k}" for k in values_of(rows, "k"))]
    text = """The toolkit's worst cell, nominal 95 % (%). Under heavy tails a set is wrong because tr Σ
is: its average reads low until one of the few loud examples is met. No target was set for K = 10, t₅
and lognormal."""
    return "\n\n".join(["## Heavy tails, shown and not hidden", text, table(header, body), sides(rows)])


def sides(rows: Sequence[Row]) -> str:
    """On which side of the truth the sets that miss it lie, by law."""
    said = []
    for law in values_of(rows, "law"):
        some = [row for row in select(rows, law=law) if row["config"]["k"] >= MIN_STEPS and half_bounded(row)]
        below, above = (
            sum(row["methods"]["toolkit"][side][LEVEL] for row in some) for side in ("low_miss", "high_miss")
        )
        if below + above:
            said.append(f"{named(law)} {percent(below / (below + above), 0)} %")
    text = """Share of the misses in which the set lies below the truth (mostly bounded cells, K ≥ 20), which
would be a half of a set that is right on both sides:"""
    return f"{text} {', '.join(said)}." if said else ""


def every_cell(rows: Sequence[Row]) -> str:
    """All cells of the toolkit's 95 % set."""
    parts = [
        "# Every cell of the toolkit's 95 % set",
        "Coverage in %, in brackets the share of bounded sets in %.",
    ]
    ks = values_of(rows, "k")
    for law in values_of(rows, "law"):
        for spectrum in values_of(rows, "spectrum"):
            for direction in values_of(rows, "direction"):
                some = select(rows, law=law, spectrum=spectrum, direction=direction)
                if not some:
                    continue
                where = "spread evenly" if direction == "even" else "in the noisiest direction"
                body = []
                for n in values_of(some, "n"):
                    for truth in values_of(some, "b_simple"):
                        line = {row["config"]["k"]: row for row in select(some, n=n, b_simple=truth)}
                        body.append([str(n), f"{truth:,}", *(_cell(line.get(k)) for k in ks)])
                parts.append(f"## {named(law)}, {named(spectrum)}, G {where}")
                parts.append(table(["n", "true B", *(f"K = {k}" for k in ks)], body))
    return "\n\n".join(parts) + "\n"


def _cell(row: Row | None) -> str:
    return "–" if row is None else f"{percent(share(row))} ({percent(share(row, what='bounded'), 0)})"
