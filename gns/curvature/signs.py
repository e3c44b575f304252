"""Which probe an example belongs to, and its random sign there: the weights of the sums that taps collect.

Each example belongs to one probe, so that probes are independent replicates: the spread over them is that of
the data and of the signs together, and no product is spent on learning it. All signs on all examples would be
no better: their share, 2 tr((HΣ)²)/S, would come on top of the data's own.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gns.curvature.errors import CurvatureError
from gns.examples import RowMap


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
    """

    def __init__(self, probes: int, batches: int, seed: int, signs: np.ndarray | None = None):
        self.probes, self.by_batch, self.signs = probes, batches >= probes, signs
        self._draw = np.random.default_rng(seed)
        self.batch = 0
        self._seen = 0
        self.tokens: list[int | None] = []
        self.masses: list[float] = []
        self.by_tokens: set[bool] = set()
        self.members: list[np.ndarray] = []  # of each call: the probe of each example
        self.signed: list[np.ndarray] = []  # of each call: [S, n], εᵢ
        self.shares: list[np.ndarray] = []  # of each call: mₖaᵢ

    def __call__(self, rows: RowMap) -> Tensor:
        """Give the weights of a call."""
        if len(self.masses) > self.batch:
            raise CurvatureError(
                f"the model was called twice for batch {self.batch}; a loss from one call is needed"
            )
        n, at = rows.n, self._seen + np.arange(rows.n)
        a = np.full(n, 1 / max(n, 1)) if rows.weights is None else rows.weights.double().cpu().numpy()
        total = a.sum()
        a = a / total if total > 0 else a
        tokens = None if rows.n_tokens is None else float(rows.n_tokens)
        mass = float(n) if rows.weights is None or tokens is None else tokens
        probe = np.full(n, self.batch % self.probes) if self.by_batch else at % self.probes
        member = (np.arange(self.probes)[:, None] == probe).astype(np.float64)
        if self.signs is None:
            signs = member * self._draw.choice([-1.0, 1.0], n)
        else:
            signs = np.asarray(self.signs, dtype=np.float64)[:, at]
        self._seen += n
        self.tokens.append(None if tokens is None else round(tokens))
        self.masses.append(mass)
        self.by_tokens.add(rows.weights is not None)
        self.members.append(probe)
        self.signed.append(signs)
        self.shares.append(mass * a)
        return torch.from_numpy(np.concatenate([mass * signs, mass * member, mass**2 * a[None]]))

    def next_batch(self) -> None:
        """End a batch.

        Raises:
            CurvatureError: the model was not called in it.
        """
        self.batch += 1
        if len(self.masses) < self.batch:
            raise CurvatureError(
                f"batch {self.batch - 1}: the model's own call was not seen, or has no batch dimension; let "
                "the loss call the model that is given"
            )

    @property
    def n(self) -> int:
        """Examples seen, N."""
        return self._seen

    @property
    def n_tokens(self) -> int | None:
        """Labelled tokens seen, or None where unknown."""
        known = [t for t in self.tokens if t is not None]
        return sum(known) if len(known) == len(self.tokens) else None

    def concluded(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Give αₛ, the probes' shares of the weight; eₛ = Σ εᵢãᵢ; and Aₛ = Σ ãᵢ² over each probe's examples.

        All are [S], with Σãᵢ = 1 over all examples.

        Raises:
            CurvatureError: there are too few examples, or batches of two kinds.
        """
        if self.n < 2:
            raise CurvatureError(
                f"{self.n} example(s) in the batches for g; at least 2 are needed to see a spread"
            )
        if self.n < self.probes and self.signs is None:
            raise CurvatureError(
                f"{self.n} examples in the batches for g, {self.probes} probes; each probe needs an example "
                f"of its own: give more examples, or probes={self.n}"
            )
        if len(self.by_tokens) > 1:
            raise CurvatureError(
                'some batches have token labels and others have none; pass weights="equal", or labels in all'
            )
        a = np.concatenate(self.shares)
        a = a / a.sum()
        if not math.isfinite(a.sum()) or not (a**2).sum() < 1:
            raise CurvatureError(
                "one example has all the weight in the loss; at least 2 with a label are needed"
            )
        member = np.concatenate(self.members)
        share, sq_share = (np.bincount(member, v, self.probes) for v in (a, a**2))
        return share, np.concatenate(self.signed, 1) @ a, sq_share

    def by_probe(self, each: list[np.ndarray]) -> np.ndarray:
        """Add up values of the examples of each batch over the probes, times mₖ²/(Σm)², [S]."""
        masses = np.array(self.masses) / sum(self.masses)
        out = np.zeros(self.probes)
        for values, probe, m in zip(each, self.members, masses, strict=True):
            out += np.bincount(probe, m**2 * values, self.probes)
        return out
