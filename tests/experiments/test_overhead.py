"""The benchmark compares like with like: every arm makes the same step and measures the same norms."""

import importlib.metadata
import json
import sys

import pytest
import torch

from experiments.overhead import __main__ as command
from experiments.overhead import bench, fresh, page, table
from experiments.overhead.arms import OURS, PEERS, Arm, Between, Direct, Gram, Monitored
from experiments.overhead.counting import idle, operations, saved
from experiments.overhead.measure import compare, describe, ratio, warmed
from experiments.overhead.settings import SHAPES, Setting, Shape, batches, build
from experiments.overhead.sweeps import SWEEPS, Sweep
from gns.rules import linear

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
    monkeypatch.setitem(command.TRY, "smoke", (Monitored,))
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
    about = {
        "device": "a CPU",
        "python": "3.11",
        "versions": {"torch": "2", "opacus": None},
        "commit": "abc",
        "threads": 2,
    }
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r | {"machine": about}) + "\n" for r in [*rows, *rows]))
    found = table.read([path])
    assert len(found) == 2
    text = table.table(found)
    assert "### tiny, float32, on a CPU" in text and "torch 2; 2 threads; commit abc; 3 pairs." in text
    assert f"| untouched (A/A) | {ratio(rows[0])[0]:.3f} (" in text
    assert "| broken | could not run: ValueError: planted | | |" in text
    (ax,) = table.figure(found).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["untouched (A/A)"]
    assert ax.get_xlabel().startswith("time of a step")


def test_a_step_between_measured_ones_does_nothing_more_and_keeps_nothing_more():
    model, data = build(setting(), "cpu"), batches(setting(), "cpu")
    plain, between = warmed(Arm(setting(), model), data), warmed(Between(setting(), model), data)
    found = idle(plain, between, data[0])
    assert found["extra_operations"] == {} and found["extra_saved"] == [0, 0]
    assert found["hook_calls"] == {"RootInput": 1, "RootOutput": 1, "InputHook": 28, "OutputHook": 28}
    assert all(0 < seconds < 1e-3 for seconds in found["hook_seconds"].values())
    between.close()


def test_a_measured_step_does_more_and_keeps_no_bytes_more():
    model, data = build(setting(), "cpu"), batches(setting(), "cpu")
    plain, watched = warmed(Arm(setting(), model), data), warmed(Monitored(setting(), model), data)
    more = operations(watched, data[0])
    more.subtract(operations(plain, data[0]))
    assert more["aten.bmm.default"] == 28  # one product a factor
    (few, size), (many, same) = saved(plain, data[0]), saved(watched, data[0])
    assert many == few + 28 and same == size > 0  # the layers' own inputs
    watched.close()


@pytest.mark.parametrize(("kind", "name"), [(Direct, "_direct_sq_norms"), (Gram, "linear_sq_norms_gram")])
def test_an_arm_held_to_one_form_uses_it_alone(kind, name, monkeypatch):
    used = []
    for each in ("_direct_sq_norms", "linear_sq_norms_gram"):
        own = getattr(linear, each)
        monkeypatch.setattr(linear, each, lambda *a, own=own, each=each: used.append(each) or own(*a))
    arm, _ = stepped(kind, setting(rank=None))
    arm.close()
    assert set(used) == {name}
    assert linear.gram_is_cheaper(torch.empty(1, 2, 9), torch.empty(1, 2, 9))


def test_adapters_on_the_first_layers_only():
    model = build(setting(adapted=3), "cpu")
    assert len([n for n, p in model.named_parameters() if p.requires_grad]) == 6


def test_blocks_of_pairs_are_added_before_they_are_divided():
    row = {"untouched_s": [1.0] * 6, "arm_s": [1.0, 1.0, 4.0] * 2, "block": 3}
    assert ratio(row) == (2, 2, 2)


def test_every_sweep_names_settings_that_differ_in_x():
    for name, sweep in SWEEPS.items():
        settings = [s for _, s in sweep.settings()]
        assert len({s.name for s in settings}) == len(settings) == len(sweep.points), name
        assert all(s.shape in SHAPES for s in settings)
        assert Monitored in sweep.arms


def test_attaching_to_a_model_without_storage_is_timed():
    found = fresh.startup(setting(), repeats=2)
    assert found["parameters"] == 28 and len(found["attach_s"]) == 2


@pytest.fixture
def short(monkeypatch):
    """The whole benchmark on tiny models: one setting, one sweep of two points, no fresh processes."""
    given = setting(name="width 512, r=16, 8×128")
    sweep = Sweep("tiny", "T", (4, 8), lambda x: setting(name=f"T {x}", tokens=x), (Monitored, Gram))
    monkeypatch.setitem(command.PRESETS, "cpu", [given])
    monkeypatch.setitem(command.TRY, "cpu", (Monitored, Broken))
    monkeypatch.setattr(command, "FULL", given.name)
    SWEEPS_ALONE = {"tokens": sweep}
    for module in (command, bench, page, page.sweepfigure):
        monkeypatch.setattr(module, "SWEEPS", SWEEPS_ALONE)
    ranks = {"untouched_s": [1.0] * 3, "arm_s": [1.1] * 3, "calls_a_step": 1.0, "bytes_a_step": 80}
    monkeypatch.setattr(fresh, "pair", lambda setting, pairs: ranks)
    known = {"startup": {"attach_s": [0.2, 0.3, 0.4], "parameters": 448}}
    rss = iter([100, 104, 103] * 9)
    monkeypatch.setattr(fresh, "run", lambda what, *_: known.get(what) or {"rss_peak": next(rss) * 2**20})


def test_one_command_writes_rows_figures_and_a_page_that_says_what_was_missed(short, tmp_path):
    (tmp_path / "notes.md").write_text("## What is left\n\nThis.")
    bench.bench(tmp_path, pairs=3, sweep_pairs=3, minutes=0.1)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"README.md", "rows.jsonl", "notes.md", "overhead.png", "sweep-tokens.png"}
    text, rows = (tmp_path / "README.md").read_text(), page.read(tmp_path / "rows.jsonl")
    assert "0 operations more than the untouched step, 0 tensors and 0 bytes more" in text
    assert "takes 0.30 s" in text and "1.00 all-reduces, together 80 bytes" in text and "Time × 1.100" in text
    assert text.endswith("This.\n") and "(sweep-tokens.png)" in text
    assert "1.010 of 102 MiB (untouched: ± 0.039)" in text
    assert "| width 1,024, r=16, 8×128 | not yet measured | | 1.03 | | | 1.02 |" in text
    ours = next(r for r in page.timed(rows) if r["arm"] == "monitor")
    ours["arm_s"] = [2 * t for t in ours["untouched_s"]]
    assert "2.000 (2.000 … 2.000) | 1.05: missed | 1.000 |" in page.summary(rows)
    readme = tmp_path / "PROJECT.md"
    readme.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.insert(readme, rows, "results")
    assert "old" not in readme.read_text() and "2.000 (2.000 … 2.000)" in readme.read_text()
    assert readme.read_text().startswith("before\n") and readme.read_text().endswith("\nafter\n")
    assert "(results/overhead.png)" in readme.read_text()
    (ax,) = page.sweepfigure.figure("tokens", [r for r in rows if r.get("sweep") == "tokens"]).axes
    assert ax.get_xlabel() == "T" and len(ax.get_legend().get_texts()) == 3
