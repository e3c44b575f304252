"""Which probe an example belongs to, and its random sign there: the weights of the sums that taps collect.

Each example belongs to one probe, so that probes are independent replicates: the spread over them is that of
the data and of the signs together, and no product is spent on learning it. All signs on all examples would be
no better: their share, 2 tr((HΣ)²)/S, would come on top of the data's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gns.curvature.errors import CurvatureError
from gns.examples import RowMap


@dataclass(frozen=True)
class Weighed:
    """A batch as it was weighed, mₖ being its weight in the whole, aᵢ that of an example in it, Σaᵢ = 1.

    Args:
        number: in the order of all batches.
        n: examples.
        tokens: labelled tokens, or None where unknown.
        mass: mₖ.
        by_tokens: whether examples weigh by their tokens.
        share: [S], Σ mₖaᵢ over each probe's examples.
        sign_share: [S], Σ εᵢmₖaᵢ.
        sq_share: [S], Σ (mₖaᵢ)² over each probe's examples.
    """

    number: int
    n: int
    tokens: int | None
    mass: float
    by_tokens: bool
    share: np.ndarray
    sign_share: np.ndarray
    sq_share: np.ndarray


class Weights:
    """Gives each call of the model the weights [K, n] of its examples, K = 2S + 1.

    Rows 0 … S − 1: mₖ εᵢ for the examples of that probe; rows S … 2S − 1: mₖ for the same examples; row 2S:
    mₖ² aᵢ; with mₖ the weight of the batch in the whole (its examples, or tokens), aᵢ that of the example in
    its batch, Σaᵢ = 1.

    Args:
        probes: S.
        batches: how many there will be; with at least S of them each belongs to one probe as a whole.
        seed: of the signs.
        signs: [S, N], the signs themselves, for tests that go through all of them; they may overlap.
        numbers: where this process's batches stand among all; None: it has them all.
        sizes: (k, n) → number → examples of the k-th batch of every process, n being those of this one's.
    """

    def __init__(
        self,
        probes: int,
        batches: int,
        seed: int,
        signs: np.ndarray | None = None,
        *,
        numbers: Sequence[int] | None = None,
        sizes: Callable[[int, int], Mapping[int, int]] | None = None,
    ):
        self.probes, self.by_batch, self.signs = probes, batches >= probes, signs
        self._draw = np.random.default_rng(seed)
        self._numbers = range(batches) if numbers is None else numbers
        self._sizes = sizes or (lambda k, n: {k: n})
        self._seen = 0  # examples of all processes
        self.batch = 0
        self.done: list[Weighed] = []
        self.members: list[np.ndarray] = []  # of each batch: the probe of each example

    def __call__(self, rows: RowMap) -> Tensor:
        """Give the weights of a call."""
        if len(self.done) > self.batch:
            raise CurvatureError(
                f"the model was called twice for batch {self.batch}; a loss from one call is needed"
            )
        n, number = rows.n, self._numbers[self.batch]
        a = np.full(n, 1 / max(n, 1)) if rows.weights is None else rows.weights.double().cpu().numpy()
        total = a.sum()
        a = a / total if total > 0 else a
        tokens = None if rows.n_tokens is None else float(rows.n_tokens)
        mass = float(n) if rows.weights is None or tokens is None else tokens
        at, drawn = self._round(number, n)
        probe = np.full(n, number % self.probes) if self.by_batch else at % self.probes
        member = (np.arange(self.probes)[:, None] == probe).astype(np.float64)
        signs = member * drawn if self.signs is None else np.asarray(self.signs, dtype=np.float64)[:, at]
        share = mass * a
        self.members.append(probe)
        self.done.append(
            Weighed(
                number=number,
                n=n,
                tokens=None if tokens is None else round(tokens),
                mass=mass,
                by_tokens=rows.weights is not None,
                share=member @ share,
                sign_share=signs @ share,
                sq_share=member @ share**2,
            )
        )
        return torch.from_numpy(np.concatenate([mass * signs, mass * member, mass**2 * a[None]]))

    def _round(self, number: int | None, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Go past the next batch of every process; give the examples of our own, [n]: places and signs."""
        at, mine = np.zeros(0, dtype=int), np.zeros(0)
        for other, size in self._sizes(self.batch, n).items():
            drawn = np.zeros(0) if self.signs is not None else self._draw.choice([-1.0, 1.0], size)
            if other == number:
                at, mine = self._seen + np.arange(size), drawn
            self._seen += size
        return at, mine

    def sit_out(self) -> None:
        """Go past a batch that only other processes have."""
        self._round(None, 0)
        self.batch += 1

    def next_batch(self) -> None:
        """End a batch.

        Raises:
            CurvatureError: the model was not called in it.
        """
        self.batch += 1
        if len(self.done) < self.batch:
            raise CurvatureError(
                f"batch {self.batch - 1}: the model's own call was not seen, or has no batch dimension; let "
                "the loss call the model that is given"
            )

    def by_probe(self, values: np.ndarray) -> np.ndarray:
        """Add up values of the examples of the last batch over the probes, times mₖ², [S]."""
        return self.done[-1].mass ** 2 * np.bincount(self.members[-1], values, self.probes)


def shares(batches: Sequence[Weighed], *, given: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give αₛ, the probes' shares of the weight; eₛ = Σ εᵢãᵢ; and Aₛ = Σ ãᵢ² over each probe's examples.

    All are [S], with Σãᵢ = 1 over all examples.

    Args:
        batches: all.
        given: whether the signs were, so that probes may be without examples.

    Raises:
        CurvatureError: there are too few examples, or batches of two kinds.
    """
    n, probes = sum(b.n for b in batches), len(batches[0].share)
    if n < 2:
        raise CurvatureError(f"{n} example(s) in the batches for g; at least 2 are needed to see a spread")
    if n < probes and not given:
        raise CurvatureError(
            f"{n} examples in the batches for g, {probes} probes; each probe needs an example of its own: "
            f"give more examples, or probes={n}"
        )
    if len({b.by_tokens for b in batches}) > 1:
        raise CurvatureError(
            'some batches have token labels and others have none; pass weights="equal", or labels in all'
        )
    share, sign_share, sq_share = (
        np.sum([getattr(b, name) for b in batches], axis=0) for name in ("share", "sign_share", "sq_share")
    )
    total = float(share.sum())
    if not total > 0 or not math.isfinite(total) or not sq_share.sum() < total**2:
        raise CurvatureError("one example has all the weight in the loss; at least 2 with a label are needed")
    return share / total, sign_share / total, sq_share / total**2


def n_tokens(batches: Sequence[Weighed]) -> int | None:
    """Labelled tokens of all batches, or None where unknown."""
    known = [b.tokens for b in batches if b.tokens is not None]
    return sum(known) if len(known) == len(batches) else None
