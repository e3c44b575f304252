"""What a row says: what was run and with what, what came out, and the same in one line."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import platform
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import rows
from experiments.configs import RunConfig, RunError
from experiments.course import Course
from experiments.evaluation import token_mean
from experiments.prepared import Data, Prepared
from experiments.tasks import Item
from experiments.tasks.accuracy import AT_ONCE, answers
from gns.finetuning.sources import first_line

ROOM = 4  # times the longest worked solution, that an answer may take
PACKAGES = ("torch", "transformers", "peft", "accelerate")
RESULTS = (
    *("steps_done", "examples_seen", "tokens_seen", "train_loss", "validation", "test_loss", "test_losses"),
    *("accuracy", "items_right", "target_step", "target_examples", "gns"),
)


def header(config: RunConfig, engine: str) -> dict[str, Any]:
    """Begin a row: what is run, with what, and null for every result."""
    commit, versions = _made_with()
    return {
        "hash": config.hash,
        "config": config.to_dict(),
        "status": "failed",
        "error": None,
        "commit": commit,
        "versions": versions,
        "device": None,
        "engine": engine,
        "threads": torch.get_num_threads(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        **dict.fromkeys(RESULTS),
    }


@functools.cache
def _made_with() -> tuple[str, dict[str, str]]:
    """Commit and versions; of the start of the program, whose code is what runs."""
    made = rows.provenance()
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return made.pop("commit"), made | packages


def device_name(device: torch.device) -> str:
    """Name a device: "cpu x86_64", "cuda NVIDIA H100"."""
    is_cuda = device.type == "cuda"
    return f"{device.type} {torch.cuda.get_device_name(device) if is_cuda else platform.machine()}"


def one_line(error: BaseException) -> str:
    """Give an error in one line: what and, unless it is about the configuration, where."""
    if isinstance(error, RunError):
        return first_line(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}, line {last.lineno}"
    return f"{type(error).__name__}: {first_line(error)} ({where})"


def finished(prepared: Prepared, course: Course) -> dict[str, Any]:
    """Give what a row says of a run that is over; of a diverged one what was known until then.

    Args:
        prepared: with the trained model.
        course: of the run.

    Returns:
        The course's part; `test_loss`, nats per token, and `test_losses`, each item's own mean with six
        digits; `accuracy` and `items_right` (0 or 1 each), of the items that have an answer.
    """
    row = course.row()
    if course.diverged:
        return row
    data = prepared.data
    losses = prepared.item_losses(data.test)
    return row | tested(data, losses, items_right(prepared))


def tested(data: Data, losses: Sequence[float], right: Sequence[int]) -> dict[str, Any]:
    """Give what a row says of the test split.

    Args:
        data: of the run.
        losses: of each item of the split, nats per token.
        right: 0 or 1 for each item that was answered.
    """
    return {
        "test_loss": token_mean(losses, data.test),
        "test_losses": [float(f"{loss:.6g}") for loss in losses],
        "accuracy": sum(right) / len(right) if right else None,
        "items_right": list(right) or None,
    }


def items_right(prepared: Prepared) -> list[int]:
    """Let the model answer the items that have an answer, and compare."""
    config, data = prepared.config, prepared.data
    asked = askable(data)
    if not asked:
        return []
    with prepared.autocast():
        given = answers(
            prepared.model,
            prepared.tokenizer,
            asked,
            max_new_tokens=room(asked, prepared.tokenizer, config.max_length),
            batch_size=AT_ONCE,
        )
    return compared(data, asked, given)


def askable(data: Data) -> list[Item]:
    """Give the items to be answered that have an answer."""
    return [item for item in data.answered if item.answer is not None]


def room(asked: Sequence[Item], tokenizer: Any, most: int) -> int:
    """Say how many tokens an answer may take: `ROOM` times the longest worked solution, at most `most`.

    A model that learned too little to come to an end would ramble on as far as it may.

    Args:
        asked: items, at least one.
        tokenizer: of the model.
        most: tokens of an example, the limit of all.
    """
    longest = max(len(tokenizer(item.response, add_special_tokens=False)["input_ids"]) for item in asked)
    return min(most, ROOM * longest)


def compared(data: Data, asked: Sequence[Item], given: Sequence[str]) -> list[int]:
    """Say of each answer whether it is right, 0 or 1."""
    return [int(data.task.right(item, text)) for item, text in zip(asked, given, strict=True)]


def summary(row: dict[str, Any]) -> str:
    """Say in one line what a row found."""
    config = row["config"]
    about = f"{row['hash']} {config['base']} {config['task']} {config['adapter']} r={config['rank']}"
    about += f" B={config['batch_size']} lr={config['lr']:g}: {row['status']}"
    if row["status"] == "failed":
        return f"{about}: {row['error']}"
    said = [f"{row['steps_done']} steps, {row['examples_seen']} examples in {row['seconds']:.1f} s"]
    if row["test_loss"] is not None:
        said.append(f"test loss {row['test_loss']:.4f} nats per token")
    if row["accuracy"] is not None:
        said.append(f"{row['accuracy']:.1%} right")
    if config["target_loss"] is not None:
        reached = row["target_examples"]
        said.append("target not reached" if reached is None else f"target after {reached:.0f} examples")
    if row["gns"]:
        joint = row["gns"]["summary"]["joint"]
        value = "not known" if joint["b_simple"] is None else f"{joint['b_simple']:.3g} examples"
        said.append(f"B_simple {value} ({joint['status']})")
    return f"{about}; {', '.join(said)}"
