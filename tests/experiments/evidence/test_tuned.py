"""Whole runs of known curves: where the best batch lies, how it grows, and which curve is which."""

import math

import pytest

from experiments.evidence.predictions import predictions, zero_verdict
from experiments.evidence.tuned import above_best, growth_within, octaves_between, pick, tuned
from tests.experiments.analysis import synthetic

RECIPE = {
    "base": "math-200k", "task": "wordmath", "n_train": 1_024, "adapter": "lora", "rank": 16,
    "optimizer": "adamw", "schedule": "cosine", "warmup": 0.0, "beta2": 0.999, "beta2_batch": None,
    "protocol": "epochs", "epochs": 1,
}  # fmt: skip


def rows(best=8.0, n=0, sigma=0.0, noise=None, dials=None, **fields):
    """A parabola in octaves from the best batch, at known learning rates."""
    shape = {"curvature": 0.01, "shift": 0.02, "seeds": 2, "rates": synthetic.RATES[2:7]}
    made = synthetic.rows(best=best, n=n, sigma=sigma, **shape, **(RECIPE | fields))
    for row in made:
        row["hash"] = f"{sorted(fields.items())}{dials}{row['hash']}"
        row["config"]["dials"], row["commit"] = dials or {}, "abc"
        if noise is not None and row["config"]["batch_size"] == 4:
            reading = {"b_simple": noise, "low": noise / 1.2, "high": noise * 1.2, "status": "measured"}
            row["gns"] = {"metric": "euclidean", "progress_weighted": {"joint": reading, "B": reading}}
    return made


def test_a_curve_is_found_by_what_differs_from_the_reference():
    made = tuned(rows() + rows(2.0, rank=4) + rows(32.0, dials={"label_noise": 0.5}))
    assert len(made) == 3
    assert pick(made).cell.fields["rank"] == 16
    assert pick(made, rank=4).cell.fields["rank"] == 4
    assert pick(made, dials_label_noise=0.5).cell.fields["dials.label_noise"] == 0.5
    with pytest.raises(KeyError, match=r"0 curves of \{'rank': 64\}"):
        pick(made, rank=64)
    with pytest.raises(KeyError, match="2 curves of the reference"):
        pick(made + tuned(rows(n_eval=96)))


def test_what_is_no_whole_run_or_no_curve_is_left_out():
    fixed = rows(protocol="steps", epochs=None)
    few = [row for row in rows(rank=8) if row["config"]["batch_size"] <= 4]
    lost = [row | {"status": "diverged", "test_loss": None} for row in rows(rank=2)]
    assert tuned(fixed + few + lost) == []


def test_growth_is_that_of_the_best_batch():
    """With one parabola about N/128 the largest batch within 0.01 nat is one octave above it: ∝ N."""
    by_size = {n: pick(tuned(rows(n / 128, sigma=1e-4, n_train=n)), n_train=n) for n in (512, 1_024, 2_048)}
    for relative in (False, True):
        found = growth_within(by_size, relative)
        assert found.low < 1.0 < found.high and found.high - found.low < 0.1
    same = {n: pick(tuned(rows(8.0, sigma=1e-4, n_train=n)), n_train=n) for n in (512, 1_024, 2_048)}
    assert growth_within(same).high < 0.1
    beyond = growth_within(by_size | {2_048: pick(tuned(rows(128.0, n_train=2_048)), n_train=2_048)})
    assert math.isnan(beyond.value) and "N = 2,048: at the largest batch" in beyond.note


def test_the_smallest_batch_beside_the_best():
    found = above_best(tuned(rows(8.0, sigma=1e-3))[0])
    assert found.low < 0.01 * 3**2 < found.high and found.high - found.low < 0.02
    assert above_best(tuned(rows(1.0))[0]).value == pytest.approx(0.0, abs=1e-9)
    diverged = rows(8.0)
    for row in diverged:
        if row["config"]["batch_size"] == 1:
            row.update(status="diverged", test_loss=None, validation=[{"loss": None}])
    with pytest.raises(KeyError, match="batch 1 diverged"):
        above_best(tuned(diverged)[0])


def test_octaves_between_minima():
    small, large = (tuned(rows(best, sigma=1e-3, n=int(best)))[0] for best in (4.0, 16.0))
    found = octaves_between(large, small)
    assert found.low < 2.0 < found.high and found.high - found.low < 1.0
    edge = tuned(rows(0.25, batches=(2, 4, 8, 16)))[0]  # the minimum lies below the grid
    open_ = octaves_between(large, edge)
    assert open_.high == math.inf and 2.0 < open_.low < 5.0 and "at the smallest batch" in open_.note
    both = octaves_between(edge, edge)
    assert math.isnan(both.value) and (both.low, both.high) == (-math.inf, math.inf)


def test_two_curves_that_fall_to_batch_1_may_differ_in_anything():
    found = octaves_between(tuned(rows(0.25, sigma=1e-3, n=1))[0], tuned(rows(0.5, sigma=1e-3, n=2))[0])
    assert (found.value, found.low, found.high) == (0.0, -math.inf, math.inf)
    assert found.note == "both at batch 1, and none is smaller"
    assert zero_verdict(found, True) == zero_verdict(found, False) == "undecided"


def test_the_papers_claims_are_judged_by_where_zero_lies():
    made = rows(4.0, sigma=1e-3, n=1, n_train=512) + rows(16.0, sigma=1e-3, n=2, n_train=2_048)
    made += rows(8.0, sigma=1e-3, n=3, rank=4) + rows(8.0, sigma=1e-3, n=4, rank=64)
    made += rows(0.25, n=5) + rows(64.0, n=6, base="math-1m", batches=(1, 2, 4, 8))
    said = {p.says: p for p in predictions({}, [], 1_024, None, tuned(made)) if p.name == "P9"}
    by_data = said["octaves between best batches, N = 2,048 less N = 512"]
    assert by_data.zero is False and by_data.verdict == "held"
    by_rank = said["octaves between best batches, rank 64 less rank 4"]
    assert by_rank.zero is True and by_rank.verdict == "held"
    by_model = said["octaves between best batches, math-1m less math-200k"]
    assert (by_model.number.low, by_model.number.high, by_model.verdict) == (3.0, math.inf, "failed")
    missing = [p for p in predictions({}, [], 1_024) if p.name == "P9"]
    assert [p.verdict for p in missing] == ["not measured"] * 3
