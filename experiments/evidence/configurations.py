"""The preregistered configurations by name, found in rows by the fields that make them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.analysis.cells import Row, fields_of

RANK = 16  # of the reference
SIZES = (512, 1_024, 2_048)
SIZE = 1_024  # at which configurations are compared: runs on twice as much see E grow fourfold
DIALS = {"dials.label_noise": 0.0, "dials.merged": 1, "dials.copies": 1}  # of a task that names none
REFERENCE: dict[str, Any] = DIALS | {
    "base": "math-200k",
    "task": "wordmath",
    "adapter": "lora",
    "rank": RANK,
    "optimizer": "adamw",
    "warmup": 0.0,
    "beta2": 0.999,
    "beta2_batch": None,
    "protocol": "epochs",
    "epochs": 1,
}
# name → what differs from the first, in the order of PREREGISTRATION.md
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "reference": {},
    "noise 0.2": {"dials.label_noise": 0.2},
    "noise 0.5": {"dials.label_noise": 0.5},
    "merged": {"dials.merged": 2},
    "twice": {"dials.copies": 2},
    "rank 4": {"rank": 4},
    "rank 64": {"rank": 64},
    "full": {"adapter": "full"},
    "SGD": {"optimizer": "sgd"},
    "math-1m": {"base": "math-1m"},
    "math-1m, noise 0.5": {"base": "math-1m", "dials.label_noise": 0.5},
    "merged, noise 0.2": {"dials.merged": 2, "dials.label_noise": 0.2},
    "rank 4, twice": {"rank": 4, "dials.copies": 2},
    "rank 64, noise 0.5": {"rank": 64, "dials.label_noise": 0.5},
    "full, noise 0.5": {"adapter": "full", "dials.label_noise": 0.5},
    "rank 4, noise 0.2": {"rank": 4, "dials.label_noise": 0.2},
}


def named(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Sort rows into configurations, in their order; rows of none of them are left out.

    Only runs as of `shows_examples` count: from them the configurations are read.
    """
    found: dict[str, list[Row]] = {name: [] for name in CONFIGURATIONS}
    for row in rows:
        fields = fields_of(row)
        for name in CONFIGURATIONS if shows_examples(fields) else ():
            if not differing(fields, name):
                found[name].append(row)
    return {name: part for name, part in found.items() if part}


def shows_examples(fields: Mapping[str, Any]) -> bool:
    """Whether a run is of those that show examples to a loss: a constant learning rate, on the most data.

    Runs on fewer are read as their beginnings; others at a constant rate, of a sweep over schedules, were
    evaluated too seldom for that.

    Args:
        fields: of the run, as from `fields_of`.
    """
    examples = fields["n_train"] * (DIALS | dict(fields))["dials.merged"]
    return fields["schedule"] == "constant" and examples >= SIZES[-1]


def per_row(rows: Iterable[Row]) -> int:
    """Give the examples that a row of the training data holds."""
    (merged,) = {(DIALS | fields_of(row))["dials.merged"] for row in rows}
    return merged


def differing(fields: Mapping[str, Any], name: str) -> list[str]:
    """Name the fields in which a run is not of a configuration, whatever its schedule and amount of data.

    Args:
        fields: of the run, as from `fields_of`; dials that its task does not name have their defaults.
        name: of the configuration.
    """
    return unlike(fields, REFERENCE | CONFIGURATIONS[name])


def unlike(fields: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Name the fields of a run that are not as wanted; full fine-tuning has no rank."""
    there = DIALS | dict(fields)
    skipped = {"rank"} if wanted["adapter"] == "full" else set()
    return [key for key, value in wanted.items() if key not in skipped and there.get(key) != value]
