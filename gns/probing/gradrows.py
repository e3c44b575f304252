"""Gradients of many batches, kept to take inner products of: whole while they fit, else as sketches.

A count sketch adds each coordinate, with a random sign, to one of s buckets. Inner products of sketches are
unbiased; one of x and y has the extra variance (‖x‖²‖y‖² + (x·y)² − 2Σ xⱼ²yⱼ²)/s. Bucket and sign are a
function of seed and parameter alone, so all batches are sketched alike.
Source: Charikar et al. 2002 (count sketch); Weinberger et al. 2009, arXiv:0902.2206, for the variance.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gns.probing.randomness import mixed

SIZE = 2**18  # numbers kept of a batch in a sketch: 1 MiB in float32
MAX_BYTES = 2**30  # of whole gradients
LEAST = 64  # buckets of a parameter
COLUMNS = 2**16  # coordinates worked off at a time, in float64


class GradientRows:
    """One row a batch, kept on the host parameter by parameter, so that parameters can be left out later.

    Args:
        max_bytes: of whole gradients; the row that would pass it turns all rows into sketches.
        size: numbers in a sketched row, over all parameters.
        seed: of the sketch.
    """

    def __init__(self, *, max_bytes: int = MAX_BYTES, size: int = SIZE, seed: int = 0):
        self.max_bytes, self.size, self.seed = max_bytes, size, seed
        self.sketched = False
        self.mass: list[float] = []
        self._rows: list[dict[str, Tensor]] = []  # a parameter without a gradient has no entry
        self._sums: dict[str, Tensor] = {}  # Σ mass · ḡ, kept whole; only once rows are sketched
        self._shapes: dict[str, tuple[int, int]] = {}  # numbers whole, numbers kept
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, gradients: Mapping[str, Tensor | None], mass: float) -> None:
        """Keep a batch's gradient.

        Args:
            gradients: parameter → gradient of any shape, or None for zero; the same names in every batch.
            mass: weight of the batch in the whole.
        """
        row = {name: _flat(g) for name, g in gradients.items() if g is not None}
        if not self._shapes:
            self._plan({name: 0 if g is None else g.numel() for name, g in gradients.items()})
        for name, g in row.items():
            self._learn(name, g.numel())
        self._bytes += sum(g.numel() * g.element_size() for g in row.values())
        if not self.sketched and self._bytes > self.max_bytes and self._shrinks():
            self._sketch_all()
        if self.sketched:
            self._add_up(row, mass)
            row = {name: self._sketch(name, g) for name, g in row.items()}
        self._rows.append(row)
        self.mass.append(mass)

    def _plan(self, sizes: Mapping[str, int]) -> None:
        self._whole = max(1, sum(sizes.values()))
        for name, size in sizes.items():
            if size:
                self._learn(name, size)

    def _learn(self, name: str, size: int) -> None:
        """Settle how many numbers are kept of a parameter: a share of `size`, no fewer than `LEAST`."""
        if name not in self._shapes:
            self._shapes[name] = size, min(size, max(LEAST, round(self.size * size / self._whole)))

    def _shrinks(self) -> bool:
        return any(kept < whole for whole, kept in self._shapes.values())

    def _sketch_all(self) -> None:
        self.sketched = True
        for i, (row, mass) in enumerate(zip(self._rows, self.mass, strict=True)):
            self._add_up(row, mass)
            self._rows[i] = {name: self._sketch(name, g) for name, g in row.items()}

    def _add_up(self, row: Mapping[str, Tensor], mass: float) -> None:
        for name, g in row.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(g)
            self._sums[name].add_(g, alpha=mass)

    def _sketch(self, name: str, g: Tensor) -> Tensor:
        whole, kept = self._shapes[name]
        if kept == whole:
            return g
        generator = torch.Generator().manual_seed(mixed(self.seed, zlib.crc32(name.encode())))
        drawn = torch.randint(2 * kept, (whole,), generator=generator)
        signed = torch.where(drawn < kept, g, -g)
        return g.new_zeros(kept).index_add_(0, drawn.remainder_(kept), signed)

    def gram(self, names: Sequence[str]) -> np.ndarray:
        """Inner products of all pairs of batches over some parameters, [K, K], summed in float64."""
        found = np.zeros((len(self), len(self)))
        for name in names:
            if name in self._shapes:
                found += self._gram(name)
        return found

    def _gram(self, name: str) -> np.ndarray:
        kept = self._shapes[name][1 if self.sketched else 0]
        rows = [row.get(name) for row in self._rows]
        found = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for start in range(0, kept, COLUMNS):
            stop = min(kept, start + COLUMNS)
            zero = torch.zeros(stop - start, dtype=torch.float64)
            part = torch.stack([zero if r is None else r[start:stop].double() for r in rows])
            found += part @ part.T
        return found.numpy()

    def sq_norm_of_sum(self, names: Sequence[str]) -> float | None:
        """‖Σ mass · ḡ‖² over some parameters, exact where rows are sketched; None where they are whole."""
        if not self.sketched:
            return None
        return sum(float(self._sums[n].double().square().sum()) for n in names if n in self._sums)

    def sketch_share(self, names: Sequence[str], gram: np.ndarray) -> float:
        """Share of the squared products of two batches' gradients that the sketch itself puts there.

        Args:
            names: parameters.
            gram: their `gram`.

        Returns:
            Σ over parameters of (mean ‖ḡ‖²)²/s, as a share of the mean of (ḡₖ·ḡₗ)², k ≠ l; 0 where nothing is
            sketched.
        """
        k = len(self)
        if not self.sketched or k < 2:
            return 0.0
        off = gram - np.diag(np.diag(gram))
        spread = float((off**2).sum()) / (k * (k - 1))
        added = 0.0
        for name in names:
            whole, kept = self._shapes.get(name, (0, 0))
            if kept < whole:
                norms = [float(row[name].double().square().sum()) for row in self._rows if name in row]
                added += (sum(norms) / k) ** 2 / kept
        return min(1.0, added / spread) if spread > 0 else 0.0

    def whole(self, name: str) -> Tensor:
        """All rows of a parameter, [K, numbers]; zero where a batch had no gradient.

        Raises:
            ValueError: the rows are sketched.
        """
        if self.sketched:
            raise ValueError(
                f"gradients of {len(self)} batches passed {self.max_bytes:,} bytes and were sketched; whole "
                "ones are needed here: pass a larger max_bytes, or fewer batches"
            )
        like = next(row[name] for row in self._rows if name in row)
        return torch.stack([row.get(name, torch.zeros_like(like)) for row in self._rows])

    def known(self, names: Sequence[str]) -> list[str]:
        """Those of the names that had a gradient in some batch."""
        return [name for name in names if any(name in row for row in self._rows)]


def _flat(g: Tensor) -> Tensor:
    """A copy on the host, [numbers], float32 or float64."""
    dtype = torch.float64 if g.dtype is torch.float64 else torch.float32
    return g.detach().to("cpu", dtype, copy=True).reshape(-1)
