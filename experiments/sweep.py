"""`python -m experiments.sweep --preset smoke`: run a sweep; stop it at any time, and start it again.

    --list                      every preset: runs, estimated time, question
    --preset NAME               run what has no row yet (or the path of a TOML file); rows in runs/sweeps/NAME
    --preset NAME --status      how far it is
    --preset NAME --write F     write its configurations to a file of JSON lines, run nothing
    --preset NAME --merge F     take over rows that were made elsewhere
    --jsonl IN OUT              configurations in, rows out, without a ledger or Optuna

Several workers, and several commands on one machine or many (`--ledger` with the URL of a database), work on
one sweep; no two of them on the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from experiments import forecast, grids, plain, rowsfile
from experiments.configs import RunConfig, RunError
from experiments.crew import Crew, settled
from experiments.worker import Job, said

SWEEPS = Path("runs/sweeps")
ENGINE = "experiments.engines"
LEASE = 300.0  # seconds; see `experiments.ledger`


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and do what it says; exit with 1 if runs failed, 2 if it cannot be done."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores; read when torch is imported
    try:
        sys.exit(_do(asked, parser))
    except RunError as error:
        parser.exit(2, f"{error}\n")
    except OSError as error:  # a folder that cannot be made, a file that cannot be written
        parser.exit(2, f"{said(error)}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nStopped. Every finished run is kept; the same command goes on.\n")


def _parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sweep", description="Run a sweep of fine-tuning runs."
    )
    parser.add_argument("--list", action="store_true", help="show every preset")
    parser.add_argument("--preset", help="name, or path of a TOML file")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (default: 2)")
    parser.add_argument("--device", help="torch device (default: an accelerator if there is one)")
    parser.add_argument("--out", type=Path, help="folder of the rows (default: runs/sweeps/NAME)")
    parser.add_argument("--ledger", help="URL of a database (default: SQLite in the folder of the rows)")
    parser.add_argument("--extend", action="store_true", help="take in runs that the ledger does not know")
    parser.add_argument("--retry-failed", action="store_true", help="run failed runs once more")
    parser.add_argument("--status", action="store_true", help="show how far the sweep is, run nothing")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the configurations, run nothing")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="take over rows made elsewhere")
    parser.add_argument(
        "--jsonl", type=Path, nargs=2, metavar=("IN", "OUT"), help="run without a ledger, one after the other"
    )
    return parser


def _do(asked: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Choose what to do; give the exit status."""
    if asked.list:
        Console().print(listing())
        return 0
    if asked.jsonl:
        return plain.run_file(*asked.jsonl, engine=ENGINE, device=asked.device, retry=asked.retry_failed)
    if asked.preset is None:
        parser.error("give --preset NAME, --list, or --jsonl IN OUT")
    if asked.workers < 1:
        parser.error(f"--workers {asked.workers}: at least 1 is needed")
    preset = grids.load(asked.preset)
    if asked.write:
        write_configs(asked.write, preset.configs)
        print(f"{len(preset.configs)} configurations in {asked.write}")
        return 0
    job = job_of(preset, asked.out, asked.ledger, workers=asked.workers, device=asked.device)
    if asked.merge:
        print(merge(job, asked.merge, extend=asked.extend))
        return 0
    if asked.status:
        print(", ".join(f"{n} {status}" for status, n in sorted(settled(job, extend=asked.extend).items())))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's word for Ctrl-C
    return Crew(job, preset).run(extend=asked.extend, retry=asked.retry_failed)


def job_of(
    preset: grids.Preset,
    out: Path | None = None,
    ledger: str | None = None,
    *,
    workers: int = 2,
    device: str | None = None,
    engine: str | None = None,
) -> Job:
    """Say where a sweep's ledger and rows are, and who works on it."""
    folder = (out or SWEEPS / preset.name).resolve()
    url = ledger or f"sqlite:///{folder / 'ledger.db'}"
    rows = folder / "rows.jsonl"
    return Job(url, preset.name, preset.configs, rows, workers, device, engine or ENGINE, LEASE)


def write_configs(path: Path, configs: Sequence[RunConfig]) -> None:
    """Write configurations as JSON lines, for `--jsonl`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(config.to_dict()) + "\n" for config in configs), encoding="utf-8")


def merge(job: Job, files: Sequence[Path], *, extend: bool = False) -> str:
    """Take rows that were made elsewhere into a sweep's rows and ledger.

    Args:
        job: the sweep.
        files: of rows, JSON lines.
        extend: as `experiments.ledger.Ledger`.

    Returns:
        What was taken over, and what was not, in words.

    Raises:
        RunError: a file is missing or holds something else.
    """
    if missing := [str(path) for path in files if not path.exists()]:
        raise RunError(f"{', '.join(missing)}: no such file of rows to merge")
    here = rowsfile.results(rowsfile.read(job.rows))
    given = rowsfile.results(row for path in files for row in rowsfile.read(path))
    wanted = {config.hash for config in job.configs}
    results = {h: row for h, row in given.items() if h in wanted and row["status"] in rowsfile.RESULTS}
    new = [
        row
        for h, row in results.items()
        if here.get(h, row)["status"] not in rowsfile.RESULTS or h not in here
    ]
    rowsfile.append(job.rows, new)
    settled(job, extend=extend)
    foreign = sum(h not in wanted for h in given)
    failed = len(given) - foreign - len(results)
    return (
        f"{len(new)} rows taken over, {len(results) - len(new)} known before, {failed} failed and left to be "
        f"run here, {foreign} of other sweeps"
    )


def listing() -> Table:
    """Tabulate the presets, a section for each scale."""
    table = Table("preset", "runs", "estimated", "question", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.columns[0].no_wrap = table.columns[2].no_wrap = True
    presets = [grids.load(name) for name in grids.names()]
    for scale in grids.SCALES:
        table.add_row(f"[bold]{scale}[/]", "", "", f"[bold]on {forecast.MACHINES[scale].name}[/]")
        for preset in presets:
            if preset.scale == scale:
                estimate = forecast.words(forecast.sweep_seconds(preset.configs, scale))
                paper = f" ({preset.paper})" if preset.paper else ""
                table.add_row(preset.name, f"{len(preset.configs):,}", estimate, preset.question + paper)
        table.add_section()
    return table


if __name__ == "__main__":
    main()
