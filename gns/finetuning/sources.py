"""Read examples for fine-tuning from local files or a hub data set, as records before any tokenizer.

Known shapes of a record, the same for every line of a source:

    text                  the loss is on every token
    prompt + response     the loss is on the response; also prompt + completion, question + answer,
                          query + response, and instruction (+ input) + output
    messages              a chat through the tokenizer's template; the loss is on the assistant's turns

Plain text (.txt, .md, .py) is cut at blank lines; a paragraph shorter than `SHORTEST_PARAGRAPH` stays with
the next one, so that a heading stays with what it heads.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SHAPES = (("text",), ("prompt", "response"), ("messages",))
PAIRS = (("prompt", "completion"), ("question", "answer"), ("query", "response"), ("instruction", "output"))
KNOWN = ", or ".join(" + ".join(f"`{name}`" for name in shape) for shape in SHAPES)
TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (".jsonl", *TEXT_SUFFIXES)
SHORTEST_PARAGRAPH = 200  # characters
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # pairs have become one character when JSON is read


class DataError(ValueError):
    """The data cannot be read or hold nothing to learn; the message is one line that says what to do."""


class Record(NamedTuple):
    """One example: where it stands, its shape, its fields, and whether a long one is cut into several."""

    where: str
    shape: tuple[str, ...]
    fields: dict[str, Any]
    cut: bool = False


def read(source: str | Path, split: str = "train") -> Iterator[Record]:
    """Yield the records of a source, each checked for its shape and types.

    Args:
        source: a .jsonl, .txt, .md or .py file, a folder of them, or the name of a hub data set.
        split: of a hub data set.

    Raises:
        DataError: there is no such source, or a record is malformed.
    """
    first: Record | None = None
    for record in _open(source, split):
        first = first or record
        if record.shape != first.shape:
            raise DataError(
                f"{record.where}: has {_join(record.shape)}, but {first.where} has {_join(first.shape)}; "
                "one shape is needed throughout"
            )
        yield record


def _open(source: str | Path, split: str) -> Iterator[Record]:
    """Tell files, folders and hub names apart.

    Raises:
        DataError: it looks like a path and is not there, or the folder mixes kinds.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if len({p.suffix == ".jsonl" for p in files}) == 2:
            raise DataError(f"{source}: a folder of both .jsonl and plain text; give one of the files")
        return (record for p in files for record in _read_file(p)) if files else _read_hub(str(path), split)
    if path.exists():
        return _read_file(path)
    if path.suffix in SUFFIXES or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise DataError(f"{source}: no such file or folder")
    return _read_hub(str(source), split)


