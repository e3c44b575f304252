"""Runs made again to be read otherwise: the same runs, other readings, on examples that they do not see."""

import json
import math
from dataclasses import replace

import pytest
import torch

from experiments import rows
from experiments.configs import RunError
from experiments.evidence import again
from experiments.evidence.files import ADAM, CURVATURE, runs_in
from experiments.evidence.measured import CURVED, measured, with_b_noise
from experiments.run import run
from gns.curvature.course import progress_weighted
from gns.curvature.readingsfile import reading_of
from tests.experiments.evidence import synthetic
from tests.experiments.small_runs import config

CPU = torch.device("cpu")


@pytest.fixture
def short(monkeypatch):
    """Few readings of few examples."""
    monkeypatch.setattr(again, "READINGS", 3)
    monkeypatch.setattr(again, "FOR_G", 2)
    monkeypatch.setattr(again, "FOR_H", 1)


@pytest.fixture
def row(tiny_base, sentences):
    return run(config(tiny_base, gns_every=1, schedule="constant", batch_size=4, n_train=48))


def test_b_noise_is_read_in_the_middle_of_each_part_of_the_way(row, short):
    found = again.curved(row, 10.0, CPU)
    assert found["off"] < 1e-4  # a row keeps five digits of a loss
    readings = [reading_of(each) for each in json.loads(json.dumps(found["readings"]))]
    assert [r.step for r in readings] == [2, 5, 8]
    assert all(r.learning_rate == row["config"]["lr"] for r in readings)
    assert {r.estimate.n_examples for r in readings} == {again.FOR_G * again.BATCH}
    assert all(r.estimate.moments is not None for r in readings)
    assert len({r.estimate.trace_sigma for r in readings}) == 3


def test_a_run_with_dropout_is_the_same_again(tiny_base, sentences, short):
    of = config(tiny_base, schedule="constant", batch_size=4, n_train=48, dropout=0.5, lr=0.05)
    assert again.curved(run(of), 10.0, CPU)["off"] < 1e-4


def test_another_run_is_refused(row, short):
    other = {**row, "train_loss": [1.1 * loss for loss in row["train_loss"]]}
    with pytest.raises(RunError, match=f"run {row['hash']} made again is another: .* 9 % off"):
        again.curved(other, 10.0, CPU)


def test_a_run_with_a_loss_that_is_no_number_is_another(row, short):
    for loss in (None, float("nan")):
        with pytest.raises(RunError, match="made again is another: .* nan % off"):
            again.curved({**row, "train_loss": [loss, *row["train_loss"][1:]]}, 10.0, CPU)


def test_a_run_that_is_there_at_once_is_read_where_it_starts(row, short):
    found = again.curved(row, 0.3, CPU)
    assert [each["step"] for each in found["readings"]] == [0, 0, 0] and found["off"] == 0


def test_examples_are_those_that_no_run_sees_and_each_once(tiny_base, sentences, short):
    of = config(tiny_base, n_train=48)
    fresh = [tuple(row.input_ids) for batch in again._fresh(of) for row in batch]
    seen = {tuple(row.input_ids) for row in again.data_of(of).train}
    assert len(fresh) == 3 * 3 * again.BATCH and not seen & set(fresh)


def test_copies_are_no_examples_of_their_own():
    of = again.RunConfig("math-200k", "wordmath", dials={"copies": 2})
    texts = [tuple(row.input_ids) for batch in again._fresh(of) for row in batch]
    assert len(set(texts)) == len(texts) == again.READINGS * (again.FOR_G + again.FOR_H) * again.BATCH


def test_adams_metric_moves_nothing_but_the_readings(row):
    found = again.in_adams_metric(row, CPU)
    assert found["validation"] == row["validation"] and found["train_loss"] == row["train_loss"]
    assert found["gns"]["metric"] == "adam" and found["hash"] != row["hash"]
    assert found["gns"]["steps"] != row["gns"]["steps"]


def test_a_run_that_fails_is_said(row):
    broken = {**row, "config": {**row["config"], "dials": {"nonsense": 1}}}
    with pytest.raises(RunError, match="in Adam's metric: .*nonsense"):
        again.in_adams_metric(broken, CPU)


def test_runs_are_chosen_by_configuration_rate_and_target():
    every = synthetic.rows() + synthetic.rows(dials={"label_noise": 0.5})
    chosen = list(again.wanted(every, ["reference", "rank 4", "noise 0.5"]))
    assert [name for name, *_ in chosen] == ["reference"] * 2 + ["noise 0.5"] * 2
    assert {row["config"]["batch_size"] for _, row, _ in chosen} == {4}
    assert {row["config"]["lr"] for _, row, _ in chosen} == {1e-3}
    target = measured(synthetic.rows(), 1_024).target
    at = {row["hash"]: reached for _, row, reached in chosen}
    for row in (row for _, row, _ in chosen):  # the loss where it was stopped is the target, to the grid
        near = min(row["validation"], key=lambda e: abs(e["step"] - at[row["hash"]]))
        assert near["loss"] == pytest.approx(target, abs=0.1)


