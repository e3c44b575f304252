"""`steps.jsonl`: one record a line, append-safe, read back exactly.

A line is a header, {"format": "gns-steps", "version": 1, "dtype": …, "names": […]}, or one step. Each step
belongs to the latest header before it. Floats are the shortest decimals that read back exactly in their
dtype; NaN and ±Inf are the strings "NaN", "Infinity", "-Infinity". Units: `gns/sums.py`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np

from gns._version import __version__
from gns.sums import Layout, StepSums

STEPS = "steps.jsonl"
VERSION = 1
_MAGIC = b'{"format":"gns-steps"'
_DTYPES = {"float32": np.float32, "float64": np.float64}
_NO_ROWS: tuple[str, tuple[str, ...]] = ("float64", ())
_SCALARS = [f for f in fields(StepSums) if f.name not in ("rows", "layout")]
_NEEDED = [f.name for f in _SCALARS if f.default is MISSING]
_FLOATS = {f.name for f in _SCALARS if str(f.type).startswith("float")}


class RecordsError(ValueError):
    """A file of records is truncated, damaged or foreign; the message says where and what to do.

    Args:
        message: names the file, the line, what was seen, what is needed and what to do.
        steps: the good records, before and after the damage.
    """

    def __init__(self, message: str, steps: Iterable[StepSums] = ()) -> None:
        super().__init__(message)
        self.steps = list(steps)


def number(x: Any) -> Any:
    """Turn a scalar, or a tuple of them, into plain JSON: numpy to Python, a non-finite float to its name."""
    x = x.item() if isinstance(x, np.generic) else x
    if isinstance(x, tuple):
        return [number(each) for each in x]
    if isinstance(x, float) and not math.isfinite(x):
        return "NaN" if math.isnan(x) else "Infinity" if x > 0 else "-Infinity"
    return x


def _decimals(rows: np.ndarray) -> list[list[Any]]:
    """Shortest decimals, [P, 2], that read back as exactly the same float32 or float64."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        values = rows.astype(np.float64)
    if rows.dtype == np.float32:
        short = np.array([float(str(x)) for x in rows.ravel()]).reshape(rows.shape)
        with np.errstate(over="ignore"):
            exact = short.astype(np.float32) == rows  # decimal → double → float32 can round twice
        values = np.where(exact, short, values)
    if np.isfinite(values).all():
        return values.tolist()
    return [[number(x) for x in row] for row in values.tolist()]


def _schema(step: StepSums) -> tuple[str, tuple[str, ...]]:
    """Give the dtype and the names that the header before `step` must state.

    Raises:
        ValueError: its rows are neither float32 nor float64, or have no names.
    """
    if step.rows is None:
        return _NO_ROWS
    if step.layout is None or step.rows.dtype.name not in _DTYPES:
        seen = f"rows of dtype {step.rows.dtype}, layout {'given' if step.layout else 'missing'}"
        raise ValueError(f"step {step.step}: {seen}; {' or '.join(_DTYPES)} and a layout are needed")
    return step.rows.dtype.name, step.layout.names


def _header_line(schema: tuple[str, tuple[str, ...]]) -> bytes:
    header = {"format": "gns-steps", "version": VERSION, "dtype": schema[0], "names": schema[1]}
    return json.dumps(header, separators=(",", ":")).encode() + b"\n"


def _step_line(step: StepSums) -> bytes:
    record = {f.name: number(getattr(step, f.name)) for f in _SCALARS}
    if step.rows is not None:
        record["rows"] = _decimals(step.rows)
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _lines(steps: Iterable[StepSums]) -> Iterator[bytes]:
    """Yield the lines of a whole file."""
    schema = _NO_ROWS
    yield _header_line(schema)
    for step in steps:
        if _schema(step) != schema:
            schema = _schema(step)
            yield _header_line(schema)
        yield _step_line(step)


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file that is at every moment either the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(chunks)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _refuse_foreign(path: Path) -> None:
    """Let pass only a file that is empty or begins like ours.

    Raises:
        RecordsError: it is foreign.
    """
    with path.open("rb") as file:
        first = file.readline(1 << 20)
    if not (first.startswith(_MAGIC) or _MAGIC.startswith(first)):
        seen = first[:60].decode(errors="replace").strip()
        raise RecordsError(
            f"{path}, line 1: seen {seen!r}; a file that begins with a gns-steps header is needed. "
            "The file was left as it is: choose another folder, or move it away."
        )


