"""Rows of sweeps whose truth is known: a bowl in (log₂ B, log₂ ε) with seed effects and noise."""

import math

import numpy as np

BATCHES = [1, 2, 4, 8, 16, 32, 64, 128]
RATES = [1e-3 * 2 ** (i / 2) for i in range(-4, 5)]


def best_rate(batch, noise=16.0, peak=2e-3):
    return 2 * peak / (math.sqrt(noise / batch) + math.sqrt(batch / noise))


def rows(
    *, best=8.0, curvature=0.02, rate_curvature=0.05, sigma=0.0, shift=0.05, seeds=3, batches=BATCHES,
    rates=RATES, rate_of=lambda batch: 1e-3, flat=0.0, n=0, diverges=math.inf, **fields,
):  # fmt: skip
    """Loss: 1 + a·(log₂ B/best)² beyond `flat` octaves + b·(log₂ ε/ε(B))² + a shift for each seed + noise."""
    random = np.random.default_rng(n)
    shifts = random.normal(0, shift, seeds)
    made = []
    for batch in batches:
        for rate in rates:
            for seed in range(seeds):
                away = max(0.0, abs(math.log2(batch / best)) - flat)
                loss = (
                    1
                    + curvature * away**2
                    + rate_curvature * math.log2(rate / rate_of(batch)) ** 2
                    + shifts[seed]
                )
                common, own, other = random.normal(0, sigma or 1e-12, 3) / math.sqrt(2)
                config = {
                    "batch_size": batch,
                    "lr": rate,
                    "seed": seed,
                    "data_seed": 0,
                    "dials": {},
                    "rank": 8,
                }
                row = {"hash": str(len(made)), "status": "done", "config": config | fields}
                row |= {"validation": [{"loss": loss + common + own}], "test_loss": loss + common + other}
                if rate > diverges:
                    row |= {"status": "diverged", "test_loss": None, "validation": [{"loss": None}]}
                made.append(row)
    return made
