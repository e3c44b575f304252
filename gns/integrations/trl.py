"""What a trainer calls an example, read off the class of its arguments; imports nothing of TRL.

`SFTTrainer`: each row, or each packed document, weighing in by its tokens, which the model's call shows.
`DPOTrainer` and `RewardTrainer`: each preference pair, two rows of one call, all pairs alike; the call shows
neither. Other TRL trainers couple rows in ways of their own, and a warning says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gns.monitor import GNSMonitor
from gns.segments import stacked

PAIRS = ("DPOConfig", "RewardConfig")
ROWS = ("SFTConfig",)
LOSS_OUTSIDE = (
    "label smoothing: the loss is made outside the model, so that the examples' weights in it are not seen "
    'and taken as equal (weights="equal" ends this message)'
)
UNKNOWN = (
    "{name}: GNSCallback does not know what this trainer calls an example. Rows of the model's call are "
    "counted; segments= and weights= say otherwise, or that it is so"
)
UNPAIRED = (
    "{name}: two rows of each call are one preference pair, but the GNSMonitor that was given counts rows. "
    'Build it with segments=gns.segments.stacked(2), weights="equal", or let GNSCallback build it'
)


def config_name(args: Any) -> str | None:
    """Name the class of TRL that a trainer's arguments are of, or None where they are of no such class."""
    own = [kind for kind in type(args).__mro__ if kind.__module__.split(".")[0] == "trl"]
    return own[0].__name__ if own else None


def options_for(args: Any) -> dict[str, Any]:
    """Give arguments of a `GNSMonitor` that this trainer needs and its model's calls do not show."""
    return {"segments": stacked(2), "weights": "equal"} if config_name(args) in PAIRS else {}


def doubts(args: Any, monitor: GNSMonitor, options: Mapping[str, Any]) -> list[str]:
    """Say what may be wrong about the examples or their weights.

    Args:
        args: of the trainer.
        monitor: the monitor in use.
        options: what the user said of it.
    """
    name, out = config_name(args), []
    # the Trainer's own smoothing shows in the model's call, and the monitor itself says it
    if name is not None and getattr(args, "label_smoothing_factor", 0) and monitor.weights == "auto":
        out.append(LOSS_OUTSIDE)
    if name in PAIRS and monitor.segments is None:
        out.append(UNPAIRED.format(name=name))
    if name not in (*PAIRS, *ROWS, None) and not {"segments", "weights"} & options.keys():
        out.append(UNKNOWN.format(name=name))
    return out
