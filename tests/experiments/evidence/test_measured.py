"""Critical batch sizes and noise scales of runs that were made with known ones."""

import math
from dataclasses import replace

import numpy as np
import pytest

from experiments.analysis.resampling import interval
from experiments.configs import RunConfig
from experiments.evidence.measured import measured, noise_scale, reference_runs, target_after
from experiments.evidence.page import unread
from tests.experiments.evidence.synthetic import N, loss_after, rows


def test_the_target_is_what_the_smallest_batch_reaches_at_its_best_rate():
    assert target_after(rows(8.0), 512) == pytest.approx(loss_after(512, 1, 8.0), rel=1e-12)
    with pytest.raises(ValueError, match="evaluated near 100"):
        target_after(rows(8.0), 100)  # the nearest evaluation is at 64


@pytest.mark.parametrize("n", [512, 1_024, 2_048])
def test_the_critical_batch_of_a_prefix_is_that_of_the_run(n):
    """E(B) = E(1)·(1 + B/8)/(1 + 1/8) doubles at 8·(2·(1 + 1/8) − 1) = 10, whatever N."""
    found = measured(rows(8.0, noise=0.01), n)
    assert found.n == n and found.target == pytest.approx(loss_after(n // 2, 1, 8.0), abs=0.02)
    if n < N:  # at n = N the doubling lies at the end of the runs
        assert found.doubled.value == pytest.approx(10, rel=0.08)  # interpolated between two batch sizes
        assert found.doubled.low < found.doubled.value < found.doubled.high
        assert found.fifth.value == pytest.approx(8 * (1.2 * 1.125 - 1), rel=0.4)
    assert set(found.examples.rates) == {1e-3}


def test_the_noise_scale_is_read_up_to_the_target_only():
    made = rows(8.0, b_simple=6.0)
    early = measured(made, 512)  # batch 4 is there after 256·(1 + 4/8)/(1 + 1/8) = 341 rows
    assert early.noise["B"].value == pytest.approx(6.0, rel=1e-6)
    assert early.noise["A"].value == pytest.approx(18.0, rel=1e-6)
    assert early.noise["joint"].value == pytest.approx(12.0, rel=1e-6)
    assert early.noise["plug-in"].value == pytest.approx(6 / (1 + 6 / 4), rel=1e-6)
    late = measured(made, 2_048)
    assert late.noise["B"].value > 20  # after row 512 the noise is a hundredfold


def test_a_configuration_without_readings_has_no_noise_scale():
    made = [row | {"gns": None} for row in rows(8.0)]
    assert measured(made, 1_024).noise == {}


def test_readings_at_another_rate_than_the_best_are_named():
    made = [row | {"gns": row["gns"] if row["config"]["lr"] == 2e-3 else None} for row in rows(8.0)]
    assert "learning rate 0.002, 2 run(s); the best was 0.001" in measured(made, 1_024).noise["B"].note


def test_full_fine_tuning_is_read_jointly_and_a_lost_factor_is_not_replaced():
    made = rows(8.0, b_simple=6.0)
    joint = [row | {"gns": _without_factors(row["gns"])} for row in made]
    assert measured(joint, 512).noise["B"].value == pytest.approx(12.0, rel=1e-6)
    lost = [row | {"gns": _lost(row["gns"])} for row in made]
    found = measured(lost, 512)
    assert math.isnan(found.noise["B"].value) and found.noise["B"].high == math.inf
    assert math.isfinite(found.noise["A"].value)


def _without_factors(gns):
    return gns and gns | {"columns": gns["columns"][:7], "steps": [s[:7] for s in gns["steps"]]}


def _lost(gns):
    """Factor B without any gradient."""
    return gns and gns | {"steps": [[*s[:9], 1.0, 0.0] for s in gns["steps"]]}


def test_draws_of_a_noise_scale_are_as_wide_as_its_set():
    made = rows(8.0, b_simple=6.0)
    random = np.random.default_rng(0)
    for row in made:
        for step in row["gns"]["steps"] if row["gns"] else ():
            step[-1] *= math.exp(0.3 * random.standard_normal())
    found = measured(made, 512)
    scale = noise_scale(made, found.examples)
    low, high = interval(scale.draws)
    assert scale.high / scale.low > 1.02
    assert math.log(high / low) == pytest.approx(math.log(scale.high / scale.low), rel=0.1)


def test_only_runs_at_a_constant_rate_have_prefixes():
    made = rows(8.0)
    for row in made:
        row["config"] = replace(RunConfig.of(row["config"]), schedule="cosine").to_dict()
    with pytest.raises(ValueError, match="schedule cosine: only a constant rate"):
        measured(made, 1_024)
    with pytest.raises(ValueError, match="n is 4096; the runs have 2048 rows"):
        measured(rows(8.0), 4_096)
    with pytest.raises(ValueError, match="rows of one configuration are needed; seen 2"):
        measured(rows(8.0) + rows(8.0, rank=4), 1_024)


def in_adams_metric(made, **changed):
    """The same runs at the reference batch, read in Adam's metric."""
    found = []
    for row in made:
        if row["gns"] is not None:
            config = RunConfig.of(row["config"] | {"gns_metric": "adam"} | changed)
            read = row["gns"] | {"metric": "adam"}
            found.append(row | {"hash": config.hash, "config": config.to_dict(), "gns": read})
    return found


def test_adams_metric_counts_in_the_runs_of_the_first_noise_scale_alone():
    plain = rows(8.0, seeds=3)
    assert "adam" in measured(plain + in_adams_metric(plain), 1_024).noise
    few = [row for row in in_adams_metric(plain) if row["config"]["seed"] < 2]
    best = {row["config"]["lr"] for row in reference_runs(plain, measured(plain, 1_024).examples)}
    other = [row for row in in_adams_metric(plain) if row["config"]["lr"] not in best]
    for lacking in (few, other):
        found = measured(plain + lacking, 1_024)
        assert "adam" not in found.noise and "B" in found.noise
        (said, _) = unread({"reference": found})
        assert said.startswith("No reading in Adam's metric") and said.count("reference") == 1
    (of_b_noise,) = unread({"SGD": measured(rows(8.0, optimizer="sgd"), 1_024)})  # it has no metric of Adam's
    assert of_b_noise.startswith("No reading of B_noise")
