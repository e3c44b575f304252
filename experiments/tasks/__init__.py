"""Tasks to fine-tune on: training rows, held-out items, and what a right answer is.

wordmath               multi-step word problems, generated: the embedded stand-in for MetaMathQA → GSM8K
stdlib                 functions and classes of packages of the standard library that no base saw
metamath-gsm8k         MetaMathQA to learn, GSM8K held out, from the hub or local files
codefeedback-humaneval CodeFeedback to learn, HumanEval held out, from the hub or local files
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from experiments.configs import RunError
from experiments.tasks.codefeedback import CodeFeedback
from experiments.tasks.items import Item, Task, encoded, with_dials
from experiments.tasks.metamath import MetaMath
from experiments.tasks.stdlib import Stdlib
from experiments.tasks.wordmath import WordMath

_KINDS: dict[str, type] = {kind.name: kind for kind in (WordMath, Stdlib, MetaMath, CodeFeedback)}
TASKS = tuple(_KINDS)

__all__ = ["TASKS", "Item", "Task", "default_dial", "encoded", "task"]


def task(name: str, dials: Mapping[str, Any] | None = None) -> Task:
    """Make a task by its name.

    Args:
        name: one of `TASKS`.
        dials: its settings; what is not given has its default.

    Raises:
        RunError: the task or a dial is unknown, or a dial is out of range.
    """
    if name not in _KINDS:
        raise RunError(f"no task {name!r}; known: {', '.join(TASKS)}")
    return with_dials(_KINDS[name], name, dials or {})


def default_dial(name: str, dial: str) -> Any:
    """Give the setting of a dial that a run does not name; None where its task has no such dial."""
    of = _KINDS.get(name)
    known = {} if of is None else {each.name: each.default for each in fields(of)}
    return known.get(dial)
