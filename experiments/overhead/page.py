"""`python -m experiments.overhead.page FOLDER`: the benchmark's page, table and figures, from its rows only.

Reads `rows.jsonl` and `notes.md` (what the profile shows is left, and what was tried) in the folder; writes
`README.md`, `overhead.png` and a figure a sweep there. With `--readme README.md` the table of what was wanted
and reached goes into the project's README, between its two marks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg

from experiments.overhead import sweepfigure, table
from experiments.overhead.measure import ratio
from experiments.overhead.sweeps import SWEEPS
from experiments.overhead.table import AA

WANTED = {  # setting → most time and memory at every=1, × untouched
    "width 512, r=16, 8×128": (1.05, 1.02),
    "width 768, r=16, 8×128": (1.03, 1.02),
    "width 1,024, r=16, 8×128": (1.03, 1.02),
    "width 512, full, 8×128": (1.25, 1.25),
    "width 512, full, 4×512": (1.4, 1.25),
}
HEAD = """# What the monitor costs on a CPU

Full optimizer steps (forward, backward, clip, AdamW), interleaved in one process, A B A B …; medians of
paired ratios to the untouched step, with quartiles. Beside each stands the untouched step beside itself:
nothing smaller than that is claimed. `make bench` makes all of it. This page is made from `rows.jsonl` alone,
by `python -m experiments.overhead.page experiments/results/overhead`. A GPU has [its own](../gpu/README.md).

## What was wanted, at `every=1`"""
HEAD_ROW = "setting | untouched beside itself | monitor | wanted | bytes saved | peak resident size | wanted"
IDLE = (
    "**Between measured steps** ({name}, counted): {operations} operations more than the untouched step, "
    "{tensors} tensors and {size} bytes more saved for backward. Calls of our hooks on layers: {calls}, "
    "together {spent:.0f} µs of a step of {step:.0f} ms: {share:.3f} %."
)
STARTUP = (
    "**Start-up**: attaching to a {name} model with {parameters} factors takes {seconds:.2f} s "
    "(wanted: 0.5 s)."
)
RANKS = (
    "**Two ranks** (DDP on gloo, a core each, {name} a rank): a measured step adds {calls:.2f} all-reduces, "
    "together {size:,.0f} bytes, on a thread of ours. Time × {middle:.3f} ({low:.3f} … {high:.3f}){beside}."
)
BEGIN, END = "<!-- overhead: begin, from rows -->", "<!-- overhead: end -->"
MIB = 2**20
Rows = list[dict[str, Any]]


def read(path: Path) -> Rows:
    """Read rows; of one setting, arm and sweep, the last. Resident sizes are measured more than once."""
    found: dict[Any, dict[str, Any]] = {}
    for i, line in enumerate(path.read_text().splitlines()):
        row = json.loads(line)
        again = i if row.get("what") == "rss" else None
        found[row["setting"]["name"], row.get("what"), row.get("sweep"), row.get("arm"), again] = row
    return list(found.values())


def timed(rows: Rows) -> Rows:
    """Give the rows of the table: neither swept nor counted."""
    return [row for row in rows if "what" not in row and "sweep" not in row]


