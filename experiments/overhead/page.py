"""`python -m experiments.overhead.page FOLDER`: the benchmark's page, tables and figures, from its rows only.

Reads `rows.jsonl` and `notes.md` (what the profile shows is left, and what was tried: written by hand, with
no number that rows can give) in the folder; writes `README.md`, `overhead.png` and `sweeps.png` there. With
`--readme README.md` the tables of what was wanted and reached go into the project's, between its marks.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg

from experiments import markdown
from experiments.overhead import sweepfigure, table, verdicts
from experiments.overhead.presets import WANTED
from experiments.overhead.ratios import ratio
from experiments.overhead.verdicts import Rows, timed

HEAD = """# What the monitor costs on a CPU

Full optimizer steps (forward, backward, clip, AdamW), interleaved in one process, A B A C A …: every step of
an arm is divided by the mean of the untouched step before it and the one after it; the order of the arms
changes with each round; Python's collector runs between rounds. What is claimed is the **median (95 %
bootstrap interval)** of these ratios; quartiles tell how single steps scatter. Beside each stands the
untouched step beside itself (A/A): nothing smaller than that is claimed. `make bench` makes all of it. This
page is made from `rows.jsonl` alone, by `python -m experiments.overhead.page experiments/results/overhead`.
A GPU has [its own](../gpu/README.md)."""
RULE = """Reached or missed: the interval lies on one side of what was wanted, and the untouched step beside
itself is nearer to 1 than the median to what was wanted. Peers are behind where their interval lies above."""
SWEPT = """Few pairs a point. Points: medians; bars: their 95 % bootstrap intervals; grey: the untouched step
beside its own neighbours, with the interval of its median. What reaches beyond the panels is cut off."""
RESIDENT = """Resident size is the peak of a process forked for it from one that has only imported libraries,
with one thread; of the monitor in its first steps, with self-checks in them."""
IDLE = (
    "**Between measured steps** ({name}, counted): {operations} operations more than the untouched step, "
    "{tensors} tensors and {size} bytes more saved for backward. Calls of our hooks on layers: {calls}, "
    "together {spent:.0f} µs of a step of {step:.0f} ms: {share:.3f} %."
)
RANKS = (
    "**Two ranks** (DDP on gloo, a core each, {name} a rank): a measured step adds {calls:.2f} all-reduces, "
    "together {size:,.0f} bytes, on a thread of ours. Time × {found}{beside}."
)


def page(rows: Rows, notes: str) -> str:
    """Write the whole page as Markdown."""
    swept = any("sweep" in row for row in rows)
    parts = [
        HEAD,
        origin(rows),
        "## What was wanted, at `every=1`",
        summary(rows),
        RULE,
        RESIDENT,
        "## Beside the peers",
        table.table(timed(rows), rows),
        "![Time of a step by arm](overhead.png)",
        *(["## How it grows", "![Cost along each sweep](sweeps.png)", SWEPT] if swept else []),
        "## Counted, and in other processes",
        *counted(rows),
        notes,
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def summary(rows: Rows) -> str:
    """Write the tables of wanted and reached."""
    return "\n\n".join(
        part for part in (verdicts.times(rows), verdicts.sizes(rows), verdicts.others(rows)) if part
    )


def origin(rows: Rows) -> str:
    """Name commit and machine of the rows; warn if there are several, or files that no commit holds."""
    commits = Counter(str(row["machine"]["commit"]) for row in rows)
    devices = Counter(f"{row['machine']['device']}, {row['machine']['threads']} threads" for row in rows)
    parts = []
    for what, found in (("commit", commits), ("machine", devices)):
        if len(found) == 1:
            parts.append(f"All rows: {what} {next(iter(found))}.")
        else:
            each = ", ".join(f"{name} ({count} rows)" for name, count in found.items())
            parts.append(f"**Warning: rows of {len(found)} {what}s**, which are not to be compared: {each}.")
    dirty = [name for name in commits if name.endswith("-dirty") or name == "None"]
    if dirty:
        parts.append(f"**Warning: made with changes that no commit holds**: {', '.join(dirty)}.")
    return " ".join(parts)


def counted(rows: Rows) -> list[str]:
    """Say what was counted, a paragraph each."""
    there = {row["what"]: row for row in rows if "what" in row}
    done = {what: row for what, row in there.items() if row["status"] == "ok"}
    said = [_idle(done["idle"])] if "idle" in done else []
    if "left out" in done:
        said.append(f"**Left out, as there was no time for it**: {', '.join(done['left out']['parts'])}.")
    if "ranks" in done:
        said.append(_ranks(done["ranks"], done.get("alone")))
    failed = (what for what, row in there.items() if what != "rss" and row["status"] != "ok")
    return said + [f"**{what}** could not run: {table.shortened(there[what]['error'])}." for what in failed]


def _idle(row: Mapping[str, Any]) -> str:
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


def _ranks(row: Mapping[str, Any], alone: Mapping[str, Any] | None) -> str:
    return RANKS.format(
        name=row["setting"]["name"],
        calls=row["calls_a_step"],
        size=row["bytes_a_step"],
        found=ratio(row),
        beside=f"; one process with one thread: × {ratio(alone)}" if alone else "",
    )


def write(folder: Path) -> list[Path]:
    """Write page and figures into the folder of the rows."""
    rows, notes = table.read([folder / "rows.jsonl"]), folder / "notes.md"
    drawn = {}
    if any(row["status"] == "ok" for row in timed(rows)):
        wanted = {name: time for name, (time, _) in WANTED.items()}
        drawn["overhead.png"] = table.figure(timed(rows), wanted)
    swept = [row for row in rows if "sweep" in row and row["status"] == "ok"]
    if swept:
        drawn["sweeps.png"] = sweepfigure.figure(swept)
    for name, figure in drawn.items():
        FigureCanvasAgg(figure).print_png(str(folder / name))
    (folder / "README.md").write_text(page(rows, notes.read_text() if notes.exists() else ""))
    return [folder / "README.md", *(folder / name for name in drawn)]


def insert(readme: Path, rows: Rows, folder: str) -> None:
    """Put tables and figure between the marks of the project's README.

    Raises:
        ValueError: it has not both marks.
    """
    about = rows[0]["machine"]
    head = (
        f"On a CPU ({about['device']}, {about['threads']} threads), all steps measured, time of a step "
        f"× untouched: median (95 % bootstrap interval) ([rows, rule, peers, sweeps]({folder}/README.md)):"
    )
    figure = f"![Time of a step by arm: the monitor beside its peers]({folder}/overhead.png)"
    markdown.insert(readme, "overhead", f"{head}\n\n{verdicts.brief(rows)}\n\n{figure}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--readme", type=Path, help="of the project")
    given = parser.parse_args(arguments)
    print("\n".join(map(str, write(given.folder))))
    if given.readme is not None:
        insert(given.readme, table.read([given.folder / "rows.jsonl"]), str(given.folder))


if __name__ == "__main__":
    main()
