"""The simulation behind the live set, small: the real code decides as it does, and its claim holds."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import live as experiment
from experiments.live import Config
from gns.statistics.live import live, looks
from gns.sums import StepSums

SMALL = Config("1/j", 20, steps=200, runs=400, seed=11)


def records(x: np.ndarray, y: np.ndarray, n: int = 16) -> list[StepSums]:
    return [
        StepSums(i, n, b + a, b + a / n) for i, (a, b) in enumerate(zip(x.tolist(), y.tolist(), strict=True))
    ]


@pytest.mark.parametrize(("spectrum", "b"), [("1/j", 20), ("j^-2", 200)])
def test_the_simulation_decides_as_the_package_does(spectrum, b):
    config = replace(SMALL, spectrum=spectrum, b_simple=b, steps=50, runs=40)
    t = experiment.critical(config)["live"]
    x, y = next(experiment.simulate(config))
    low, high = experiment.statistics(x - b * y)
    infinity = experiment.statistics(-y)[1]
    for r in range(config.runs):
        for k in looks(50):
            e = live(records(x[r, :k], y[r, :k]))
            if e.variance != "between steps":
                continue
            i = k - 1
            inside = not (low[r, i] > t[i] or high[r, i] < -t[i])
            assert (e.low <= b <= e.high) or not inside
            assert (e.status == "measured") is bool(infinity[r, i] < -t[i])


@pytest.mark.parametrize(("spectrum", "b"), [("1/j", 20), ("j^-2", 20), ("j^-2", 2000)])
def test_a_wrong_set_is_ever_shown_in_fewer_than_one_run_in_twenty(spectrum, b):
    """400 runs of 200 steps: at 5 % more than 38 have a chance below 1e-4. The control passes 60."""
    assert stats.binom.sf(38, 400, 0.05) < 1e-4
    row = experiment.run(replace(SMALL, spectrum=spectrum, b_simple=b))
    assert row["ever_wrong_live"] * 400 <= 38
    assert row["ever_wrong_measured_live"] <= row["ever_wrong_live"]
    assert row["ever_wrong_single"] * 400 > 60, "a set for one look, shown at all of them"


def test_the_price_in_width():
    assert experiment.mean_width("live") == pytest.approx(1.59, abs=0.01)
    assert experiment.mean_width("sequence") == pytest.approx(1.71, abs=0.01)


def test_the_committed_rows_are_what_the_docstrings_say():
    with (experiment.RESULTS / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["spectrum"], row["b_simple"]) for row in rows} == {
        (s, b) for s in experiment.SPECTRA for b in ("20", "200", "2000")
    }
    assert all(int(row["runs"]) >= 2000 and row["steps"] == "1000" for row in rows)
    wrong = [float(row["ever_wrong_live"]) for row in rows]
    assert 0.026 < min(wrong) and max(wrong) < 0.042
    assert (experiment.RESULTS / "live.png").read_bytes().startswith(b"\x89PNG")


def test_rows_and_figure_are_written(tmp_path: Path):
    rows = [experiment.run(replace(SMALL, runs=20, steps=60))]
    experiment.write(rows, tmp_path)
    with (tmp_path / "rows.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["seed"] == "11" and float(row["ever_wrong_live"]) == rows[0]["ever_wrong_live"]
    assert set(json.loads((tmp_path / "widths.json").read_text())) == {"live", "sequence"}
    assert (tmp_path / "live.png").stat().st_size > 10_000


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule is 'peek'; known: 'single', 'live', 'sequence'"):
        experiment.normal_bounds("peek", 30, 0.95)
