"""Where in a model a module sits: its block over depth, and its name within the block. Pure text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """A module in a numbered block.

    Args:
        stack: path of the list of blocks, e.g. "model.layers".
        number: of the block in it.
        name: the module's path within the block, e.g. "self_attn.q_proj".
    """

    stack: str
    number: int
    name: str


def place_of(path: str) -> Place | None:
    """Find the first number in a module's path; None where there is none.

    >>> place_of("model.layers.3.self_attn.q_proj")
    Place(stack='model.layers', number=3, name='self_attn.q_proj')
    """
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return Place(".".join(parts[:i]), int(part), ".".join(parts[i + 1 :]))
    return None


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Shorten dotted paths as far as they stay apart: path → its last parts.

    >>> short_names(["self_attn.q_proj", "mlp.up_proj"])
    {'self_attn.q_proj': 'q_proj', 'mlp.up_proj': 'up_proj'}
    >>> short_names(["encoder.block", "decoder.block"])
    {'encoder.block': 'encoder.block', 'decoder.block': 'decoder.block'}
    """
    whole = list(dict.fromkeys(paths))
    longest = max((path.count(".") + 1 for path in whole), default=1)
    for kept in range(1, longest + 1):
        short = {path: ".".join(path.split(".")[-kept:]) for path in whole}
        if len(set(short.values())) == len(whole):
            return short
    return {path: path for path in whole}


def short_paths(folders: Iterable[str]) -> dict[str, str]:
    """Shorten paths of folders as far as they stay apart: path → its last parts.

    >>> short_paths(["runs/a", "runs/b"])
    {'runs/a': 'a', 'runs/b': 'b'}
    """
    parts = {
        folder: ".".join(p.replace(".", "\0") for p in Path(folder).resolve().parts) for folder in folders
    }
    short = short_names(parts.values())
    return {folder: short[key].replace(".", "/").replace("\0", ".") for folder, key in parts.items()}


def block_labels(places: Iterable[Place]) -> dict[tuple[str, int], str]:
    """Label blocks: (stack, number) → "3", or "encoder.block 3" where there are several stacks."""
    keys = list(dict.fromkeys((place.stack, place.number) for place in places))
    names = short_names(stack for stack, _ in keys)
    return {key: str(key[1]) if len(names) == 1 else f"{names[key[0]]} {key[1]}" for key in keys}
