"""`OMP_NUM_THREADS=1 python -m experiments.packed.speed`: packed runs against solo ones, by batch and width.

Times optimizer steps of the solo loop, of a second solo loop (A/A), and of packed programs, in turn, in one
process: 3 minutes on one core of a CPU. On a GPU: `--device cuda --base 25m --dtype bfloat16`. Rows go to
`experiments/results/packed/DEVICE.jsonl`, the table beside them; `--table` writes it from the rows alone.

The data are those of a sweep over learning rates: all slots see the same examples.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.configs import RunConfig
from experiments.overhead.measure import machine
from experiments.packed.width import best_width, packed_clock, solo_clock

RESULTS = Path(__file__).parent.parent / "results" / "packed"
BATCHES = (1, 4, 16, 64)
WIDTHS = {"cpu": (1, 2, 4, 8, 16), "cuda": (1, 2, 4, 8, 16, 32, 64)}
MOST_ROWS = {"cpu": 128, "cuda": 1_024}  # of a forward pass, unless it is one slot's
EXAMPLES = 16  # of a run in one timing, at the least
ROUNDS = 7


def measure(
    config: RunConfig, widths: Sequence[int], device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """Time one batch size: solo, solo again and each width, `rounds` times in turn.

    Args:
        config: of a run.
        widths: of the programs.
        device: to run on.
        rounds: timings of each.

    Returns:
        A row a width: seconds a step of each round, of solo runs and of the program.
    """
    solo, again = solo_clock(config, device), solo_clock(config, device)
    programs = {width: packed_clock(config, width, device) for width in widths}
    steps = max(1, -(-EXAMPLES // config.batch_size))
    found: dict[Any, list[float]] = {name: [] for name in ("solo", "again", *widths)}
    for i in range(rounds):
        arms = [("solo", solo), ("again", again), *programs.items()]
        for name, clock in arms if i % 2 == 0 else reversed(arms):
            n = steps if isinstance(name, str) else max(1, steps // name)
            found[name].append(clock(n) / n)
    return [
        {
            "batch": config.batch_size,
            "width": width,
            "solo_s": found["solo"],
            "again_s": found["again"],
            "packed_s": found[width],
        }
        for width in widths
    ]


def speedup(row: dict[str, Any]) -> tuple[float, float, float]:
    """Examples a second of the program over those of a solo run: median of the rounds and its quartiles."""
    ratios = [row["width"] * a / b for a, b in zip(row["solo_s"], row["packed_s"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def noise(row: dict[str, Any]) -> float:
    """The same of a solo run over another: what a ratio of 1 looks like."""
    return statistics.median(a / b for a, b in zip(row["solo_s"], row["again_s"], strict=True))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay the rows out: batch sizes down, widths across, the speed-up with its quartiles."""
    widths = sorted({row["width"] for row in rows})
    cells = {(row["batch"], row["width"]): row for row in rows}
    first, about = rows[0], rows[0]["machine"]
    lines = [
        f"# Packed against solo: {first['base']}, {first['adapter']} r={first['rank']}, {first['dtype']}",
        "",
        f"{about['device']}, {about['threads']} thread(s), torch {about['versions']['torch']}, "
        f"commit {about['commit']}.",
        f"Examples a second over those of a solo run: median of {len(first['solo_s'])} rounds (quartiles).",
        "A/A: a solo run over another. Width chosen: what `best_width` found; 1 is the solo loop.",
        "",
        "| batch | solo step | A/A | "
        + " | ".join(f"{width} slots" for width in widths)
        + " | width chosen |",
        "| ---: " * (len(widths) + 4) + "|",
    ]
    for batch in sorted({row["batch"] for row in rows}):
        mine = [row for row in rows if row["batch"] == batch]
        start = f"| {batch} | {1e3 * statistics.median(mine[0]['solo_s']):.1f} ms | {noise(mine[0]):.2f} | "
        said = ["" if (batch, w) not in cells else _cell(cells[batch, w]) for w in widths]
        lines.append(start + " | ".join(said) + f" | {mine[0]['chosen']} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    middle, low, high = speedup(row)
    return f"{middle:.2f} ({low:.2f} … {high:.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    asked = argparse.ArgumentParser(prog="python -m experiments.packed.speed", description=__doc__)
    asked.add_argument("--base", default="1m")
    asked.add_argument("--task", default="wordmath")
    asked.add_argument("--adapter", default="lora")
    asked.add_argument("--rank", type=int, default=16)
    asked.add_argument("--dtype", default="float32")
    asked.add_argument("--device", help="of torch (default: an accelerator if there is one)")
    asked.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    asked.add_argument("--widths", type=int, nargs="+")
    asked.add_argument("--rounds", type=int, default=ROUNDS, help=f"timings of each (default: {ROUNDS})")
    asked.add_argument("--out", type=Path, help="file of rows (default: in experiments/results/packed)")
    asked.add_argument("--table", action="store_true", help="write the table from the rows, measure nothing")
    given = asked.parse_args(arguments)
    if given.rounds < 2:
        asked.error(f"--rounds {given.rounds}: at least 2 are needed")
    kind = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    out = given.out or RESULTS / f"{kind.partition(':')[0]}.jsonl"
    if not given.table:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(row) + "\n" for row in _rows(given, torch.device(kind))))
    made = table([json.loads(line) for line in out.read_text().splitlines()])
    out.with_suffix(".md").write_text(made)
    print(made)


def _rows(given: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure what was asked for, a batch size after the other."""
    rows: list[dict[str, Any]] = []
    about = machine()
    for batch in given.batches:
        config = RunConfig(
            given.base,
            given.task,
            n_train=max(256, 16 * batch),
            batch_size=batch,
            adapter=given.adapter,
            rank=given.rank,
            dtype=given.dtype,
        )
        widths = given.widths or WIDTHS[device.type]
        widths = [w for w in widths if w == 1 or w * batch <= MOST_ROWS[device.type]]
        common = {name: getattr(config, name) for name in ("base", "task", "adapter", "rank", "dtype")}
        common |= {"chosen": best_width(config, str(device)), "machine": about}
        measured = measure(config, widths, device, given.rounds)
        rows += [row | common for row in measured]
        print(
            f"batch {batch}: " + ", ".join(f"{row['width']} slots {speedup(row)[0]:.2f}" for row in measured)
        )
    return rows


if __name__ == "__main__":
    main()
