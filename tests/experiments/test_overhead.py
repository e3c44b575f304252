"""The benchmark compares like with like: every arm makes the same step and measures the same norms."""

import importlib.metadata
import json
import sys

import pytest
import torch

from experiments.overhead import __main__ as command
from experiments.overhead import table
from experiments.overhead.arms import OURS, PEERS, Arm, Monitored
from experiments.overhead.measure import compare, describe, ratio
from experiments.overhead.settings import SHAPES, Setting, Shape, batches, build

TINY = Shape(vocab=61, width=32, inner=48, layers=2, heads=4, kv_heads=2)
PACKAGE = {"opacus": "opacus", "backpack": "backpack"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def setting(**changes):
    return Setting(**{"name": "tiny", "shape": "tiny", "rank": 4, "batch": 3, "tokens": 16, **changes})


def stepped(kind, given):
    """Parameters after one step, and the norms the arm made."""
    arm = kind(given, build(given, "cpu"))
    arm.step(batches(given, "cpu")[0])
    return arm, [p.detach().clone() for p in arm.trained]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", PEERS, ids=lambda k: k.name)
def test_peers_measure_the_norms_that_the_monitor_measures(kind):
    for word, package in PACKAGE.items():
        if word in kind.name:
            pytest.importorskip(package)
    watched, weights = stepped(Monitored, setting())
    arm, peer = stepped(kind, setting())
    found = watched.monitor.latest
    watched.close()
    assert float(arm.sq_norms.mean()) == pytest.approx(found.mean_sq_norm, rel=1e-4)
    assert len(arm.sq_norms) == 3
    for mine, theirs in zip(weights, peer, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", OURS, ids=lambda k: k.name)
def test_our_arms_make_the_untouched_step_bit_for_bit(kind):
    given = setting(accumulate=2)
    _, plain = stepped(Arm, given)
    arm, watched = stepped(kind, given)
    arm.close()
    assert all(map(torch.equal, plain, watched))


def test_arms_share_what_is_frozen_and_nothing_else():
    model = build(setting(), "cpu")
    first, second = Arm(setting(), model), Arm(setting(), model)
    pairs = list(zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert any(a is b for a, b in pairs)
    assert all((a is b) != a.requires_grad for a, b in pairs)


def test_an_arm_that_stood_down_is_not_timed(monkeypatch):
    arm = Monitored(setting(), build(setting(), "cpu"))
    with pytest.raises(RuntimeError, match="'monitor': 0 steps"):
        arm.close()


class Broken(Arm):
    name = "broken"

    def watch(self):
        raise ValueError("planted")


def test_rows_hold_times_of_both_and_the_error_of_what_cannot_run():
    said = []
    rows = compare(setting(), (Broken,), device="cpu", pairs=3, say=said.append)
    assert [r["arm"] for r in rows] == ["untouched (A/A)", "broken"]
    assert [r["status"] for r in rows] == ["ok", "failed"]
    assert rows[1]["error"] == "ValueError: planted"
    assert len(rows[0]["untouched_s"]) == len(rows[0]["arm_s"]) == 3
    assert said == [describe(r) for r in rows] and "failed, ValueError: planted" in said[1]


def test_the_ratio_is_of_pairs():
    row = {"untouched_s": [1.0, 10.0, 2.0, 4.0], "arm_s": [1.1, 12.0, 2.2, 4.4]}
    middle, low, high = ratio(row)
    assert middle == pytest.approx(1.1) and low == pytest.approx(1.1) and high == pytest.approx(1.175)


def test_the_command_saves_rows_with_what_they_ran_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.PRESETS, "smoke", [setting()])
    monkeypatch.setitem(command.TRY, "smoke", OURS[:1])
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["overhead", "--out", str(out), "--pairs", "2"])
    command.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["arm"] for r in rows] == ["untouched (A/A)", "monitor"]
    assert all(r["machine"]["versions"]["torch"] == importlib.metadata.version("torch") for r in rows)
    assert rows[0]["setting"] == setting().row()
    assert "tiny: monitor: ×" in capsys.readouterr().out


def test_table_and_figure_are_of_rows_alone(tmp_path):
    rows = compare(setting(), (Broken,), device="cpu", pairs=3, say=lambda _: None)
    about = {"device": "a CPU", "python": "3.11", "versions": {"torch": "2", "opacus": None}, "commit": "abc"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r | {"machine": about}) + "\n" for r in [*rows, *rows]))
    found = table.read([path])
    assert len(found) == 2
    text = table.table(found)
    assert "### tiny, float32, on a CPU" in text and "torch 2; commit abc; 3 pairs." in text
    assert f"| untouched (A/A) | {ratio(rows[0])[0]:.3f} (" in text
    assert "| broken | could not run: ValueError: planted | | |" in text
    (ax,) = table.figure(found).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["untouched (A/A)"]
    assert ax.get_xlabel().startswith("time of a step")