def page(rows: Rows, notes: str) -> str:
    """Write the whole page as Markdown."""
    swept = [name for name in SWEEPS if any(row.get("sweep") == name for row in rows)]
    along = {name: f"{SWEEPS[name].title}: cost along {SWEEPS[name].xlabel}" for name in swept}
    parts = [
        HEAD,
        summary(rows),
        "## Beside the peers",
        table.table(timed(rows)),
        "![Time of a step by arm](overhead.png)",
        "## How it grows",
        *(f"![{text}](sweep-{name}.png)" for name, text in along.items()),
        "## Counted, and in fresh processes",
        *counted(rows),
        notes,
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def summary(rows: Rows) -> str:
    """Write the table of wanted and reached."""
    lines = [
        f"| {HEAD_ROW} |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (time, memory) in WANTED.items():
        here = [row for row in timed(rows) if row["setting"]["name"] == name]
        arms = {row["arm"]: row for row in here if row["status"] == "ok"}
        if not {AA, "monitor"} <= arms.keys():
            lines.append(f"| {name} | not yet measured | | {time} | | | {memory} |")
            continue
        ours = arms["monitor"]
        kept = ours["arm_saved_bytes"] / ours["untouched_saved_bytes"]
        missed = "" if ratio(ours)[0] <= time else ": missed"
        cells = [name, _spread(arms[AA]), _spread(ours), f"{time}{missed}"]
        lines.append(f"| {' | '.join(cells)} | {kept:.3f} | {_resident(rows, name)} | {memory} |")
    return "\n".join(lines)


def _spread(row: dict[str, Any]) -> str:
    middle, low, high = ratio(row)
    return f"{middle:.3f} ({low:.3f} … {high:.3f})"


def _resident(rows: Rows, name: str) -> str:
    """Peak resident size in a fresh process, × that of the untouched step."""
    found = [row for row in rows if row.get("what") == "rss" and row["setting"]["name"] == name]
    plain = [row["rss_peak"] for row in found if row["arm"] == "untouched"]
    ours = [row["rss_peak"] for row in found if row["arm"] == "monitor"]
    if not plain or not ours:
        return "not measured"
    base = statistics.median(plain)
    spread = (max(plain) - min(plain)) / base
    return f"{statistics.median(ours) / base:.3f} of {base / MIB:,.0f} MiB (untouched: ± {spread:.3f})"


def counted(rows: Rows) -> list[str]:
    """Say what was counted, a paragraph each."""
    there = {row["what"]: row for row in rows if "what" in row}
    said = [_idle(there["idle"])] if "idle" in there else []
    if "startup" in there:
        row = there["startup"]
        seconds, name = statistics.median(row["attach_s"]), row["setting"]["name"]
        said.append(STARTUP.format(name=name, parameters=row["parameters"], seconds=seconds))
    if "ranks" in there:
        said.append(_ranks(there["ranks"], timed(rows)))
    return said


def _idle(row: dict[str, Any]) -> str:
    calls, cost, step = row["hook_calls"], row["hook_seconds"], row["untouched_thread_s"]
    spent = sum(calls[kind] * seconds for kind, seconds in cost.items())
    return IDLE.format(
        name=row["setting"]["name"],
        operations=sum(map(abs, row["extra_operations"].values())),
        tensors=row["extra_saved"][0],
        size=row["extra_saved"][1],
        calls=", ".join(f"{calls[kind]} × {1e6 * each:.2f} µs ({kind})" for kind, each in cost.items()),
        spent=1e6 * spent,
        step=1e3 * step,
        share=100 * spent / step,
    )


def _ranks(row: dict[str, Any], alone: Rows) -> str:
    beside = [r for r in alone if r["arm"] == "monitor" and r["setting"] == row["setting"]]
    middle, low, high = ratio(row)
    return RANKS.format(
        name=row["setting"]["name"],
        calls=row["calls_a_step"],
        size=row["bytes_a_step"],
        middle=middle,
        low=low,
        high=high,
        beside=f"; one process: × {_spread(beside[-1])}" if beside and beside[-1]["status"] == "ok" else "",
    )


def write(folder: Path) -> list[Path]:
    """Write page and figures into the folder of the rows."""
    rows, notes = read(folder / "rows.jsonl"), folder / "notes.md"
    drawn = {}
    if any(row["status"] == "ok" for row in timed(rows)):
        drawn["overhead.png"] = table.figure(timed(rows))
    for name in SWEEPS:
        swept = [row for row in rows if row.get("sweep") == name]
        if any(row["status"] == "ok" for row in swept):
            drawn[f"sweep-{name}.png"] = sweepfigure.figure(name, swept)
    for name, figure in drawn.items():
        FigureCanvasAgg(figure).print_png(str(folder / name))
    (folder / "README.md").write_text(page(rows, notes.read_text() if notes.exists() else ""))
    return [folder / "README.md", *(folder / name for name in drawn)]


def insert(readme: Path, rows: Rows, folder: str) -> None:
    """Put table and figure between the marks of the project's README.

    Raises:
        ValueError: it has not both marks.
    """
    text = readme.read_text()
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no {BEGIN!r} followed by {END!r}; put both where the table belongs")
    about = rows[0]["machine"]
    head = f"On a CPU ({about['device']}, {about['threads']} threads), all steps measured"
    figure = f"![Time of a step by arm: the monitor beside its peers]({folder}/overhead.png)"
    said = f"{head} ([rows, peers, sweeps]({folder}/README.md)):\n\n{summary(rows)}\n\n{figure}\n"
    readme.write_text(f"{before}{begin}{said}{end}{after}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--readme", type=Path, help="of the project")
    given = parser.parse_args(arguments)
    print("\n".join(map(str, write(given.folder))))
    if given.readme is not None:
        insert(given.readme, read(given.folder / "rows.jsonl"), str(given.folder))


if __name__ == "__main__":
    main()
