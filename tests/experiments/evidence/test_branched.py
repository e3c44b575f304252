"""Branched runs of each configuration: from where, how far, at which batches, and what they say."""

import math
from dataclasses import replace

import pytest

from experiments import rows
from experiments.configs import RunError
from experiments.evidence import branched
from experiments.evidence.files import BRANCHES, runs_in
from experiments.evidence.page import page
from experiments.evidence.readout import read_out
from tests.experiments.evidence import synthetic
from tests.experiments.small_runs import config


@pytest.fixture
def trunk(tiny_base, sentences):
    return config(tiny_base, schedule="constant", batch_size=1, n_train=48)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(branched, "SIZE", 32)  # 16 rows of trunk, 16 of branches


def told(name, excess, seeds=(0, 1, 2), lr=1e-3):
    """Rows of trunks at batch 1 whose branches at 1, 2, 4, … times it lose so much more, nats."""
    made = []
    for seed in seeds:
        of = {**synthetic.rows()[0]["config"], "batch_size": 1, "seed": seed, "data_seed": seed, "lr": lr}
        about = [{"batch_size": 2**i, "at_examples": 512, "examples": 512} for i in range(len(excess))]
        each = [
            {"config": of, "status": "done", "branch": branch, "loss": 0.3 + 0.1 * seed + more}
            for branch, more in zip(about, excess, strict=True)
        ]
        made.append({"configuration": name, "trunk": f"{name}{seed}{lr}", "branches": each})
    return made


def test_a_trunk_is_at_the_smallest_batch_and_its_best_rate_and_seeds_draw_data():
    found = list(branched.trunks(synthetic.rows(), ("reference", "merged"), (0, 5)))
    other = list(branched.trunks(synthetic.rows(gns_metric="adam"), ("reference",), (0, 5)))
    assert [c.hash for _, c in found] == [c.hash for _, c in other]  # whatever else was measured
    assert [name for name, _ in found] == ["reference"] * 2
    assert [(c.batch_size, c.lr, c.seed, c.data_seed, c.gns_every) for _, c in found] == [
        (1, 1e-3, 0, 0, 0),
        (1, 1e-3, 5, 5, 0),
    ]


def test_branches_start_in_the_middle_of_the_way_and_have_four_steps_at_the_least(trunk, short):
    found = branched.branches_of("reference", trunk)
    about = [row["branch"] for row in found["branches"]]
    assert [each["batch_size"] for each in about] == [1, 2, 4]
    assert {(each["at_examples"], each["examples"]) for each in about} == {(16, 16)}
    assert found["trunk"] == trunk.hash and all(row["loss"] > 0 for row in found["branches"])


def test_a_branch_that_fails_is_an_error_that_names_it(trunk, short, monkeypatch):
    monkeypatch.setattr(branched, "branch_runs", lambda *of: [{"status": "failed", "error": "no memory"}])
    with pytest.raises(RunError, match="reference, seed 0: no memory"):
        branched.branches_of("reference", trunk)


def test_the_largest_batch_that_costs_nothing_is_read_of_the_last_trunks():
    made = told("reference", (0.0, 0.002, 0.05), (0, 1, 2, 3)) + told("full", (0.0, 0.0, 0.0, 0.02))
    last = told("reference", (0.0, 0.05, 0.1), lr=2e-3)
    found = branched.branched_batches(made + last)
    assert list(found) == ["reference", "full"]
    assert 1 < found["reference"].value < 2 and 4 < found["full"].value < 8
    assert found["reference"].value == branched.branched_batches(last)["reference"].value
    assert branched.branched_batches(told("reference", (0.0, 0.1), seeds=(0,))) == {}
    lost = told("reference", (0.0, 0.1))
    lost[1]["branches"][0] |= {"status": "diverged", "loss": None}
    found = branched.branched_batches(lost)["reference"]
    assert math.isnan(found.value) and "trunk's batch diverged" in found.note


def test_the_page_shows_it_beside_the_other_definitions():
    made = synthetic.rows(noise=0.03, n=1) + synthetic.rows(noise=0.03, n=2, rank=4)
    text = page(read_out(made, [], [], told("reference", (0.0, 0.002, 0.018, 0.1))), {})
    head, reference, rank4 = (
        next(line for line in text.splitlines() if line.startswith(f"| {start} |")).split(" | ")
        for start in ("configuration", "reference", "rank 4")
    )
    at = head.index("branches within 0.01 nat")
    assert 2 < float(reference[at].split(" (")[0]) < 4 and rank4[at] == "–"


def test_what_has_a_row_is_not_made_again_and_what_fails_is_named(
    trunk, short, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(branched, "trunks", lambda runs, names, seeds: [("reference", trunk)])
    branched.main(["--folder", str(tmp_path), "--device", "cpu"])
    first = rows.read(tmp_path / BRANCHES)
    assert [row["trunk"] for row in first] == [trunk.hash] and runs_in(tmp_path) == []

    def lost(name, trunk, device):
        raise RunError(f"{name} is lost")

    monkeypatch.setattr(branched, "branches_of", lost)
    branched.main(["--folder", str(tmp_path), "--device", "cpu"])
    assert rows.read(tmp_path / BRANCHES) == first
    others = [replace(trunk, seed=seed) for seed in (8, 9)]
    monkeypatch.setattr(branched, "trunks", lambda runs, names, seeds: zip("ab", others, strict=True))
    with pytest.raises(SystemExit, match="2"):
        branched.main(["--folder", str(tmp_path), "--device", "cpu"])
    assert capsys.readouterr().err.endswith("a is lost\nb is lost\n")  # one does not keep others back