def _repair(path: Path) -> None:
    """End a last line that lacks its newline, or cut it off, with a warning, if it is not whole."""
    with path.open("r+b") as file:
        size = back = file.seek(0, os.SEEK_END)
        tail = b""
        while back and b"\n" not in tail:
            back = max(0, back - (1 << 16))
            file.seek(back)
            tail = file.read()
        partial = tail[tail.rfind(b"\n") + 1 :]
        if not partial:
            return
        if isinstance(parsed(partial), dict):
            file.seek(size)
            file.write(b"\n")
            return
        file.truncate(size - len(partial))
    warnings.warn(f"{path}: cut off a last line of {len(partial)} bytes that was not whole", stacklevel=3)


class StepsWriter:
    """Appends records to a `steps.jsonl`; killed at any byte, it leaves at most one line that is not whole.

    No file stays open between two writes, so the file may be read, cut or replaced meanwhile.

    Args:
        path: the file; its folder is made.
        append: continue the records there; otherwise they are replaced.

    Raises:
        RecordsError: a file is there that is not one of ours.
    """

    def __init__(self, path: str | Path, *, append: bool = True) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._schema: tuple[str, tuple[str, ...]] | None = None  # of the last header, as far as known
        self._size = -1
        if self.path.exists():
            _refuse_foreign(self.path)
            _repair(self.path)
        if not append or not self.path.exists() or not self.path.stat().st_size:
            write_atomically(self.path, [_header_line(_NO_ROWS)])

    def write(self, step: StepSums) -> None:
        """Append one record, with a header before it where the layout has changed.

        A ValueError says so if its rows are neither float32 nor float64, or have no names.
        """
        schema, line = _schema(step), _step_line(step)
        if self.path.exists() and self.path.stat().st_size != self._size:  # another hand was at the file
            _repair(self.path)
            self._schema = None
        with self.path.open("ab") as file:
            file.write(line if schema == self._schema else _header_line(schema) + line)
            self._size = file.tell()
        self._schema = schema


def cut_after(path: str | Path, step: int) -> int:
    """Keep the records with a step number ≤ `step`, as a resume from a checkpoint needs; atomic.

    A file that is foreign, or damaged elsewhere than in an unfinished last line, is left alone and a
    `RecordsError` says so.

    Returns:
        How many records were dropped.
    """
    path = Path(path)
    _refuse_foreign(path)
    kept, dropped = [], 0
    with path.open("rb") as file:
        for line in file:
            record = parsed(line)
            if not isinstance(record, dict):
                if line.endswith(b"\n"):
                    read_steps(path)  # raises, and says where
                continue  # the unfinished last line
            if "format" in record or record.get("step", math.inf) <= step:
                kept.append(line if line.endswith(b"\n") else line + b"\n")
            else:
                dropped += 1
    write_atomically(path, kept)
    return dropped


def _key(step: StepSums) -> tuple[Any, ...]:
    """What two records of the same reading agree in; NaN included."""
    return step.step, step.n_examples, repr(step.mean_sq_norm), repr(step.sq_norm_of_mean)


def write_steps(path: str | Path, steps: Iterable[StepSums]) -> list[StepSums]:
    """Bring a `steps.jsonl` up to date with `steps`, writing only what is missing.

    Records in the file from before the first given step stay (a bounded history has forgotten them); from
    there on the given ones win. If others would be lost by that, the old file is kept as `steps.old.jsonl`.
    A foreign file is left alone and a `RecordsError` says so.

    Returns:
        All records that the file now holds.
    """
    path, steps = Path(path), list(steps)
    if not path.exists() or not path.stat().st_size:
        write_atomically(path, _lines(steps))
        return steps
    _refuse_foreign(path)
    held, faults = _scan(path, rows=not steps)
    if not steps:
        return held
    first = min(step.step for step in steps)
    before = [step for step in held if step.step < first]
    if before:
        before = [step for step in _scan(path)[0] if step.step < first]
    old, new = [_key(s) for s in held if s.step >= first], [_key(s) for s in steps]
    if not faults and old == new[: len(old)]:
        if len(new) > len(old):
            writer = StepsWriter(path)
            for step in steps[len(old) :]:
                writer.write(step)
        return before + steps
    if not set(old) <= set(new):
        shutil.copyfile(path, path.with_name("steps.old.jsonl"))
    write_atomically(path, _lines(before + steps))
    return before + steps


def parsed(line: bytes) -> Any:
    """Parse JSON, or give None."""
    try:
        return json.loads(line)
    except ValueError:  # JSON or UTF-8
        return None