def _read_file(path: Path) -> Iterator[Record]:
    """Yield the lines of a .jsonl, or the paragraphs of a plain text.

    Raises:
        DataError: the suffix is unknown, or the file cannot be read as UTF-8.
    """
    if path.suffix not in SUFFIXES:
        seen = f"suffix {path.suffix}" if path.suffix else "no suffix"
        raise DataError(
            f"{path}: has {seen}; known: {', '.join(SUFFIXES)}. Tables and JSON: write JSON lines, an object "
            "a line"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte-order mark is no part of the text
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        yield from (_parse(line, f"{path}, line {i}") for i, line in lines if line.strip())
    else:
        pieces = enumerate(paragraphs(text), 1)
        yield from (Record(f"{path}, paragraph {i}", ("text",), {"text": p}, cut=True) for i, p in pieces)


def paragraphs(text: str) -> list[str]:
    r"""Cut plain text at blank lines; a piece shorter than `SHORTEST_PARAGRAPH` stays with the next one.

    >>> [len(piece) for piece in paragraphs("# Title" + 2 * ("\n\n" + 300 * "x") + "\n \n\nthe end")]
    [309, 309]
    """
    pieces: list[str] = []
    for piece in re.split(r"\n(?:[^\S\n]*\n)+", text.strip("\n")):
        if pieces and len(pieces[-1]) < SHORTEST_PARAGRAPH:
            pieces[-1] += "\n\n" + piece
        elif piece.strip():
            pieces.append(piece)
    if len(pieces) > 1 and len(pieces[-1]) < SHORTEST_PARAGRAPH:
        last = pieces.pop()
        pieces[-1] += "\n\n" + last
    return pieces


def _parse(line: str, where: str) -> Record:
    """Read one line of a .jsonl.

    Raises:
        DataError: it is not a JSON object of one known shape and nothing else.
    """
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise DataError(f"{where}: malformed JSON (nested too deeply)") from None
    except ValueError:  # the one other error of json: Python reads no longer number
        most = sys.get_int_max_str_digits()
        raise DataError(f"{where}: malformed JSON (a number of more than {most} digits)") from None
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a JSON {type(fields).__name__}; an object with {KNOWN} is needed")
    fields = _renamed(fields)
    shape = _shape(fields, where)
    if unknown := [name for name in fields if name not in shape]:
        raise DataError(
            f"{where}: unknown field {_join(unknown)} beside {_join(shape)}; remove it (known: {KNOWN})"
        )
    return Record(where, shape, fields)


def _read_hub(name: str, split: str) -> Iterator[Record]:
    """Yield the records of a hub data set, or of a folder in one of `datasets`' own formats.

    Further columns are left alone: the user cannot edit a hub data set.

    Raises:
        DataError: `datasets` is not installed, or cannot load it.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            f"{name}: no local file or folder with {', '.join(SUFFIXES)}; a hub data set needs `datasets`: "
            "pip install 'gradient-noise-scale[experiments]'"
        ) from None
    try:
        saved = any((Path(name) / mark).is_file() for mark in ("dataset_info.json", "dataset_dict.json"))
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split)
    except Exception as error:  # whatever the hub, the network or a file format raises, it ends in one line
        raise DataError(f"{name}: cannot be loaded as a data set: {first_line(error)}") from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise DataError(f"{name}: no split {split!r}; it has {_join(loaded)}")
        loaded = loaded[split]
    for i, row in enumerate(loaded, 1):
        fields = _renamed(dict(row))
        shape = _shape(fields, f"{name}, row {i}")
        yield Record(f"{name}, row {i}", shape, {field: fields[field] for field in shape})


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    """Give prompt and response the names they have here, where a record has one of `PAIRS` instead."""
    if any(all(name in fields for name in shape) for shape in SHAPES):
        return fields
    found = [pair for pair in PAIRS if all(isinstance(fields.get(name), str) for name in pair)]
    if len(found) != 1:
        return fields
    others = {name: value for name, value in fields.items() if name not in found[0]}
    prompt, response = (fields[name] for name in found[0])
    if found[0][0] == "instruction" and isinstance(others.get("input", ""), str):
        more = others.pop("input", "")
        prompt = f"{prompt}\n\n{more}" if more else prompt
    return {"prompt": prompt, "response": response, **others}


def _shape(fields: dict[str, Any], where: str) -> tuple[str, ...]:
    """Find the one shape whose fields are all there, and check their types.

    Raises:
        DataError: there is none, or more than one, or a type is wrong.
    """
    found = [shape for shape in SHAPES if all(name in fields for name in shape)]
    if not found:
        raise DataError(
            f"{where}: unknown fields {_join(fields) or '(none)'}; known: {KNOWN} (also "
            f"{', '.join(' + '.join(pair) for pair in PAIRS)}); rename them"
        )
    if len(found) > 1:
        seen = " and ".join(map(_join, found))
        raise DataError(f"{where}: ambiguous, has {seen}; one of {KNOWN} is needed")
    for name in found[0]:
        if name == "messages":
            _check_messages(fields[name], where)
        elif not isinstance(fields[name], str):
            raise DataError(f"{where}: `{name}` is a {type(fields[name]).__name__}; a string is needed")
        if half := _half_character(fields[name]):
            raise DataError(
                f"{where}: `{name}` holds half a character ({half}); write the whole one, or none"
            )
    return found[0]


def _check_messages(messages: Any, where: str) -> None:
    """Check the turns of a chat.

    Raises:
        DataError: they are not {role, content} pairs of strings, or the assistant never speaks.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: `messages` is not a list of turns; [{{role, content}}, …] is needed")
    for i, turn in enumerate(messages, 1):
        fields = [turn.get(name) for name in ("role", "content")] if isinstance(turn, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise DataError(f"{where}: turn {i} of `messages` lacks `role` and `content` as strings")
    if not any(turn["role"] == "assistant" for turn in messages):
        raise DataError(f"{where}: `messages` has no turn of role `assistant`, so nothing to learn")


def _half_character(value: Any) -> str | None:
    """Give the first lone surrogate in the strings of a JSON value, as JSON writes it: no tokenizer takes it.

    JSON writes a character beyond U+FFFF as a pair of surrogates; text that was cut within leaves one alone.
    """
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, str) and (found := LONE_SURROGATE.search(part)):
            return f"\\u{ord(found[0]):04x}"
    return None


def _join(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def first_line(error: BaseException) -> str:
    r"""Give the first line of an error's message, or its kind where it has none.

    If it announces a list with a colon, the list comes with it, up to the end of its sentence.

    >>> first_line(OSError("None of these: \n(1) a file, \n(2) a folder. \nMore is said below."))
    'None of these: (1) a file, (2) a folder.'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    taken = 1
    if lines[0].endswith(":"):
        ends = [i for i, line in enumerate(lines, 1) if line.endswith(".")]
        taken = ends[0] if ends else len(lines)
    return " ".join(lines[:taken])
