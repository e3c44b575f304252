"""Rows of an experiment: one a cell, written as soon as it is known, so that a stopped run goes on.

A cell is a frozen dataclass with a `hash` of all that its row depends on; a row is a JSON object with that
hash, the configuration, what made it, and its status. A file of rows is gzipped JSON lines.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import subprocess
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from tqdm import tqdm

Rows = list[dict[str, Any]]
_CUT = (EOFError, ValueError, gzip.BadGzipFile, zlib.error)  # what reading half a row raises
Computer = Callable[[Sequence[Any], tqdm], Iterator[dict[str, Any]]]


def command(
    asked: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    study: Path,
    make: Callable[[argparse.Namespace, Path], Rows],
    report: Callable[[Rows, Path], list[Path]],
) -> None:
    """Parse the command line of a simulation study, compute what is missing, draw.

    Adds the options that every study has: `--repeats`, `--seed`, `--out`, `--figures`.

    Args:
        asked: parser with the study's own options.
        arguments: of the command line; None: those of the process.
        study: file of the committed rows, in whose folder `--figures` alone draws.
        make: (options, file of rows) → all its rows.
        report: (rows, folder) → what was written.
    """
    default = Path("runs") / asked.prog.rpartition(".")[2]
    asked.add_argument("--repeats", type=int, default=200, help="simulations a cell (default: 200)")
    asked.add_argument("--seed", type=int, default=0, help="of the study (default: 0)")
    asked.add_argument("--out", type=Path, help=f"folder (default: {default}; the study's with --figures)")
    asked.add_argument("--figures", action="store_true", help="draw from the rows, simulate nothing")
    chosen = asked.parse_args(arguments)
    out = chosen.out or (study.parent if chosen.figures else default)
    if chosen.repeats < 2:
        asked.error(f"--repeats {chosen.repeats}: at least 2 are needed")
    path = out / study.name
    try:
        rows = read(path) if chosen.figures else make(chosen, path)
        print("\n".join(str(written) for written in report(rows, out)))
    except KeyboardInterrupt:
        asked.exit(130, f"\nStopped; {path} keeps every finished cell. The same command goes on.\n")
    except ValueError as error:
        asked.exit(2, f"{error}\n")


def complete(wanted: Sequence[Any], path: Path, compute: Computer) -> list[dict[str, Any]]:
    """Compute the cells that have no row yet, behind a progress bar.

    A cell that fails leaves a row with status "failed" and the error, and is tried again by the next run.

    Args:
        wanted: cells, each with a `hash`.
        path: file of the rows, made if missing; a row is added to it as soon as it is known.
        compute: (cells, progress bar) → their rows, one after the other.

    Returns:
        All rows of the file, in the order of `wanted`; rows of other cells after them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {row["hash"]: row for row in read(path)}
    if rows:  # without what a kill cut off, so that the next row does not follow on half of one
        write(path, rows.values())
    else:
        path.unlink(missing_ok=True)
    todo = [cell for cell in wanted if rows.get(cell.hash, {}).get("status") != "done"]
    with tqdm(total=len(wanted), initial=len(wanted) - len(todo), unit="cell") as bar:
        for row in compute(todo, bar):
            append(path, row)
            rows[row["hash"]] = row
            bar.update()
    order = {cell.hash: i for i, cell in enumerate(wanted)}
    ordered = sorted(rows.values(), key=lambda row: order.get(row["hash"], len(order)))
    write(path, ordered)
    return ordered


def row_of(cell: Any, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do the work of one cell and give its row; a failure is a row too."""
    started = time.monotonic()
    try:
        found: dict[str, Any] = {"status": "done"} | work()
    except (ArithmeticError, ValueError, AssertionError) as error:
        found = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    spent = round(time.monotonic() - started, 3)
    return {"hash": cell.hash, "config": asdict(cell), "seconds": spent} | found


def read(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file; a row that was being written when the run was killed is left out."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    with gzip.open(path) as file, suppress(*_CUT):  # by a kill: all that is whole has been read
        rows.extend(json.loads(line) for line in file)
    return rows


def mended(path: Path) -> Rows:
    """Read the rows of a file that others are to follow; what a kill cut off is taken out of it.

    A row behind half of one is not found again.
    """
    rows = read(path)
    try:
        if path.exists():
            gzip.decompress(path.read_bytes())
    except _CUT:
        write(path, rows)
    return rows


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write all rows anew, whole or not at all; the bytes depend on the rows only."""
    partial = path.with_suffix(".partial")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    partial.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    os.replace(partial, path)


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row at the end, as a gzip member of its own."""
    with path.open("ab") as file:
        file.write(gzip.compress((json.dumps(row) + "\n").encode(), mtime=0))


def provenance() -> dict[str, str]:
    """Commit and versions that a row was made with."""
    versions = {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__}
    return {"commit": commit() or "unknown", **versions}


def commit() -> str | None:
    """Name the commit of this checkout, and whether files in it were changed since; None outside of one."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