class _Reader:
    """Turns lines into records, one after another; `read` raises ValueError at a bad line and can go on."""

    def __init__(self) -> None:
        self.steps: list[StepSums] = []
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._layout: Layout | None = None  # None: its header was lost, so rows cannot be named
        self._dtype, self._supported, self._first = "float64", True, True

    def read(self, line: bytes) -> None:
        """Read a line.

        Raises:
            ValueError: it is no record of a step, or no header where one must be.
        """
        first, self._first = self._first, False
        record = parsed(line)
        header = isinstance(record, dict) and record.get("format") == "gns-steps"
        if first and not header:
            raise ValueError("is not a gns-steps header; the file is foreign or its beginning is lost")
        if not isinstance(record, dict):
            if line.startswith(_MAGIC) or _MAGIC.startswith(line.strip()):
                self._layout = None
            raise ValueError("is cut short" if not line.endswith(b"\n") else "is not a JSON object")
        if header:
            self._read_header(record)
        elif self._supported:
            self.steps.append(self._step(record))

    def _read_header(self, record: dict[str, Any]) -> None:
        self._layout, self._supported = None, record.get("version") == VERSION
        if not self._supported:
            seen = record.get("version")
            raise ValueError(
                f"has version {seen}; this gns {__version__} reads {VERSION}: install a newer gns"
            )
        names, dtype = record.get("names"), record.get("dtype")
        if dtype not in _DTYPES or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"is a header without names, or with a dtype not in {', '.join(_DTYPES)}")
        self._layout, self._dtype = self._layouts.setdefault(tuple(names), Layout(tuple(names))), dtype

    def _step(self, record: dict[str, Any]) -> StepSums:
        missing = [name for name in _NEEDED if name not in record]
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}")
        values = {f.name: record[f.name] for f in _SCALARS if f.name in record}
        for name, value in values.items():
            values[name] = _checked(name, value)
        rows = record.get("rows")
        if rows is None or self._layout is None:
            return StepSums(**values)
        array = np.array(rows, dtype=_DTYPES[self._dtype])
        if rows == []:  # of a step in which no parameter could be measured
            array = array.reshape(0, 2)
        if array.shape != (len(self._layout.names), 2):
            raise ValueError(f"has rows of shape {array.shape}; its header names {len(self._layout.names)}")
        return StepSums(**values, rows=array, layout=self._layout)


def _checked(name: str, value: Any) -> Any:
    """Decode one field of a step.

    Raises:
        ValueError: the value is of the wrong kind.
    """
    if name == "top_sq_norms":
        kind, right = "a list of numbers", isinstance(value, list)
        value = tuple(float(x) for x in value) if right else value
    elif name in _FLOATS and value is not None:
        kind, value = "a number", float(value) if isinstance(value, str | int | float) else value
        right = isinstance(value, float)
    elif name in ("finite", "loss_scaled", "local", "call_seen"):
        kind, right = "true or false", isinstance(value, bool)
    elif name == "metric":
        kind, right = "a name", isinstance(value, str)
    elif name in ("step", "n_examples"):
        kind, right = "a whole number", isinstance(value, int) and not isinstance(value, bool)
    else:
        return value
    if not right:
        raise ValueError(f"has {name} = {value!r}; {kind} is needed")
    return value


def _scan(path: Path, *, rows: bool = True) -> tuple[list[StepSums], list[str]]:
    """Read all good records, and say of every bad line what is wrong with it; `rows=False` is 20 × faster."""
    reader, faults = _Reader(), []
    line, number = b"", 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not rows and line.endswith(b"]]}\n"):
                line = line[: line.find(b',"rows":')] + b"}\n"
            try:
                reader.read(line)
            except (ValueError, TypeError) as error:
                seen = line[:60].decode(errors="replace").strip()
                faults.append(f"line {number} {error} (seen: {seen!r})")
    if not number:
        faults.append("line 1 is missing: the file is empty")
    return reader.steps, faults


def read_steps(path: str | Path, *, strict: bool = True) -> list[StepSums]:
    """Read the records of a `steps.jsonl`.

    Args:
        path: the file.
        strict: raise at any damage; otherwise warn, and give the good records.

    Returns:
        The records in the order of the file; steps of one layout share one `Layout`.

    Raises:
        RecordsError: a line is truncated, malformed or foreign, and `strict`; its `.steps` are the good ones.
    """
    steps, faults = _scan(Path(path))
    if not faults:
        return steps
    more = f", and {len(faults) - 1} more bad line(s)" if len(faults) > 1 else ""
    message = (
        f"{path}, {faults[0]}{more}; a gns-steps header, then one whole record a line, is needed. "
        f"{len(steps)} good record(s) are kept in this error's .steps; read_steps(path, strict=False) "
        "gives them, and StepsWriter(path) cuts off an unfinished last line."
    )
    if strict:
        raise RecordsError(message, steps)
    warnings.warn(message, stacklevel=2)
    return steps
