"""Rows of sweeps whose critical batch size and noise scale are known."""

import math

import numpy as np

from experiments.configs import RunConfig
from experiments.evidence.measured import steps_to, target_after
from gns.curvature.readingsfile import record_of
from tests.gns.curvature.test_course import reading

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
N = 2_048
COLUMNS = [
    "step",
    "n_examples",
    "n_tokens",
    "sum_sq_weights",
    "learning_rate",
    "m",
    "q",
    "m_A",
    "q_A",
    "m_B",
    "q_B",
]


def loss_after(examples, batch, b_crit):
    """A loss that depends on the progress alone, which is examples / (1 + B/B_crit)."""
    return 5 - 0.4 * math.log(1 + examples / (1 + batch / b_crit))


def gns(batch, b_simple, until=N // 4):
    """Sums of steps at exactly this noise scale in factor B, and at three times it in factor A.

    After row `until` it is a hundred times as large: what must not be read.
    """
    steps = []
    for k in range(N // batch):
        sums = []
        for factor in (3.0, 1.0):  # A, B
            trace = b_simple * factor * (1 if k * batch < until else 100)
            sums += [1 + trace, 1 + trace / batch]
        joint = [sums[0] + sums[2], sums[1] + sums[3]]
        steps.append([k, batch, 15 * batch, 1 / batch, 1e-3, *joint, *sums])
    return {"metric": "euclidean", "columns": COLUMNS, "steps": steps, "progress_weighted": {}}


def rows(b_crit=8.0, b_simple=8.0, *, seeds=2, noise=0.0, n=0, **fields):
    """All runs of one configuration: 32 evaluations each, two learning rates, the second one useless."""
    random = np.random.default_rng(n)
    made = []
    for batch in BATCHES:
        for seed in range(seeds):
            for lr in (1e-3, 2e-3):
                config = RunConfig(
                    "math-200k", "wordmath", n_train=N, batch_size=batch, lr=lr, seed=seed,
                    schedule="constant", evals=32, gns_every=int(batch == 4), **fields,
                )  # fmt: skip
                at = sorted({math.ceil(N / batch * k / 32) for k in range(33)})
                slow = 1.0 if lr == 1e-3 else 3.0
                shift = noise * random.standard_normal()
                losses = [loss_after(k * batch / slow * math.exp(shift), batch, b_crit) for k in at]
                made.append(
                    {
                        "hash": config.hash,
                        "status": "done",
                        "commit": "abc",
                        "config": config.to_dict(),
                        "examples_seen": N,
                        "steps_done": at[-1],
                        "validation": [
                            {"step": k, "examples": k * batch, "loss": loss}
                            for k, loss in zip(at, losses, strict=True)
                        ],
                        "test_loss": losses[-1],
                        "gns": gns(batch, b_simple) if batch == 4 else None,
                    }
                )
    return made


def curvature(made, b_noise, spread=0.05, target=None):
    """Rows of readings of B_noise around a number, of the runs at the reference batch up to a loss."""
    target = target_after(made, 512) if target is None else target
    found = []
    for row in (row for row in made if row["config"]["batch_size"] == 4):
        errors = spread * np.random.default_rng(row["config"]["seed"]).standard_normal(8)
        readings = [record_of(reading(8 * k, b_noise * (1 + e), 1.0)) for k, e in enumerate(errors)]
        about = {"of": row["hash"], "config": row["config"], "reached": steps_to(row, target)}
        found.append(about | {"readings": readings})
    return found
