"""Real text and a real base model that need no network.

The text is the Python standard library of the running interpreter: source, comments and docstrings, in two
fixed parts. `base` is what the shipped base model was trained on; `held_out` is a named list of packages that
neither it nor its tokenizer ever saw, so fine-tuning on it is fine-tuning on new text. The split goes by
name, so it means the same on every Python; the text itself is the running interpreter's.
"""

import ast
import importlib.resources
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Part = Literal["base", "held_out"]

# About an eighth of the text: common packages, there on every Python since 3.4, written in many hands.
HELD_OUT = frozenset({"asyncio", "email", "http", "unittest"})

# In neither part: email.mime.image and email.mime.audio hold a copy of them. (A test compares all lines.)
COPIED = frozenset({"imghdr", "sndhdr"})

# Not text that a person wrote to be read: character tables, escaped help pages, the settings of one build.
GENERATED = frozenset({"encodings", "pydoc_data", "_sysconfigdata"})

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

SHORTEST_EXAMPLE = 80  # characters: below it, one-line overrides and aliases outnumber everything else
LONGEST_WHOLE_CLASS = 1_000  # characters: a longer class becomes its head and its methods


@dataclass(frozen=True)
class Document:
    """One source file: its path inside the standard library, with forward slashes, and its whole text."""

    name: str
    text: str


def documents(part: Part, root: Path | None = None) -> list[Document]:
    """All files of one part of the standard library, sorted by name.

    Args:
        part: "base" or "held_out".
        root: folder of the library's sources; by default the running interpreter's.

    Returns:
        The documents, at least one. Tests, generated files, empty files and files that are not UTF-8 are
        left out.

    Raises:
        ValueError: if `part` is neither of the two.
        FileNotFoundError: if there are no sources (a zipped or stripped installation).
    """
    if part not in get_args(Part):
        raise ValueError(f"part={part!r}: no such part of the corpus. Known: {', '.join(get_args(Part))}.")
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    found = [document for path in _sources(root, part) if (document := _read(path, root)) is not None]
    if not found:
        raise FileNotFoundError(
            f"standard library of Python {platform.python_version()}: no source of the {part!r} part "
            f"in {root}; its .py files are needed, and this installation is zipped or stripped of them. "
            "Use a Python with its sources, or give text of your own."
        )
    return sorted(found, key=lambda document: document.name)


def examples(part: Part, root: Path | None = None) -> list[str]:
    """Functions, methods and classes of one part: real examples of uneven length for fine-tuning.

    No text is in two examples, and exact repeats are dropped: a repeat inside a batch adds to |G|² and makes
    the noise scale read low.

    Args:
        part: "base" or "held_out".
        root: folder of the library's sources; by default the running interpreter's.

    Returns:
        Pieces of source text, in the order of the documents, decorators and docstrings included, without
        surrounding blank lines and with the indentation of their first line removed from every line.
    """
    pieces = (piece for document in documents(part, root) for piece in cut(document))
    return list(dict.fromkeys(piece for piece in pieces if len(piece) >= SHORTEST_EXAMPLE))


def cut(document: Document) -> Iterator[str]:
    """Cut one document at its function and class boundaries; module-level statements are left out.

    Yields nothing for a file that this interpreter cannot parse (templates, sources of another grammar).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old files are no concern of the reader
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return
    # splitlines() would also cut at form feeds, which ast does not count as line ends
    lines = document.text.split("\n")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield _snippet(lines, _first_line(node), node.end_lineno)
        elif isinstance(node, ast.ClassDef):
            yield from _cut_class(node, lines)


def base_model_path() -> Path:
    """Folder of the shipped base model, for `from_pretrained` of transformers.

    Raises:
        FileNotFoundError: if the checkpoint is not in this installation.
    """
    path = Path(str(importlib.resources.files("gns") / "assets" / "base-1m"))
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"base model: no model.safetensors in {path}; the shipped checkpoint is needed. "
            "Reinstall the package, or train it: python -m experiments.bases 1m --out gns/assets/base-1m"
        )
    return path


def _sources(root: Path, part: Part) -> Iterator[Path]:
    """Yield the paths of one part, in no particular order."""
    for path in root.rglob("*.py"):
        folders = path.relative_to(root).parts[:-1]
        top = folders[0] if folders else path.stem
        # the list of the library's own names keeps out what a distribution adds beside it (sitecustomize)
        known = top in sys.stdlib_module_names and top not in GENERATED | COPIED
        if known and SKIPPED_FOLDERS.isdisjoint(folders) and (top in HELD_OUT) == (part == "held_out"):
            yield path


def _read(path: Path, root: Path) -> Document | None:
    """Read one file; None if it is empty or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")  # newlines become "\n" on every platform
    except UnicodeDecodeError:
        return None
    return Document(path.relative_to(root).as_posix(), text) if text.strip() else None


def _cut_class(node: ast.ClassDef, lines: list[str]) -> Iterator[str]:
    """Yield a short class whole; of a longer one its head, then each method."""
    whole = _snippet(lines, _first_line(node), node.end_lineno)
    methods = [child for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)]
    if not methods or len(whole) <= LONGEST_WHOLE_CLASS:
        yield whole
        return
    yield _snippet(lines, _first_line(node), _first_line(methods[0]) - 1)
    for method in methods:
        yield _snippet(lines, _first_line(method), method.end_lineno)


def _first_line(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """Return the line of the first decorator, or of the definition itself."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _snippet(lines: list[str], first: int, last: int | None) -> str:
    """Join lines `first` to `last`, counted from 1, without the indentation of the first one."""
    chosen = lines[first - 1 : last]
    indent = chosen[0][: len(chosen[0]) - len(chosen[0].lstrip())] if chosen else ""
    return "\n".join(line.removeprefix(indent) for line in chosen).strip("\n")
