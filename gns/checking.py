"""What an argument must be: refused with its name, what was seen and what is needed."""

from __future__ import annotations

import numbers
from collections.abc import Collection
from typing import Any


def check_whole(
    name: str, value: Any, least: int, unit: str = "", error: type[Exception] = ValueError, more: str = ""
) -> None:
    """Let pass a whole number, `least` or more, NumPy's too.

    Args:
        name: of the argument.
        value: of it.
        least: the smallest that will do.
        unit: what is counted.
        error: to be raised.
        more: what else would do.

    Raises:
        Exception: `error`, where it is none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        of = f" of {unit}" if unit else ""
        raise error(f"{name} is {value!r}; a whole number{of}, {least} or more, is needed{more}")


def check_choice(name: str, value: Any, known: Collection[str], error: type[Exception] = ValueError) -> None:
    """Let pass one of the known words.

    Args:
        name: of the argument.
        value: of it.
        known: what it may be.
        error: to be raised.

    Raises:
        Exception: `error`, where it is none of them.
    """
    if value not in known:
        raise error(f"{name} is {value!r}; known: {', '.join(map(repr, known))}")
