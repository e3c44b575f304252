"""The examples with the largest gradients, where faults of the data show. Opt-in: it may show the data."""

from __future__ import annotations

import heapq
import html
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

SHOWN = 120  # characters of a text

Describe = Callable[[Any, int], str]


@dataclass(frozen=True)
class LargeExample:
    """An example with a large gradient.

    Args:
        index: its place in the stream of examples, from 0.
        batch: the batch it was in, from 0.
        sq_norm: ‖gᵢ‖² over the measured parameters, in (loss / parameter)².
        share: of Σ ‖gᵢ‖² over all examples.
        text: what it says, without control characters and cut short; None if nothing can show it.
    """

    index: int
    batch: int
    sq_norm: float
    share: float
    text: str | None = None

    def __str__(self) -> str:
        said = "" if self.text is None else f": {self.text}"
        return f"example {self.index} (batch {self.batch}): {100 * self.share:.2g} % of Σ‖g‖²{said}"

    @property
    def html(self) -> str:
        """The same, escaped for a page."""
        return html.escape(str(self))


def plain(text: str) -> str:
    r"""Make anybody's text safe for one line of a terminal: no control or formatting characters, cut short.

    >>> plain("a\x1b[31m red\n\tword")
    'a[31m red word'
    """
    spaced = "".join(c if c.isprintable() else " " if c.isspace() else "" for c in text)
    line = " ".join(spaced.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


def describer(given: Any) -> Any:
    """Make a function (batch, row) → text of a tokenizer or of such a function itself.

    Raises:
        TypeError: it is neither.
    """
    if given is None:
        return None
    decode = getattr(given, "decode", None)
    if decode is None and not callable(given):
        raise TypeError(
            f"describe is a {type(given).__name__}; a tokenizer, or a function of (batch, row), is needed"
        )
    if decode is None:
        return given

    def decoded(batch: Any, row: int) -> str:
        """Give the text of a row, without its padding."""
        from torch import Tensor  # reading a report back needs none

        ids, mask = batch["input_ids"][row], batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            ids = ids[mask[row].bool()]
        return decode(ids)

    return decoded


class Largest:
    """Keeps the largest examples of a stream.

    Args:
        k: how many.
        describe: a tokenizer, or (batch, row) → text; None: no text.
    """

    def __init__(self, k: int, describe: Any = None):
        self.k, self.describe = k, describer(describe)
        self._kept: list[tuple[float, int, LargeExample]] = []

    def add(self, batch: Any, number: int, start: int, sq_norms: np.ndarray, mass: float) -> None:
        """Look at a batch.

        Args:
            batch: what the model was called with; None where its examples cannot be shown.
            number: of the batch.
            start: place of its first example in the stream.
            sq_norms: [n], ‖cᵢ‖² of its examples.
            mass: weight of the batch in the whole.
        """
        for row in np.argsort(-sq_norms, kind="stable")[: self.k].tolist():
            size = mass**2 * float(sq_norms[row])
            if len(self._kept) == self.k and size <= self._kept[0][0]:
                return
            found = LargeExample(start + row, number, size, 0.0, self._text(batch, row))
            heapq.heappush(self._kept, (size, -found.index, found))
            if len(self._kept) > self.k:
                heapq.heappop(self._kept)

    def _text(self, batch: Any, row: int) -> str | None:
        if self.describe is None or batch is None:
            return None
        try:
            return plain(str(self.describe(batch, row)))
        except Exception as error:  # of the user's: no reason to lose what was measured
            return plain(f"(describe raised {type(error).__name__}: {error})")

    def found(self, scale: float, total: float) -> tuple[LargeExample, ...]:
        """Give them, largest first.

        Args:
            scale: turns mass² ‖cᵢ‖² into ‖gᵢ‖².
            total: Σ mass² ‖cᵢ‖² over all examples.
        """
        ordered = sorted(self._kept, key=lambda kept: (-kept[0], -kept[1]))
        return tuple(
            replace(e, sq_norm=size * scale, share=size / total if total > 0 else 0.0)
            for size, _, e in ordered
        )
