"""Rows of a sweep on disk: one JSON object a line, appended whole by any number of processes.

A kill may leave half a line; the next append puts it on a line of its own and readers pass over it. A row
that did not fit on the disk leaves nothing behind. The first row with a result is the run's row: should a
second one ever come (a laptop that slept longer than its lease), readers do not see it.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import math
import os
import zlib
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from experiments.configs import RunError
from experiments.patience import Passing

Row = dict[str, Any]
RESULTS = ("done", "diverged")  # a diverged run is a result; a failed one is not
STATUSES = (*RESULTS, "failed")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(Passing):
    """A row could not be written for want of space; the file holds what it held before."""


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows at the end, all or none of them, and return when they are on the disk.

    Args:
        path: of the file, made if missing.
        rows: to add. Numbers that JSON does not know are written as null.

    Raises:
        DiskFull: there is no space.
    """
    text = "".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as file:
        end = os.lseek(file, 0, os.SEEK_END)
        torn = end > 0 and os.pread(file, 1, end - 1) != b"\n"
        try:
            _write(file, b"\n" + text if torn else text)
            os.fsync(file)
        except OSError as error:
            os.ftruncate(file, end)
            if error.errno not in _FULL:
                raise
            raise DiskFull(f"{path}: no space left for a row of {len(text):,} bytes; free some") from error


def read(path: Path) -> list[Row]:
    """Give every whole row of a file (.gz: compressed), in its order; a file that is missing has none.

    Raises:
        RunError: a whole line is no row.
    """
    return [_checked(value, f"{path}, line {i}") for i, value in _values(path)]


def objects(path: Path) -> list[Row]:
    """Give every whole JSON object of a file, in its order, whatever its fields; a missing file has none.

    For rows that are not runs of a sweep: they need neither hash nor status.

    Raises:
        RunError: a whole line is no JSON object.
    """
    found = list(_values(path))
    for i, value in found:
        if not isinstance(value, dict):
            raise RunError(f"{path}, line {i}: a JSON object is needed, this is {type(value).__name__}")
    return [value for _, value in found]


def _values(path: Path) -> Generator[tuple[int, Any]]:
    """Give (number of the line, value) of every whole line; those that a kill cut off are passed over."""
    if not path.exists():
        return
    text = path.read_bytes()
    if path.suffix == ".gz":
        try:
            text = gzip.decompress(text)
        except (OSError, EOFError, zlib.error) as error:
            raise RunError(f"{path}: no whole compressed file of rows: {error}") from error
    for i, line in enumerate(text.split(b"\n"), start=1):
        with suppress(ValueError):
            yield i, json.loads(line)


def results(rows: Iterable[Row]) -> dict[str, Row]:
    """Give one row for each hash: the first result, or where there is none the last failure."""
    found: dict[str, Row] = {}
    for row in rows:
        if found.get(row["hash"], row)["status"] not in RESULTS or row["hash"] not in found:
            found[row["hash"]] = row
    return found


class Follower:
    """Reads what was added to a file since the last look; never waits.

    Args:
        path: of the file; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read_to = 0

    def new(self) -> list[Row]:
        """Give the whole rows that came since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.read_to)
            text = file.read()
        whole = text.rfind(b"\n") + 1
        self.read_to += whole
        return [row for line in text[:whole].split(b"\n") if (row := _row(line, str(self.path))) is not None]


def _row(line: bytes, where: str) -> Row | None:
    """Give the row of a line, or None where a kill cut it off."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return _checked(row, where)


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict) or row.get("status") not in STATUSES or not isinstance(row.get("hash"), str):
        raise RunError(
            f"{where}: no row; a JSON object with hash and status ({', '.join(STATUSES)}) is needed"
        )
    return row


@contextmanager
def _locked(path: Path) -> Generator[int, None, None]:
    """Open a file for appending and hold its lock, which a kill gives back."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def _write(file: int, text: bytes) -> None:
    """Write all of a text: the system may take a part of it only."""
    while text:
        text = text[os.write(file, text) :]


def finite(value: Any) -> Any:
    """Give a value as strict JSON can hold it: null for NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
