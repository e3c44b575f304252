"""What `gns advise` says of this study: measured batch sizes over noise scales, as data."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from experiments.bases import paths
from experiments.evidence.configurations import CONFIGURATIONS
from experiments.evidence.judged import Judged
from experiments.evidence.measured import PRIMARY
from experiments.evidence.practice import DELTA
from experiments.evidence.readout import Readout
from gns.advising.calibration import Calibration

CRITICAL = "the batch size at which the examples to one loss double"
HARMLESS = (
    f"the largest batch whose loss after one epoch, cosine schedule, was within {DELTA} nat of the best"
)
SCHEDULE = "cosine"  # of what users train with
LEAST = 8  # configurations: a bootstrap of fewer gives ends that it does not keep


def calibrations(found: Readout) -> list[Calibration]:
    """Give the constants that have an interval."""
    made = []
    if (critical := found.judged.get(PRIMARY)) is not None:
        bases = {each.cell.fields["base"] for each in found.compared.values()}
        made += _calibration(CRITICAL, critical, bases, len(CONFIGURATIONS))
    if SCHEDULE in found.harmless:
        _, curves = found.priced[SCHEDULE]
        bases = {each.cell.fields["base"] for each in curves}
        made += _calibration(HARMLESS, found.harmless[SCHEDULE].scale, bases, None)
    return made


def write(found: Readout, path: Path) -> Path:
    """Write the constants where the package reads them."""
    text = json.dumps([asdict(each) for each in calibrations(found)], indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _calibration(says: str, of: Judged, bases: set[str], planned: int | None) -> list[Calibration]:
    """Put a judged predictor into the package's form; nothing of few, or without an interval."""
    ends = (of.constant.value, of.constant.low, of.constant.high)
    if of.pairs < LEAST or not all(math.isfinite(end) and end > 0 for end in ends):
        return []
    sizes = [paths.parameters(base) for base in bases]
    share = (of.share.value, of.share.low, of.share.high)
    return [
        Calibration(
            says,
            *(float(f"{x:.3g}") for x in (*ends, *share)),
            of.pairs,
            planned,
            (min(sizes), max(sizes)),
            of.verdict,
        )
    ]
