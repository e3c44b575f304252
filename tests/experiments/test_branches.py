"""Branches of a tiny real run: the branch at the trunk's own batch is the run itself."""

import dataclasses
import json

import pytest
import torch

from experiments import branches, loop, prepared
from experiments.branches import branch_runs, main
from experiments.course import Course
from experiments.critical import branched
from experiments.run import run
from tests.experiments.small_runs import config

pytestmark = pytest.mark.usefixtures("sentences")


def _trunk(base, **changed):
    given = dict(schedule="constant", batch_size=2, n_train=40, lr=2e-2, clip=0.5) | changed
    return config(base, **given)


@pytest.mark.parametrize("optimizer, lr", [("adamw", 2e-2), ("sgd", 1.0)])
def test_the_branch_at_the_trunks_batch_is_the_run_itself(tiny_base, optimizer, lr):
    trunk = _trunk(tiny_base, optimizer=optimizer, lr=lr)
    rows = branch_runs(trunk, 6, 24, [2, 1, 4], device="cpu")
    whole = dataclasses.replace(trunk, protocol="steps", steps=18)
    twin, course = prepared.prepare(whole, torch.device("cpu")), Course(whole)
    course.evaluated(twin.validation_loss())
    loop.train(twin, course)
    assert [row["status"] for row in rows] == ["done"] * 3
    assert rows[1]["loss"] == course.evaluations[-1].loss  # to the last bit, and not the first branch made
    assert len({row["loss"] for row in rows}) == 3
    (alone,) = branch_runs(trunk, 6, 24, [4], device="cpu")
    assert alone["loss"] == rows[2]["loss"] and alone["trunk_loss"] == rows[0]["trunk_loss"]
    powers = {"adamw": 0.5, "sgd": 1.0}
    assert [row["branch"]["lr"] for row in rows] == [lr * k ** powers[optimizer] for k in (2, 1, 4)]
    assert [row["branch"]["batch_size"] for row in rows] == [4, 2, 8]


def test_with_dropout_a_branch_has_its_own_stream_whatever_was_made_before_it(tiny_base):
    trunk = _trunk(tiny_base, dropout=0.5, lr=0.1)
    rows = branch_runs(trunk, 6, 24, [2, 4, 1], device="cpu")
    for row, k in zip(rows, (2, 4, 1), strict=True):
        (alone,) = branch_runs(trunk, 6, 24, [k], device="cpu")
        assert alone["loss"] == row["loss"], k
    whole = dataclasses.replace(trunk, protocol="steps", steps=18)
    assert run(whole, device="cpu")["validation"][-1]["loss"] == rows[2]["loss"]


def test_no_two_branches_draw_the_same_masks(tiny_base, monkeypatch):
    drawn, step = [], loop.step

    def noted(p, o, numbers, lr):
        state = torch.random.get_rng_state()
        drawn.append((len(numbers), torch.rand(2).tolist()))
        torch.random.set_rng_state(state)
        return step(p, o, numbers, lr)

    monkeypatch.setattr(loop, "step", noted)
    branch_runs(_trunk(tiny_base, dropout=0.5), 3, 16, [1, 2, 4], device="cpu")
    first = {size: next(values for n, values in drawn[3:] if n == size) for size in (2, 4, 8)}
    assert len({tuple(values) for values in first.values()}) == 3


def test_a_branch_is_its_own_steps_from_the_trunks_state(tiny_base, monkeypatch):
    seen = []
    step = loop.step
    monkeypatch.setattr(
        loop, "step", lambda p, o, numbers, lr: seen.append((len(numbers), lr, o)) or step(p, o, numbers, lr)
    )
    trunk = _trunk(tiny_base, beta2_batch=2, beta2=0.9)
    branch_runs(trunk, 3, 16, [1, 4], device="cpu")
    assert [n for n, *_ in seen] == [2] * 3 + [2] * 8 + [8] * 2
    betas = [o.param_groups[0]["betas"][1] for *_, o in seen]
    assert betas[0] == pytest.approx(0.9) and betas[-1] == pytest.approx(0.9**4)
    steps = {float(state["step"]) for state in seen[-1][2].state.values()}
    assert steps == {5.0}  # the trunk's three and its own two


def test_a_branch_with_another_beta2_begins_with_the_trunks_second_moments(tiny_base, monkeypatch):
    seen = []
    step = loop.step

    def noted(p, o, numbers, lr):
        if o.state:
            group = o.param_groups[0]
            beta2 = group["betas"][1]
            v = [o.state[q]["exp_avg_sq"] / (1 - beta2 ** float(o.state[q]["step"])) for q in group["params"]]
            seen.append((len(numbers), [x.clone() for x in v]))
        return step(p, o, numbers, lr)

    monkeypatch.setattr(loop, "step", noted)
    branch_runs(_trunk(tiny_base, beta2_batch=2, beta2=0.9), 3, 16, [1, 4], device="cpu")
    trunk = next(v for n, v in seen[2:] if n == 2)  # where the trunk ended and the first branch begins
    branch = next(v for n, v in seen if n == 8)
    for a, b in zip(trunk, branch, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


def test_a_branch_that_leaves_all_bounds_is_a_result_and_the_next_one_does_not_see_it(tiny_base, monkeypatch):
    monkeypatch.setitem(branches.POWERS, "sgd", 25.0)  # so that a larger branch overflows
    trunk = _trunk(tiny_base, optimizer="sgd", lr=0.1, clip=None)
    eight, sixteen, one = branch_runs(trunk, 2, 32, [8, 16, 1], device="cpu")  # 2, 1 and 16 steps
    assert [row["status"] for row in (eight, sixteen, one)] == ["diverged", "diverged", "done"]
    assert eight["loss"] is None and sixteen["loss"] is None and one["loss"] < one["trunk_loss"] + 0.01
    assert branched([eight, sixteen, one]).value == pytest.approx(2.0)  # right after the last that survived


@pytest.mark.parametrize(
    "changed, given, said",
    [
        ({"schedule": "cosine"}, (2, 8, [1]), "schedule is 'cosine'"),
        ({}, (10, 24, [1]), "44 examples are needed, n_train is 40"),
        ({}, (2, 12, [1, 4]), "examples is 12; a multiple of 4 × 2"),
    ],
)
def test_what_cannot_be_branched_is_a_failed_row(tiny_base, changed, given, said):
    rows = branch_runs(_trunk(tiny_base, **changed), *given, device="cpu")
    assert {row["status"] for row in rows} == {"failed"} and said in rows[0]["error"]


def test_a_trunk_that_diverges_says_so(tiny_base):
    (row,) = branch_runs(_trunk(tiny_base, lr=1e30, clip=None), 4, 8, [1], device="cpu")
    assert "the trunk diverged before step 4" in row["error"]


def test_the_command_writes_rows_that_critical_reads(tiny_base, tmp_path, capsys):
    out, given = tmp_path / "rows.jsonl", _trunk(tiny_base).to_dict()
    options = ["--at", "4", "--examples", "16", "--multiples", "1", "2", "--device", "cpu"]
    assert main(["--config", json.dumps(given), *options, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["hash"] for row in rows}) == 4
    assert f"up to batch {branched(rows).value:.3g}" in capsys.readouterr().out
    assert main(["--config", json.dumps(given | {"warmup": 0.5}), *options]) == 1
    assert "warmup 0.5; a branch needs constant" in capsys.readouterr().out
