"""Presets: a TOML file under `experiments/presets/` → the list of runs of a sweep.

    title, question     what is asked, in words
    paper               the figure of arXiv:2602.09492 that it repeats, if any
    scale               "smoke", "laptop", "gpu" or "paper"
    figures             drawings of `experiments.figures`
    series              fields that tell the curves of one figure apart
    [rules]             least_steps: cells of fewer optimizer steps are left out, and counted
    [defaults]          fields of `RunConfig`, the same for every run
    [grid]              field → list: all combinations
    [[zip]]             fields → lists of one length, taken together; a list in such a list is one more grid
    [[cells]]           a fractional design: the grid is run once for each cell; a cell's value replaces the
                        default or the grid's list, and a list in it is one more grid; its own [[cells.zip]]
                        replace those of all cells
    [[exclude]]         fields → a value or a list of values: runs that match all of them are left out

Fields of the task are written `dials.NAME`, or as a table `dials`. A run may come up once only.
"""

from __future__ import annotations

import difflib
import itertools
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from experiments.configs import RunConfig, RunError
from experiments.rowsfile import Row

FOLDER = Path(__file__).parent / "presets"
SCALES = ("smoke", "laptop", "gpu", "paper")
DRAWINGS = ("curves", "rates", "surface", "scales")
_TEXTS = ("title", "question", "paper", "scale")
_KEYS = (*_TEXTS, "figures", "series", "rules", "defaults", "grid", "zip", "cells", "exclude")
_FIELDS = frozenset(f.name for f in fields(RunConfig))


@dataclass(frozen=True)
class Preset:
    """A sweep.

    Args:
        name: of the file, without its suffix.
        title: of its figures.
        question: that it answers.
        paper: figure of the paper that it repeats; "" where none.
        scale: one of `SCALES`.
        figures: drawings of `experiments.figures`, of `DRAWINGS`.
        series: fields that tell the curves of a figure apart, `dials.NAME` for the task's own.
        configs: its runs, in the order of the file; none twice.
        starved: cells (runs that differ in more than seeds and learning rate) left out for too few steps.
        least_steps: of that rule.
    """

    name: str
    title: str
    question: str
    paper: str
    scale: str
    figures: tuple[str, ...]
    series: tuple[str, ...]
    configs: tuple[RunConfig, ...]
    starved: int
    least_steps: int

    def own(self, rows: Iterable[Row]) -> list[Row]:
        """Give the rows of its runs, in its order, whichever sweep made them and in whatever order."""
        order = {config.hash: i for i, config in enumerate(self.configs)}
        return sorted((row for row in rows if row["hash"] in order), key=lambda row: order[row["hash"]])


def names() -> list[str]:
    """Name the presets of this repository."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name_or_path: str | Path) -> Preset:
    """Read a preset.

    Args:
        name_or_path: name of a shipped preset, or the path of a TOML file.

    Raises:
        RunError: there is no such file, it is no TOML, a key is unknown, or the grid is impossible; the
            message names file and key.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = FOLDER / f"{name_or_path}.toml"
    try:
        written = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path.parent != FOLDER:
            raise RunError(
                f"{path}: no such file; give one, or a preset's name (--list shows them)"
            ) from None
        raise RunError(f"no preset {str(name_or_path)!r}; known: {', '.join(names())}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path.name}: no TOML: {error}") from error
    return parsed(path.stem, written, path.name)


