"""`python -m experiments.overhead.table ROWS.jsonl …`: table and figure of what was measured, from rows only.

Writes `overhead.md` and `overhead.png` beside the first file, or into `--out`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments import markdown, rowsfile
from experiments.figures.palette import BLUE, GREY, INK, VERMILION
from experiments.overhead import verdicts
from experiments.overhead.measure import AA
from experiments.overhead.ratios import ratio

PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # under text that a line may cross
GIB, MIB = 2**30, 2**20
SAID = 130  # characters of an error
HEAD = (
    "step",
    "time, × untouched (95 % of the median)",
    "quartiles",
    "untouched, ms",
    "saved for backward",
    "peak memory, × untouched",
)
Row = Mapping[str, Any]


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Read rows; of one machine, setting, arm, count, sweep and repetition, the last."""
    found = {}
    for row in (row for path in paths for row in rowsfile.objects(path)):
        kind = tuple(row.get(key) for key in ("arm", "what", "sweep", "repeat"))
        found[row["machine"]["device"], row["setting"]["name"], *kind] = row
    return list(found.values())


def by_setting(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """(Device, setting) → its rows, as they came."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["machine"]["device"], row["setting"]["name"]), []).append(row)
    return found


def table(rows: Sequence[Row], counted: Sequence[Row] = ()) -> str:
    """Write the rows as Markdown: medians with intervals and quartiles, milliseconds, memory.

    Args:
        rows: of timed steps.
        counted: rows among which are resident sizes, where they were measured.
    """
    parts = []
    for (device, name), arms in by_setting(rows).items():
        about = arms[0]["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v)
        parts += [
            f"### {name}, {arms[0]['setting']['dtype']}, on {device}",
            f"Python {about['python']}, {versions}; {about['threads']} threads; commit {about['commit']}; "
            f"{_pairs(arms)}.",
            markdown.table(HEAD, [_line(row, counted) for row in arms]),
        ]
    return "\n\n".join(parts)


def _pairs(arms: Sequence[Row]) -> str:
    counts = sorted({len(row["arm_s"]) for row in arms if row["status"] == "ok"})
    if not counts:
        return "no pairs"
    least, most = counts[0], counts[-1]
    return f"{least} pairs an arm" if least == most else f"{least} to {most} pairs an arm"


def _line(row: Row, counted: Sequence[Row]) -> list[str]:
    if row["status"] != "ok":
        return [row["arm"], f"could not run: {shortened(row['error'])}", "", "", "", ""]
    found, saved = ratio(row), "not counted"
    if "arm_saved_bytes" in row:
        saved = f"{row['arm_saved_bytes'] / row['untouched_saved_bytes']:.3f}"
        saved += f" of {row['untouched_saved_bytes'] / MIB:.0f} MiB"
    plain = f"{1e3 * statistics.median(row['untouched_s']):.1f}"
    return [row["arm"], str(found), f"{found.low:.3f} … {found.high:.3f}", plain, saved, _peak(row, counted)]


def _peak(row: Row, counted: Sequence[Row]) -> str:
    if "arm_peak_bytes" in row:
        size = row["untouched_peak_bytes"] / GIB
        return f"{row['arm_peak_bytes'] / row['untouched_peak_bytes']:.3f} of {size:.1f} GiB"
    name, arm = row["setting"]["name"], row["arm"]
    base = verdicts.resident(counted, name)
    if base is not None and arm == AA:
        return f"± {base[1]:.3f} of {base[0] / MIB:,.0f} MiB resident"
    found = verdicts.peak(counted, name, arm)
    return f"{found / base[0]:.3f}" if base is not None and found is not None else "not measured"


def shortened(error: str) -> str:
    """Say an error in a line of a table: its first sentence, cut between words where it is long."""
    first = re.split(r"(?<=[.!])\s|\n", error.strip(), maxsplit=1)[0].rstrip(".")
    return textwrap.shorten(first, SAID, placeholder=" …").replace("|", "/")


def figure(rows: Sequence[Row], wanted: Mapping[str, float] | None = None) -> Figure:
    """Draw the ratio of every arm, a panel a setting, all on one scale.

    Args:
        rows: of timed steps; those that failed are said to.
        wanted: setting → most time, a dashed line.
    """
    settings = by_setting(rows)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    width = 2.3 + 2.25 * len(settings)
    made = Figure(figsize=(width, 1.25 + 0.3 * len(arms)), dpi=160, layout="constrained")
    panels = made.subplots(1, len(settings), sharex=True, sharey=True, squeeze=False)[0]
    for ax, ((_, name), here) in zip(panels, settings.items(), strict=True):
        _panel(ax, arms, {row["arm"]: row for row in here}, (wanted or {}).get(name))
        ax.set_title(name, loc="left", fontsize=9)
    panels[0].set_yticks(range(len(arms)), arms)
    panels[0].set_ylim(len(arms) - 0.4, -0.6)
    panels[0].set_xscale("log")
    most = max((ratio(r).most for r in rows if r["status"] == "ok"), default=1)
    panels[0].set_xlim(0.93, 1.3 * max(most, 1.25))
    panels[0].set_xticks([tick for tick in (1, 1.25, 1.5, 2, 3, 4) if tick < 1.2 * max(most, 1.25)])
    panels[0].xaxis.set_minor_locator(NullLocator())
    panels[0].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    devices = ", ".join(dict.fromkeys(device for device, _ in settings))
    made.supxlabel(
        f"time of a step, × the untouched step: median, 95 % bootstrap interval (dark), quartiles (light)"
        f"{'; dashed: wanted' if wanted else ''}; {devices}",
        fontsize=8,
    )
    return made


def _panel(ax: Axes, arms: Sequence[str], here: Mapping[str, Row], wanted: float | None) -> None:
    """Draw one setting."""
    for y, arm in enumerate(arms):
        if arm not in here:
            continue
        if here[arm]["status"] != "ok":
            ax.annotate("could not run", (1.02, y), va="center", fontsize=7, color=GREY, bbox=PAPER)
            continue
        found, ours = ratio(here[arm]), arm.startswith("monitor")
        colour = GREY if arm == AA else BLUE if ours else VERMILION
        ax.plot([found.low, found.high], [y, y], color=colour, linewidth=6, alpha=0.25, solid_capstyle="butt")
        ax.plot([found.least, found.most], [y, y], color=colour, linewidth=2)
        ax.plot([found.middle], [y], "o" if ours else "s", color=colour, markersize=5)
        at = (max(found.high, found.most), y)
        offset = {"xytext": (4, 0), "textcoords": "offset points"}
        ax.annotate(f"{found.middle:.3f}", at, va="center", fontsize=8, bbox=PAPER, **offset)
    ax.axvline(1, color=INK, linewidth=0.8)
    if wanted is not None:
        ax.axvline(wanted, color=BLUE, linewidth=0.9, linestyle="--")
    ax.grid(axis="x", color="#E4E4E4")
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Read, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    out = given.out or given.rows[0].parent
    rows = read(given.rows)
    (out / "overhead.md").write_text(table(rows) + "\n")
    FigureCanvasAgg(figure(rows)).print_png(str(out / "overhead.png"))
    print(table(rows))


if __name__ == "__main__":
    main()
