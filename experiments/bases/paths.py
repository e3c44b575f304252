"""Where a base model is: shipped, made here, anywhere else."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path

from experiments.bases.configs import BASES
from experiments.configs import RunError
from gns import corpus

SHIPPED = Path(__file__).resolve().parent.parent / "assets"
MADE = Path("runs/bases")  # where the command writes; checkpoints of unfinished runs are beside it


def base_path(name_or_path: str) -> Path | str:
    """Say where a base model is, for `from_pretrained` of transformers.

    Args:
        name_or_path: row of `BASES`, folder of a model, or name of one on the hub.

    Returns:
        The folder, or the hub name as it is.

    Raises:
        RunError: a row that was not made, a folder that is not there, or a misspelt row.
    """
    if name_or_path in BASES:
        return _row_path(name_or_path)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise RunError(f"base {name_or_path}: no such folder; known rows: {', '.join(BASES)}")
    if "/" not in name_or_path and difflib.get_close_matches(name_or_path.lower(), BASES, cutoff=0.75):
        raise RunError(f"no base {name_or_path!r}; known rows: {', '.join(BASES)}")
    return name_or_path


def parameters(name: str) -> int:
    """Give the number of parameters of a row of `BASES`: of the model where it is here, else of its name.

    Raises:
        RunError: it is no row, and its name ends in no size.
    """
    try:
        return json.loads((Path(base_path(name)) / "training.json").read_text(encoding="utf-8"))["parameters"]
    except (RunError, OSError):
        size = re.search(r"(\d+)([km])$", name)
    if size is None:
        raise RunError(f"base {name!r}: no training.json, and no size such as 25m at the end of its name")
    return int(size[1]) * {"k": 1_000, "m": 1_000_000}[size[2]]


def _row_path(name: str) -> Path:
    """Prefer what is shipped over what was made here.

    Raises:
        RunError: there is neither.
    """
    shipped = corpus.base_model_path() if name == "1m" else SHIPPED / name
    for path in (shipped, MADE / name):
        if (path / "model.safetensors").is_file():
            return path
    raise RunError(
        f"base {name}: no model.safetensors in {shipped} or {MADE / name}; make it: "
        f"python -m experiments.bases {name} (large ones: --device cuda)"
    )