def parsed(name: str, written: Mapping[str, Any], file: str) -> Preset:
    """Make a preset of what its file says.

    Args:
        name: of the preset.
        written: contents of the TOML file.
        file: its name, for messages.

    Raises:
        RunError: as `load`.
    """
    if unknown := sorted(set(written) - set(_KEYS)):
        raise RunError(f"{file}: unknown key(s) {', '.join(unknown)}; known: {', '.join(_KEYS)}")
    for key in _TEXTS:
        if not isinstance(written.get(key, ""), str):
            raise RunError(f"{file}: {key} is {written[key]!r}; a text is needed")
    if written.get("scale") not in SCALES:
        raise RunError(f"{file}: scale is {written.get('scale')!r}; known: {', '.join(SCALES)}")
    series = tuple(written.get("series", ()))
    for key in series:
        _known(key, f"{file}, series")
    figures = tuple(written.get("figures", ()))
    if unknown := sorted(set(figures) - set(DRAWINGS)):
        raise RunError(f"{file}, figures: unknown {', '.join(unknown)}; known: {', '.join(DRAWINGS)}")
    rules = written.get("rules", {})
    if unknown := sorted(set(rules) - {"least_steps"}):
        raise RunError(f"{file}, [rules]: unknown key(s) {', '.join(unknown)}; known: least_steps")
    least = rules.get("least_steps", 1)
    if isinstance(least, bool) or not isinstance(least, int) or least < 1:
        raise RunError(f"{file}, [rules]: least_steps is {least!r}; a whole number, 1 or more, is needed")
    configs, starved = _runs(written, file, least)
    texts = {key: written.get(key, "") for key in _TEXTS}
    return Preset(
        name=name,
        figures=figures,
        series=series,
        configs=configs,
        starved=starved,
        least_steps=least,
        **texts,
    )


def _runs(written: Mapping[str, Any], file: str, least: int) -> tuple[tuple[RunConfig, ...], int]:
    """Expand, check and prune; give the runs and how many cells were starved of steps."""
    excluded = [
        _flat(table, f"{file}, [[exclude]] {i + 1}")
        for i, table in enumerate(_tables(written, file, "exclude"))
    ]
    found: dict[str, RunConfig] = {}
    starved: set[tuple] = set()
    for fields_of_run, where in _expanded(written, file):
        if any(_matches(fields_of_run, rule) for rule in excluded):
            continue
        # asked before the configuration is made: a batch beyond the data has no step to count
        if cell := _starved(fields_of_run, least):
            starved.add(cell)
            continue
        try:
            config = RunConfig.of(_nested(fields_of_run))
        except RunError as error:
            raise RunError(f"{where}: {error}") from error
        if config.hash in found:
            said = ", ".join(
                f"{key} = {value!r}" for key, value in fields_of_run.items() if key in _axes(written)
            )
            raise RunError(f"{where}: the same run twice ({said}); remove the repeated value or cell")
        found[config.hash] = config
    if not found:
        raise RunError(f"{file}: no run is left ({len(starved)} cell(s) with fewer than {least} steps)")
    return tuple(found.values()), len(starved)


