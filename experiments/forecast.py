"""`python -m experiments.forecast rows.jsonl`: how long runs take, fitted to rows; `--list` is made of it.

A run of S steps over E examples of T tokens, with V evaluations of n examples and g generated answers, takes

    start + a·S + c·T·(E + n·(V + 2)/3) + d·g + e·S/k        seconds on one worker

a: overhead of a step; c: seconds per token, forward and backward (a forward pass alone is a third of it);
d: seconds per answer; e: seconds per step in which the noise scale is measured, one in k. For shipped bases
a and c were measured on one core, see `CORE`. For an accelerator c is 4·P/throughput (LoRA: forward pass and
gradients of inputs) at a throughput that is assumed and said here; that estimate is worth as much as the
assumption. While a sweep runs, its own times correct it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments import rowsfile
from experiments.configs import RunConfig


@dataclass(frozen=True)
class Machine:
    """What a scale's presets are meant to run on.

    Args:
        name: in words.
        workers: runs at once.
        start: seconds before a run's first step.
        step: a, seconds, of a base that was not measured.
        flops: assumed throughput of one worker, floating-point operations a second.
        answer: d, seconds.
    """

    name: str
    workers: int
    start: float
    step: float
    flops: float
    answer: float


MACHINES = {
    "smoke": Machine("2 cores", 2, 0.5, 0.02, 2e10, 0.01),
    "laptop": Machine("2 cores", 2, 0.5, 0.02, 2e10, 0.01),
    "gpu": Machine("1 GPU at 100 TFLOP/s", 1, 2.0, 0.03, 1e14, 0.01),
    "paper": Machine("8 GPUs at 300 TFLOP/s", 8, 60.0, 0.1, 3e14, 0.5),
}
# base → (a, c), processor time on one core of an AMD EPYC (Zen 4) that others shared, so rather too much
CORE: dict[str, tuple[float, float]] = {
    "1m": (8e-3, 1.3e-4),
    "math-200k": (6e-3, 4.8e-5),
    "math-1m": (8e-3, 1.3e-4),
}
MEASURED = 0.03  # e, seconds, of batches of 4 on the same core
PARAMETERS = {
    "math-25m": 25e6,
    "math-100m": 100e6,
    "meta-llama/Llama-2-7b-hf": 6.7e9,
    "meta-llama/Llama-2-13b-hf": 13.0e9,
    "Qwen/Qwen3-0.6B": 0.6e9,
    "google/gemma-3-1b-pt": 1.0e9,
}
# task → tokens of an example, measured with the bases' own tokenizer, and assumed for the hub's
TOKENS = {"wordmath": 87.0, "stdlib": 128.0, "metamath-gsm8k": 250.0, "codefeedback-humaneval": 400.0}


def run_seconds(config: RunConfig, scale: str) -> float:
    """Estimate the time of one run, seconds on one worker.

    Args:
        config: of the run.
        scale: key of `MACHINES`.
    """
    machine = MACHINES[scale]
    step, token = CORE.get(config.base, (machine.step, _per_token(config.base, machine)))
    extra = machine.answer * config.generate
    if config.gns_every:
        extra += MEASURED * config.n_steps / config.gns_every
    return machine.start + step * config.n_steps + token * _tokens(config) + extra


def fitted(rows: Iterable[Mapping[str, Any]], start: float) -> dict[str, tuple[float, float]]:
    """Fit a and c to the times of solo runs on one thread, by least squares relative to each time.

    Args:
        rows: of runs; only those count that are done, have no noise scale and no answers.
        start: seconds before a run's first step, as in `MACHINES`.

    Returns:
        base → (a, c), neither below 0, for bases with two such runs or more.
    """
    from scipy import optimize  # longer to import than all that every sweep and worker needs besides

    runs: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        config = RunConfig.of(row["config"])
        if row["status"] == "done" and row["engine"] == "loop" and not (config.gns_every or config.generate):
            counts = (float(config.n_steps), _tokens(config), max(row["seconds"] - start, 1e-3))
            runs.setdefault(config.base, []).append(counts)
    found = {}
    for base, counts in runs.items():
        if len(counts) > 1:
            table = np.array(counts)
            costs, _ = optimize.nnls(table[:, :2] / table[:, 2:], np.ones(len(table)))
            found[base] = (float(costs[0]), float(costs[1]))
    return found


def sweep_seconds(configs: Iterable[RunConfig], scale: str, workers: int | None = None) -> float:
    """Estimate the time of a sweep on its scale's machine, seconds."""
    return sum(run_seconds(c, scale) for c in configs) / (workers or MACHINES[scale].workers)


