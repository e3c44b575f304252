"""Real data sets: records from the hub or local files in their published schema; prompt and rows."""

from __future__ import annotations

import abc
import functools
import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from experiments.configs import RunError
from experiments.tasks.items import Item, Rows, known_split, take, whole_dial

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
HELD_OUT_SHARE = 50  # one group of records in so many is for validation

# of Alpaca, as PiSSA's and MiLoRA's fine-tunes on these data sets use it
PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True)
class HubRows(Rows, abc.ABC):
    """Rows of one data set, and the items of another to be tested on.

    Records of `data` without a question or without an answer teach nothing, and are left out: published sets
    have a few (four of MetaMathQA have no question, https://github.com/meta-math/MetaMath/issues/35).

    Args:
        merged: as in `Rows`.
        copies: as in `Rows`.
        data: to learn; a part of it is for validation.
        test_data: to be tested on.
        first: use only the first so many records of `data`; None: all.
        longest: leave out records of `data` with more characters than this; None: none.
    """

    data: str = ""
    test_data: str = ""
    first: int | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for dial in ("first", "longest"):
            if getattr(self, dial) is not None:
                whole_dial(self, dial, 1)

    def train(self, n: int, seed: int) -> list[Item]:
        """Give `n` rows of the training part in an order of this seed."""
        items = self._items(validation=False)
        Random(f"{self.name.partition('-')[0]} {seed}").shuffle(items)
        return self.rows(
            take(items, self.examples_for(n), f"the training part of {self.data}{self._said()}"), n
        )

    def held_out(self, split: str, n: int) -> list[Item]:
        """Give the first `n` items of a split: of `data` for validation, of `test_data` for the test."""
        known_split(split)
        if split == "validation":
            return take(self._items(validation=True), n, f"the validation part of {self.data}{self._said()}")
        return take(self._tested(), n, f"{self.test_data} (test)")

    @abc.abstractmethod
    def _items(self, *, validation: bool) -> list[Item]:
        """Give all items of one part of `data`, in its order, of records that are `taught`."""

    @abc.abstractmethod
    def _pairs(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """Give the questions and the answers of all records of `data` that are used."""

    def _said(self) -> str:
        """Say how many records were left out for want of a question or an answer; nothing if none was."""
        lost = sum(not taught(*pair) for pair in zip(*self._pairs(), strict=True))
        return f" ({lost} records without a question or an answer left out)" if lost else ""

    @abc.abstractmethod
    def _tested(self) -> list[Item]:
        """Give all items of `test_data`, in its order."""

    def _columns(self, *needed: str) -> Any:
        """Give the columns of the records of `data` that are used."""
        found = records(self.data, "train", needed)
        return found[: len(found) if self.first is None else min(self.first, len(found))]

    def _short(self, *texts: str) -> bool:
        return self.longest is None or sum(map(len, texts)) <= self.longest


def taught(question: Any, answer: Any) -> bool:
    """Whether a record has both a question and an answer."""
    return all(isinstance(text, str) and text.strip() for text in (question, answer))


def prompt(instruction: str) -> str:
    """Wrap an instruction."""
    return PROMPT.format(instruction=instruction)


@functools.lru_cache(maxsize=8)
def records(source: str, split: str, needed: tuple[str, ...], config: str | None = None) -> Any:
    """Read a data set.

    Args:
        source: a .json, .jsonl or .parquet file, a folder of such files of one kind, or the name of a hub
            data set.
        split: of a hub data set; a local source is taken whole.
        needed: columns that must be there.
        config: of a hub data set that has several.

    Returns:
        A `datasets.Dataset` of its records, in their order; columns that are not needed may be there too.

    Raises:
        RunError: `datasets` is not installed, the source cannot be read, or a column is missing.
    """
    load = _load_dataset()
    files = _files(source)
    try:
        if files is None:
            found = load(source, config, split=split)
        else:
            found = load(FORMATS[files[0].suffix], data_files=[str(file) for file in files], split="train")
    except Exception as error:  # of the hub, the network, a parser: whatever it is, it names the source
        raise RunError(f"{source}: cannot be read: {' '.join(str(error).split())}") from error
    if missing := [column for column in needed if column not in found.column_names]:
        raise RunError(
            f"{source}: no column {', '.join(missing)} (there are {', '.join(found.column_names)}); needed: "
            f"{', '.join(needed)}"
        )
    return found


def for_validation(group: str) -> bool:
    """Whether a group of records is held out for validation: by a hash, so that no group is in two parts."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:4]) % HELD_OUT_SHARE == 0


def _load_dataset() -> Any:
    """Import on first use: runs on generated tasks need no `datasets`.

    Raises:
        RunError: it is not installed.
    """
    try:
        return importlib.import_module("datasets").load_dataset
    except ImportError as error:
        raise RunError(
            "tasks on real data need the package datasets: pip install 'gradient-noise-scale[experiments]'"
        ) from error


def _files(source: str) -> list[Path] | None:
    """Give the files of a local source; None for a hub name.

    Raises:
        RunError: it looks local and is not there, or holds no or mixed formats.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in FORMATS)
        if len({FORMATS[file.suffix] for file in files}) != 1:
            kinds = ", ".join(sorted({file.suffix for file in files})) or "none"
            raise RunError(f"{source}: one of {', '.join(FORMATS)} files is needed in it, there is: {kinds}")
        return files
    if path.is_file():
        if path.suffix not in FORMATS:
            raise RunError(f"{source}: of no known format; known: {', '.join(FORMATS)}")
        return [path]
    if path.suffix in FORMATS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise RunError(f"{source}: no such file or folder")
    return None
