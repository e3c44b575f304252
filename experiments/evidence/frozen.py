"""`python -m experiments.evidence.frozen`: noise scales at initialisation over rank, adapters and data size.

Nothing is trained: a row is one frozen probe of factor B (of all weights in full fine-tuning) on the task's
training data. Adapters vary at one data set, data sets and their sizes at one adapter. About ten minutes on a
core; rows that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments import rows, rowsfile
from experiments.configs import RunConfig
from experiments.evidence.configurations import RANK
from experiments.evidence.files import FOLDER, FROZEN
from experiments.prepared import device_of, prepare
from gns import probe

BASES = ("math-200k", "math-1m")
RANKS = (4, RANK, 64)
SEEDS = (0, 1, 2)
SIZES = (128, 256, 512, 1_024, 2_048)
SETS = (0, 1, 2, 3)  # data seeds
BATCH = 16


def wanted(bases: Sequence[str] = BASES) -> list[dict[str, Any]]:
    """Name the probes: adapters at the largest data set, and data sets and sizes at the middle rank."""
    found = []
    for base in bases:
        about = {"base": base, "adapter": "lora", "data_seed": 0, "n": SIZES[-1]}
        found += [about | {"rank": rank, "seed": seed} for rank in RANKS for seed in SEEDS]
        found += [about | {"rank": RANK, "adapter": "full", "seed": 0}]
        found += [
            about | {"rank": RANK, "seed": 0, "data_seed": data, "n": n}
            for data in SETS
            for n in SIZES
            if (data, n) != (0, SIZES[-1])
        ]
    return found


def measure(asked: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Make one probe; give the unbiased noise scale that it read, and the plug-in over all examples."""
    config = RunConfig(
        base=asked["base"],
        task="wordmath",
        adapter=asked["adapter"],
        rank=asked["rank"],
        seed=asked["seed"],
        data_seed=asked["data_seed"],
        n_train=asked["n"],
        n_eval=1,
    )
    prepared = prepare(config, device)
    batches = [prepared.batch(range(at, at + BATCH)) for at in range(0, asked["n"], BATCH)]
    found = probe(prepared.model, batches)
    part = found.groups.get("B", found)
    names = ("b_simple", "low", "high", "status", "trace_sigma", "grad_sq_norm", "n_examples", "level")
    read = {name: getattr(part, name) for name in names}
    # ‖ḡ‖² over all N examples is |G|² + tr Σ/N, in expectation and in these estimates alike
    plug_in = part.trace_sigma / (part.grad_sq_norm + part.trace_sigma / part.n_examples)
    return read | {"plug_in": plug_in, "unit": found.unit}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what has no row yet."""
    parser = argparse.ArgumentParser(prog="python -m experiments.evidence.frozen", description=__doc__)
    parser.add_argument("--bases", nargs="+", default=BASES)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=FOLDER / FROZEN)
    asked = parser.parse_args(arguments)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    device = device_of(asked.device)
    known = {_key(row) for row in rows.mended(asked.out)}
    for each in tqdm([w for w in wanted(asked.bases) if _key(w) not in known], unit="probe"):
        begun = time.monotonic()
        read = measure(each, device)
        about = rows.provenance() | {"seconds": round(time.monotonic() - begun, 2), "device": str(device)}
        rows.append(asked.out, rowsfile.finite(each | read | about))


def _key(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in ("base", "adapter", "rank", "seed", "data_seed", "n"))


if __name__ == "__main__":
    main()
