"""Several runs side by side on one self-contained page: noise scales with intervals, and what differs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from gns.estimate import Estimate, format_count
from gns.records import write_atomically
from gns.report import figures, tables
from gns.report.circumstances import MISSING, circumstances
from gns.report.figures import DARK, LIGHT
from gns.report.findings import Findings
from gns.report.page import inline, render
from gns.report.places import short_paths
from gns.report.text import label_of, movement

COMPARISON = "comparison.html"
CAPTION = (
    "The noise scale of each run with its interval, all together and each LoRA factor, and the batch each "
    "run used. Two runs differ where the intervals of one kind do not meet."
)
MANY = 10  # pairs from which on chance is warned of: 45 at under 1 % each come to about one in four
PAIRS = 6  # pairs of runs that are named in the verdict at most


@dataclass(frozen=True)
class Told:
    """What the comparison says at its top: a title, sentences, and warnings."""

    title: str
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]


def write_comparison(runs: Mapping[str, Findings], path: str | Path) -> Path:
    """Write the page that compares runs.

    Args:
        runs: folder → what is known of the run in it; two or more.
        path: of the page; its folder is made.

    Returns:
        The path.

    Raises:
        ValueError: there are fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run(s) given; a comparison needs two or more")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [_html(runs).encode(errors="replace")])
    return path


def _html(runs: Mapping[str, Findings]) -> str:
    named = {short: runs[folder] for folder, short in short_paths(runs).items()}
    said = told(named)
    kinds = list(dict.fromkeys(kind for f in named.values() for kind in f.result.groups))
    results = {name: f.result for name, f in named.items()}
    batches = {name: f.batch_size for name, f in named.items()}
    pngs = [_png(results, batches, theme) for theme in (LIGHT, DARK)]
    light, dark = pngs
    pictures = [inline(light, dark, CAPTION, said.title)] if light and dark else []
    return render(
        "comparison.html",
        said=said,
        pictures=pictures,
        rows=[_row(name, f, kinds) for name, f in named.items()],
        kinds=[label_of(kind) for kind in kinds],
        missing=MISSING,
        settings=differing(named),
        folders=[(name, folder) for folder, name in short_paths(runs).items()],
    )


def _png(results: Mapping[str, Estimate], batches: Mapping[str, int | None], theme: Any) -> bytes | None:
    figure = figures.compared(results, batches, theme=theme)
    return None if figure is None else figures.png(figure, theme)


def told(runs: Mapping[str, Findings]) -> Told:
    """Say which runs' noise scales can be told apart, and what makes them hard to compare."""
    known = {name: f.result for name, f in runs.items() if f.result.n_steps > 1 and not _early(f.result)}
    if len(known) < 2:
        return Told("Too early to compare", ("Fewer than two of these runs have an interval yet.",), ())
    apart = [(a, b) for a, b in combinations(known, 2) if _apart(known[a], known[b])]
    count = len(known) * (len(known) - 1) // 2
    title = (
        "No difference can be told"
        if not apart
        else "All noise scales differ"
        if len(apart) == count
        else f"{len(apart)} of {count} pairs of noise scales differ"
    )
    lines = [_pair(a, b, known) for a, b in apart[:PAIRS]]
    if len(apart) > PAIRS:
        lines.append(f"And {len(apart) - PAIRS} more pairs.")
    if not apart:
        lines.append("The intervals of every two runs meet: chance alone may have made these numbers differ.")
    if early := [name for name in runs if name not in known]:
        lines.append(f"Too early to compare: {', '.join(early)}.")
    warnings = _warnings(runs, known)
    if apart and count >= MANY:
        warnings.append(
            f"{count} pairs are compared: the more there are, the likelier one of them differs by chance "
            "alone."
        )
    return Told(title, tuple(lines), tuple(warnings))


def _early(result: Estimate) -> bool:
    return result.status == "collecting" or math.isnan(result.low)


def _apart(a: Estimate, b: Estimate) -> bool:
    """Whether two sets do not meet; at 95 % each that is under 1 % by chance where the truth is the same."""
    return a.high < b.low or b.high < a.low


def _pair(a: str, b: str, known: Mapping[str, Estimate]) -> str:
    small, large = (a, b) if known[a].high < known[b].low else (b, a)
    ends = [f"{format_count(known[name].low)} … {format_count(known[name].high)}" for name in (small, large)]
    return f"{small} ({ends[0]}) is below {large} ({ends[1]})."


def _warnings(runs: Mapping[str, Findings], known: Mapping[str, Estimate]) -> list[str]:
    """Say what makes the numbers of these runs hard to compare."""
    found = []
    units = {r.unit.split(" (")[0] for r in known.values()}
    tokens = [t for f in runs.values() if (t := _tokens(f)) is not None]
    if len(units) > 1:
        found.append(f"the runs count in different units: {'; '.join(sorted(units))}.")
    if tokens and max(tokens) > 1.25 * min(tokens):
        ends = f"{format_count(min(tokens))} … {format_count(max(tokens))}"
        found.append(f"an example is {ends} tokens on average, by run: the same number is not the same data.")
    if len({r.level for r in known.values()}) > 1:
        found.append("the intervals have different levels.")
    if len({f.batch_size for f in runs.values()}) > 1 or len({_rate(f) for f in runs.values()}) > 1:
        found.append(
            "batch size or learning rate differ between the runs, and the noise scale moves with both."
        )
    if len({r.metric for r in known.values()}) > 1:
        found.append("the noise scales are in different metrics, and so different quantities.")
    for name, f in runs.items():
        found += [f"{name}: {warning}" for warning in f.result.warnings]
        if f.change is not None and movement(f.change):
            found.append(
                f"in {name} the noise scale was {f.change.direction}: its number is an average over the run."
            )
    return found


def _tokens(f: Findings) -> float | None:
    counted = [(s.n_tokens, s.n_examples) for s in f.steps if s.usable and s.n_tokens is not None]
    return sum(t for t, _ in counted) / sum(n for _, n in counted) if counted else None


def _rate(f: Findings) -> float | None:
    return max((s.learning_rate for s in f.steps if s.learning_rate), default=None)


def _row(name: str, f: Findings, kinds: Sequence[str]) -> dict[str, Any]:
    """Give one run of the table."""
    groups = f.result.groups
    return {
        "name": name,
        "value": tables.value_of(f.result),
        "interval": tables.span_of(f.result),
        "level": f"{100 * f.result.level:g} %",
        "status": tables.status_of(f.result, f.change),
        "factors": [tables.value_of(groups[kind]) if kind in groups else "—" for kind in kinds],
        "size": f"{f.result.n_steps:,} × {format_count(f.result.examples_per_step)}",
        "batch": f.batch_size or "?",
        "worth": tables.worth(f.advice) or "too early",
    }


def differing(runs: Mapping[str, Findings]) -> list[tuple[str, Sequence[str]]]:
    """Give every setting that is not the same in all runs: (name, value in each run).

    What stands beside the numbers comes first, then what else the settings hold.
    """
    columns = [
        {s.name: s.value for s in circumstances(f.result, f.steps, f.settings, f.batch_size)}
        | dict(tables.flat(tables.each_once(f.settings, f.batch_size)))
        for f in runs.values()
    ]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, [column.get(name, "—") for column in columns]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
