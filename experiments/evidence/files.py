"""Where the rows of the evidence lie."""

from __future__ import annotations

from pathlib import Path

from experiments import rowsfile

FOLDER = Path("experiments/results/evidence")
FROZEN = "frozen.jsonl.gz"  # of `experiments.evidence.frozen`
CURVATURE = "curvature.jsonl.gz"  # of `experiments.evidence.again`: B_noise along runs
ADAM = "again-adam.jsonl.gz"  # of the same: runs again, in AdamW's metric
BRANCHES = "branches.jsonl.gz"  # of `experiments.evidence.branched`
NO_RUNS = (FROZEN, CURVATURE, BRANCHES)


def runs_in(folder: Path) -> list[rowsfile.Row]:
    """Give the rows of all runs in a folder, each run once."""
    sources = sorted(p for p in folder.glob("*.jsonl.gz") if p.name not in NO_RUNS)
    return list(rowsfile.results(row for path in sources for row in rowsfile.read(path)).values())