def test_b_noise_joins_the_noise_scales_where_every_run_has_it():
    every = synthetic.rows()
    found = measured(every, 1_024)
    told = with_b_noise(found, every, synthetic.curvature(every, 20.0))
    assert told.noise[CURVED].value == pytest.approx(20.0, rel=0.1)
    assert told.noise[CURVED].low < 20 < told.noise[CURVED].high
    assert replace(told, noise=found.noise) == found
    missing = [row for row in synthetic.curvature(every, 20.0) if row["config"]["seed"] == 0]
    assert with_b_noise(found, every, missing) == found


def test_b_noise_is_weighted_by_the_progress_of_steps_of_the_reference_batch():
    every = synthetic.rows(seeds=1)
    (made,) = synthetic.curvature(every[:1] + [r for r in every if r["config"]["batch_size"] == 4][:1], 1.0)
    for k, each in enumerate(made["readings"]):
        each["estimate"]["trace_h_sigma"] = 5.0 * 1.5**k
    over = progress_weighted([reading_of(each) for each in made["readings"]], 4)
    found = with_b_noise(measured(every, 1_024), every, [made]).noise[CURVED]
    assert found.value == pytest.approx(over.b_noise)


def test_readings_on_the_way_to_another_target_do_not_count():
    every = synthetic.rows()
    found = measured(every, 1_024)
    then = synthetic.curvature(every, 40.0, target=found.target + 0.1)
    assert with_b_noise(found, every, then) == found
    told = with_b_noise(found, every, synthetic.curvature(every, 20.0) + then)
    assert told.noise[CURVED].value == pytest.approx(20.0, rel=0.1)


def test_readings_that_cannot_be_weighed_are_told_and_bound_nothing():
    every = synthetic.rows()
    broken = [{**row, "readings": row["readings"][:2]} for row in synthetic.curvature(every, 20.0)]
    found = with_b_noise(measured(every, 1_024), every, broken).noise[CURVED]
    assert math.isnan(found.value) and (found.low, found.high) == (0, math.inf)


def test_what_has_a_row_is_not_made_again(row, short, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(again, "wanted", lambda runs, names: [("reference", row, 10.0)])
    again.main(["--folder", str(tmp_path), "--device", "cpu"])
    first = {name: rows.read(tmp_path / name) for name in (ADAM, CURVATURE)}
    assert [len(part) for part in first.values()] == [1, 1]
    assert first[CURVATURE][0]["of"] == row["hash"] and first[CURVATURE][0]["configuration"] == "reference"
    monkeypatch.setattr(again, "run", None)
    with monkeypatch.context() as patch:
        patch.setattr(again, "curved", None)
        again.main(["--folder", str(tmp_path), "--device", "cpu"])
        (tmp_path / ADAM).rename(tmp_path / "another-sweep.jsonl.gz")
        again.main(["--folder", str(tmp_path), "--device", "cpu", "--only", "adam"])
    (tmp_path / "another-sweep.jsonl.gz").rename(tmp_path / ADAM)
    assert {name: rows.read(tmp_path / name) for name in first} == first
    monkeypatch.setattr(again, "wanted", lambda runs, names: [("reference", row, 8.0)])  # the target moved
    again.main(["--folder", str(tmp_path), "--device", "cpu"])
    assert [each["reached"] for each in rows.read(tmp_path / CURVATURE)] == [10.0, 8.0]


def test_what_a_kill_cut_off_is_made_again(row, short, monkeypatch, tmp_path):
    monkeypatch.setattr(again, "wanted", lambda runs, names: [("reference", row, 10.0)])
    again.main(["--folder", str(tmp_path), "--device", "cpu"])
    for name in (ADAM, CURVATURE):
        path = tmp_path / name
        rows.append(path, rows.read(path)[0] | {"of": "another", "hash": "another"})
        path.write_bytes(path.read_bytes()[:-20])
    monkeypatch.setattr(again, "wanted", lambda runs, names: [("reference", row | {"hash": "new"}, 10.0)])
    again.main(["--folder", str(tmp_path), "--device", "cpu", "--only", "curvature"])
    assert [each["of"] for each in rows.read(tmp_path / CURVATURE)] == [row["hash"], "new"]
    assert len(runs_in(tmp_path)) == 1


def test_a_run_that_cannot_be_made_again_does_not_stop_the_others(row, short, monkeypatch, tmp_path, capsys):
    other = {**row, "hash": "other", "train_loss": [1.1 * loss for loss in row["train_loss"]]}
    both = [("noise 0.2", other, 10.0), ("reference", row, 10.0)]
    monkeypatch.setattr(again, "wanted", lambda runs, names: both)
    with pytest.raises(SystemExit) as end:
        again.main(["--folder", str(tmp_path), "--device", "cpu", "--only", "curvature"])
    assert end.value.code == 2 and "noise 0.2: run other made again is another" in capsys.readouterr().err
    assert [each["of"] for each in rows.read(tmp_path / CURVATURE)] == [row["hash"]]
