"""`python -m experiments.overhead.table ROWS.jsonl …`: table and figure of what was measured, from rows only.

Writes `overhead.md` and `overhead.png` beside the first file, or into `--out`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.overhead.measure import ratio

AA = "untouched (A/A)"
BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#767676", "#222222"
GIB = 2**30


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Read rows; of one setting and arm on one machine, the last."""
    found = {}
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found[row["machine"]["device"], row["setting"]["name"], row["arm"]] = row
    return list(found.values())


def by_setting(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(Device, setting) → its rows, as they came."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["machine"]["device"], row["setting"]["name"]), []).append(row)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as Markdown: median of the paired ratios with quartiles, milliseconds, peak memory."""
    lines = []
    for (device, name), arms in by_setting(rows).items():
        about = arms[0]["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v)
        lines += [
            f"### {name}, {arms[0]['setting']['dtype']}, on {device}",
            "",
            f"Python {about['python']}, {versions}; {about['threads']} threads; commit {about['commit']}; "
            f"{len(arms[0].get('arm_s', []))} pairs.",
            "",
            "| step | time, × untouched (quartiles) | untouched, ms | memory, × untouched |",
            "| --- | --- | --- | --- |",
            *map(_line, arms),
            "",
        ]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"| {row['arm']} | could not run: {row['error'][:80].replace('|', '/')} | | |"
    middle, low, high = ratio(row)
    plain = sorted(row["untouched_s"])[len(row["untouched_s"]) // 2]
    memory = "not measured"
    if "arm_peak_bytes" in row:
        memory = f"{row['arm_peak_bytes'] / row['untouched_peak_bytes']:.3f}"
        memory += f" of {row['untouched_peak_bytes'] / GIB:.1f} GiB"
    elif "arm_saved_bytes" in row:
        memory = f"{row['arm_saved_bytes'] / row['untouched_saved_bytes']:.3f}"
        memory += f" of {row['untouched_saved_bytes'] / 2**20:.0f} MiB saved for backward"
    return f"| {row['arm']} | {middle:.3f} ({low:.3f} … {high:.3f}) | {1e3 * plain:.1f} | {memory} |"


def figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw the ratio of every arm that ran, with its quartiles; grey, the untouched step beside itself."""
    settings = by_setting([r for r in rows if r["status"] == "ok"])
    heights = [len(arms) for arms in settings.values()]
    made = Figure(figsize=(7.4, 0.9 + sum(0.34 * h + 0.62 for h in heights)), dpi=160, layout="constrained")
    axes = made.subplots(
        len(settings), 1, sharex=True, height_ratios=[h + 0.6 for h in heights], squeeze=False
    )
    for ax, ((device, name), arms) in zip(axes[:, 0], settings.items(), strict=True):
        for y, row in enumerate(arms):
            middle, low, high = ratio(row)
            ours = row["arm"].startswith("monitor")
            colour = GREY if row["arm"] == AA else BLUE if ours else ORANGE
            ax.plot([low, high], [y, y], color=colour, linewidth=4, alpha=0.35, solid_capstyle="butt")
            ax.plot([middle], [y], "o" if ours else "s", color=colour, markersize=6)
            ax.annotate(f"{middle:.3f}", (high, y), xytext=(6, 0), textcoords="offset points", va="center")
        ax.axvline(1, color=INK, linewidth=0.8)
        ax.set_yticks(range(len(arms)), [r["arm"] for r in arms])
        ax.set_ylim(len(arms) - 0.4, -0.6)
        ax.set_title(f"{name}, {device}", loc="left", fontsize=10)
        ax.set_xscale("log")
        ax.grid(axis="x", color="#E4E4E4", which="both")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    last = axes[-1, 0]
    last.set_xticks([1, 1.25, 1.5, 2, 3, 4])
    last.xaxis.set_minor_locator(NullLocator())
    last.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    last.set_xlim(0.95, 1.25 * max(ratio(r)[2] for r in rows if r["status"] == "ok"))
    last.set_xlabel("time of a step, × the untouched step (median of pairs, quartiles)")
    return made


def main() -> None:
    """Read, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    out = given.out or given.rows[0].parent
    rows = read(given.rows)
    (out / "overhead.md").write_text(table(rows))
    FigureCanvasAgg(figure(rows)).print_png(str(out / "overhead.png"))
    print(table(rows))


if __name__ == "__main__":
    main()