def _expanded(written: Mapping[str, Any], file: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Give the fields of every run, and where in the file they come from."""
    defaults = _flat(written.get("defaults", {}), f"{file}, [defaults]")
    for key, value in defaults.items():
        if isinstance(value, list):
            raise RunError(f"{file}, [defaults]: {key} is {value!r}; a list belongs into [grid]")
    grid = _flat(written.get("grid", {}), f"{file}, [grid]")
    for key, values in grid.items():
        _listed(values, f"{file}, [grid]: {key}")
    shared = _zips(written, file)
    cells = _tables(written, file, "cells") or [{}]
    for i, cell in enumerate(cells):
        where = f"{file}, [[cells]] {i + 1}" if cell else file
        zips = _zips(cell, where) if "zip" in cell else shared
        own = _flat({key: value for key, value in cell.items() if key != "zip"}, where)
        lists: dict[str, list] = {k: v for k, v in (grid | own).items() if isinstance(v, list)}
        for key, values in lists.items():
            _listed(values, f"{where}: {key}")
        fixed = defaults | {k: v for k, v in own.items() if not isinstance(v, list)}
        # what a cell fixes is not gridded any more, and no longer moves with what it was zipped to
        columns = [
            [{key: value} for value in values]
            for key, values in lists.items()
            if key not in own or isinstance(own[key], list)
        ]
        moved = [[{k: v for k, v in row.items() if k not in own} for row in rows] for rows in zips]
        for parts in itertools.product(*(rows for rows in moved if rows[0]), *columns):
            run = fixed | {key: value for part in parts for key, value in part.items()}
            yield from ((spread, where) for spread in _spread(run))


def _spread(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Expand what is still a list: elements of zipped lists."""
    lists = {key: value for key, value in given.items() if isinstance(value, list)}
    for values in itertools.product(*lists.values()):
        yield given | dict(zip(lists, values, strict=True))


def _zips(written: Mapping[str, Any], where: str) -> list[list[dict[str, Any]]]:
    """Give the rows of every group of lists that move together."""
    tables = _tables(written, where, "zip")
    return [_zipped(table, f"{where}, [[zip]] {i + 1}") for i, table in enumerate(tables)]


def _zipped(table: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Give the rows of lists that move together."""
    columns = _flat(table, where)
    for key, values in columns.items():
        _listed(values, f"{where}: {key}")
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) != 1:
        said = ", ".join(f"{key} {n}" for key, n in lengths.items())
        raise RunError(f"{where}: lists of one length are needed; seen: {said or 'nothing'}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _tables(written: Mapping[str, Any], file: str, key: str) -> list[Mapping[str, Any]]:
    """Give an array of tables."""
    tables = written.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise RunError(f"{file}: {key} is a list of tables, written [[{key}]]")
    return tables


def _flat(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Write a table's `dials` as `dials.NAME`, and refuse fields that no run has."""
    if not isinstance(table, Mapping):
        raise RunError(f"{where}: a table is needed, seen {table!r}")
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if key == "dials":
            if not isinstance(value, Mapping):
                raise RunError(f"{where}: dials is {value!r}; a table is needed, or dials.NAME = ...")
            flat |= {f"dials.{name}": dial for name, dial in value.items()}
        else:
            flat[key] = value
    for key in flat:
        _known(key, where)
    return flat


def _known(key: str, where: str) -> None:
    """Refuse a field that no run has."""
    if key not in _FIELDS and not key.startswith("dials."):
        near = difflib.get_close_matches(key, _FIELDS, 1)
        meant = f"did you mean {near[0]!r}? Known" if near else "known"
        raise RunError(f"{where}: unknown field {key!r}; {meant}: {', '.join(sorted(_FIELDS))}, dials.NAME")


def _listed(values: Any, where: str) -> None:
    """Refuse what is no list of values."""
    if not isinstance(values, list) or not values:
        raise RunError(f"{where} is {values!r}; a list with at least one value is needed")


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Gather `dials.NAME` into one mapping."""
    dials = {key.removeprefix("dials."): value for key, value in flat.items() if key.startswith("dials.")}
    return {key: value for key, value in flat.items() if not key.startswith("dials.")} | {"dials": dials}


def _matches(given: Mapping[str, Any], rule: Mapping[str, Any]) -> bool:
    """Say whether a run has all the values of a rule."""
    return all(
        given.get(key) in value if isinstance(value, list) else given.get(key) == value
        for key, value in rule.items()
    )


def _starved(given: Mapping[str, Any], least: int) -> tuple | None:
    """Give the cell of a run that makes fewer than `least` steps, else None. Fixed steps starve nobody."""
    n, batch = given.get("n_train", RunConfig.n_train), given.get("batch_size", RunConfig.batch_size)
    if least == 1 or given.get("protocol") == "steps" or not isinstance(n, int) or not isinstance(batch, int):
        return None
    if batch < 1 or given.get("epochs", 1) * -(-n // batch) >= least:
        return None
    return tuple((k, str(v)) for k, v in sorted(given.items()) if k not in ("lr", "seed", "data_seed"))


def _axes(written: Mapping[str, Any]) -> set[str]:
    """Name the fields that a preset varies."""
    cells = written.get("cells", [])
    tables = [written.get("grid", {}), *written.get("zip", []), *(t for c in cells for t in c.get("zip", []))]
    tables += [{key: value for key, value in cell.items() if key != "zip"} for cell in cells]
    return {key for table in tables for key in _flat(table, "")}