class Tally:
    """Remaining time of a sweep: the model's, times how wrong it was for the runs that are over.

    The factor is that of the runs of the same base, or of all runs where none of its own is over. So the
    model's own constants matter at the start only.

    Args:
        configs: all runs of the sweep.
        scale: key of `MACHINES`.
        workers: runs at once.
    """

    def __init__(self, configs: Sequence[RunConfig], scale: str, workers: int) -> None:
        self.expected = {config.hash: run_seconds(config, scale) for config in configs}
        self.bases = {config.hash: config.base for config in configs}
        self.workers = workers
        self.seen: dict[
            str, tuple[float, float]
        ] = {}  # base → seconds that its runs took, and were expected to
        self.open = dict(self.expected)

    def rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take in the times of runs that are over."""
        for row in rows:
            expected = self.open.pop(row["hash"], None)
            seconds = row.get("seconds")
            if expected is not None and seconds and row["status"] == "done":
                took, of = self.seen.get(self.bases[row["hash"]], (0.0, 0.0))
                self.seen[self.bases[row["hash"]]] = took + seconds, of + expected

    def left(self, open_runs: int) -> float:
        """Estimate the remaining time, seconds.

        Args:
            open_runs: runs without a row, those included whose rows are written elsewhere.
        """
        if not open_runs or not self.open:
            return 0.0
        whole = sum(self._factor(self.bases[hash]) * expected for hash, expected in self.open.items())
        return min(1.0, open_runs / len(self.open)) * whole / min(self.workers, open_runs)

    def _factor(self, base: str) -> float:
        """Say how many times longer than expected the runs of a base took."""
        known = [self.seen[base]] if base in self.seen else list(self.seen.values())
        return sum(took for took, _ in known) / sum(of for _, of in known) if known else 1.0


def words(seconds: float) -> str:
    """Say a time with two digits that matter: "45 s", "12 min", "3.4 h", "2.1 days"."""
    for unit, size, least in (("days", 86_400, 2 * 86_400), ("h", 3_600, 5_400), ("min", 60, 90)):
        if seconds >= least:
            return f"{seconds / size:.{0 if seconds / size >= 10 else 1}f} {unit}"
    return f"{math.ceil(seconds)} s"


def _tokens(config: RunConfig) -> float:
    """Tokens of a run that pass forward and backward; a forward pass alone counts a third."""
    length = min(TOKENS.get(config.task, 128.0) * config.dials.get("merged", 1), config.max_length)
    trained = config.steps * config.batch_size if config.steps else config.epochs * config.n_train
    evaluated = config.n_eval * (config.evals + 2) / 3  # before the first step, and the test split
    factor = 1.5 if config.adapter == "full" else 1.0  # gradients of the weights as well
    return length * (factor * trained + evaluated)


def _per_token(base: str, machine: Machine) -> float:
    """Estimate c of a base that was not measured: 4·P/throughput."""
    return 4 * PARAMETERS.get(base, 1e9) / machine.flops


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the lines of `CORE` for the bases in files of rows, and how far off they are."""
    parser = argparse.ArgumentParser(prog="python -m experiments.forecast", description="Fit run times.")
    parser.add_argument("rows", type=Path, nargs="+", help="files of rows, JSON lines")
    parser.add_argument("--scale", choices=MACHINES, default="laptop")
    asked = parser.parse_args(arguments)
    found = [row for path in asked.rows for row in rowsfile.read(path)]
    for base, (step, token) in fitted(found, MACHINES[asked.scale].start).items():
        print(f'    "{base}": ({step:.2g}, {token:.2g}),')


if __name__ == "__main__":
    main()
