"""Rows with times chosen by hand, and the tiny setting."""

from experiments.overhead.settings import Setting

ABOUT = {
    "device": "a CPU",
    "python": "3.11",
    "versions": {"torch": "2", "opacus": None},
    "commit": "abc",
    "threads": 2,
}


def setting(**changes):
    return Setting(**{"name": "tiny", "shape": "tiny", "rank": 4, "batch": 3, "tokens": 16, **changes})


def row(arm, ratios, name="tiny", **more):
    """A timed row of an arm whose steps take these ratios, × a second."""
    times = {"untouched_s": [1.0] * len(ratios), "arm_s": list(ratios), "status": "ok"}
    return {"setting": setting(name=name).row(), "arm": arm, "machine": ABOUT, **times, **more}
