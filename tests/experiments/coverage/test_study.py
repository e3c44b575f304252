"""The study: counting, resuming without a loss or a repeat, table and figures from rows alone."""

import gzip
import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from experiments.coverage import study
from experiments.coverage.figures import interval
from experiments.coverage.noise import simulate
from experiments.coverage.page import conditional, levels, report, sides, target, usable
from experiments.coverage.sets import METHODS, Sets
from experiments.coverage.study import LEVELS, Cell, cells, measure, run, tally
from experiments.rows import append, mended, read, write
from gns.estimate import estimate
from gns.statistics.moments import BETWEEN
from gns.sums import StepSums

SMALL = [Cell("gaussian", "1/j", 4, "even", b, k, repeats=6) for b in (5, 500) for k in (10, 20)]


@pytest.fixture(autouse=True)
def short_noise(monkeypatch):
    monkeypatch.setattr(study, "STEPS", (10, 20))


def test_the_study_has_every_cell_that_was_asked_for(monkeypatch):
    monkeypatch.undo()
    every = cells(2000)
    assert len(every) == len({cell.hash for cell in every}) == 3 * 3 * 3 * 2 * 5 * 4
    assert {cell.b_simple for cell in every} == {5, 50, 500, 5_000, 20_000}
    assert {(cell.n, cell.k) for cell in every} == {(n, k) for n in (4, 16, 64) for k in (10, 20, 50, 200)}
    assert list(METHODS) == ["toolkit", "fieller", "delta", "bootstrap", "clamped EMA", "EMA of ratios"]


def test_a_hash_is_of_everything_that_the_row_depends_on():
    changes = {
        "law": "t5",
        "spectrum": "flat",
        "n": 16,
        "direction": "top",
        "b_simple": 7,
        "k": 11,
        "repeats": 9,
    }
    base = {
        "law": "gaussian",
        "spectrum": "1/j",
        "n": 4,
        "direction": "even",
        "b_simple": 5,
        "k": 10,
        "repeats": 6,
    }
    found = {Cell(**base | {name: value}).hash for name, value in changes.items()}
    found |= {Cell(**base).hash, Cell(**base, seed=1).hash}
    assert len(found) == len(changes) + 2
    assert Cell(**base).hash == Cell(**base).hash


def test_tally_counts_what_it_says():
    inf, nan = math.inf, math.nan
    low, high = [1.0, 3.0, 0.5, 1.0, nan, 0.1], [2.5, 4.0, 1.0, inf, nan, inf]
    one = Sets(np.array([low] * 3), np.array([high] * 3), np.ones(6))
    found = tally(one, 2.0)
    assert {name: values[2] for name, values in found.items()} == {
        "covered": 3,  # 1 … 2.5, 1 … ∞, 0.1 … ∞
        "bounded": 3,
        "covered_bounded": 1,
        "high_miss": 1,
        "low_miss": 1,
        "width": 0.75,  # of 0.75, 0.5, 0.25, ∞, ∞
        "width_bounded": 0.5,
        "low": 0.5,  # of 0.05, 0.25, 0.5, 0.5, 1.5
    }


@pytest.mark.parametrize("law", ["gaussian", "t5"])
def test_a_cell_is_what_estimate_says_run_by_run(law):
    """The whole way, noise to counts, against the real estimate of each run."""
    cell = Cell(law, "1/j^2", 4, "top", 20, 20, repeats=25)
    noise = simulate(law, cell.spectrum, cell.n, cell.repeats, 30, seed=3)
    found = measure(cell, noise)
    m, q = noise.recorded(cell.b_simple, cell.direction)
    for i, level in enumerate(LEVELS):
        real = [
            estimate([StepSums(j, 4, float(m[r, j]), float(q[r, j])) for j in range(20)], level=level)
            for r in range(25)
        ]
        assert all(e.variance == BETWEEN for e in real)  # none of these 25 is taken for a drifting run
        mine = found["methods"]["toolkit"]
        assert mine["covered"][i] == sum(e.low <= 20 <= e.high for e in real)
        assert mine["bounded"][i] == sum(math.isfinite(e.high) for e in real)
        statuses = [e.status for e in real]
        assert found["statuses"][i] == {s: statuses.count(s) for s in sorted(set(statuses))}
        assert mine["low"][i] == pytest.approx(np.median([e.low for e in real]) / 20, rel=1e-3)


def test_rows_say_what_made_them(tmp_path):
    rows = run(SMALL, tmp_path / "rows.jsonl.gz")
    assert rows == read(tmp_path / "rows.jsonl.gz")
    assert [Cell(**row["config"]) for row in rows] == SMALL
    for row in rows:
        assert row["status"] == "done"
        assert {"hash", "commit", "python", "numpy", "scipy", "seconds"} <= row.keys()
        assert set(row["methods"]) == set(METHODS)
        assert sum(row["statuses"][2].values()) == 6


def stop_after(monkeypatch, number):
    """Let `measure` stand for `number` cells, then press Ctrl-C; the cells that were measured are listed."""
    real, seen = measure, []

    def limited(cell, noise):
        if len(seen) == number:
            raise KeyboardInterrupt
        seen.append(cell)
        return real(cell, noise)

    monkeypatch.setattr(study, "measure", limited)
    return seen


def without_time(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_a_stopped_run_goes_on_repeats_nothing_and_ends_the_same(tmp_path, monkeypatch, stopped):
    whole = run(SMALL, tmp_path / "whole.jsonl.gz")
    path = tmp_path / "rows.jsonl.gz"
    first = stop_after(monkeypatch, stopped)
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, path)
    assert len(read(path)) == stopped
    second = stop_after(monkeypatch, 99)
    rows = run(SMALL, path)
    assert first + second == SMALL
    assert without_time(rows) == without_time(whole) == without_time(read(path))
    assert run(SMALL, path) == rows
    assert first + second == SMALL


@pytest.mark.parametrize("left", [1, 5, 9, 15, 30, 40, 45])
def test_rows_behind_half_a_row_are_read_once_it_is_taken_out(tmp_path, left):
    path = tmp_path / "rows.jsonl.gz"
    append(path, {"row": "first"})
    whole = path.stat().st_size
    append(path, {"row": "second, of which a kill leaves a part"})
    path.write_bytes(path.read_bytes()[: whole + left])
    append(path, {"row": "third"})
    assert read(path)[:1] == mended(path)[:1] == [{"row": "first"}]
    append(path, {"row": "fourth"})
    before = path.read_bytes()
    assert [row["row"] for row in mended(path)] == ["first", "fourth"] and path.read_bytes() == before


def test_a_row_cut_off_by_a_kill_is_computed_again_and_the_others_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl.gz"
    whole = run(SMALL, path)
    path.unlink()
    for row in whole[:3]:
        append(path, row)
    path.write_bytes(path.read_bytes()[:-30])
    assert read(path) == whole[:2]
    seen = stop_after(monkeypatch, 99)
    assert without_time(run(SMALL, path)) == without_time(whole)
    assert seen == SMALL[2:]


def test_a_file_with_nothing_whole_in_it_is_begun_anew(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    append(path, {"hash": "x", "status": "done", "config": {}})
    path.write_bytes(path.read_bytes()[:15])
    assert [row["status"] for row in run(SMALL[:1], path)] == ["done"]


def test_a_failed_cell_is_said_and_tried_again(tmp_path, monkeypatch):
    real = measure

    def broken(cell, noise):
        if cell == SMALL[1]:
            raise ValueError("planted")
        return real(cell, noise)

    monkeypatch.setattr(study, "measure", broken)
    rows = run(SMALL, tmp_path / "rows.jsonl.gz")
    assert [row["status"] for row in rows] == ["done", "failed", "done", "done"]
    assert rows[1]["error"] == "ValueError: planted"
    report(rows, tmp_path)
    assert "1 cells failed" in (tmp_path / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(study, "measure", real)
    assert {row["status"] for row in run(SMALL, tmp_path / "rows.jsonl.gz")} == {"done"}


def test_other_rows_of_a_file_are_kept(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    run(SMALL[:2], path)
    assert len(run(SMALL[2:], path)) == 4


def test_the_bytes_depend_on_the_rows_alone(tmp_path):
    rows = [{"hash": "a", "value": 1.5}, {"hash": "b", "value": None}]
    for name in ("one", "two"):
        write(tmp_path / name, rows)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert [
        json.loads(line) for line in gzip.decompress((tmp_path / "one").read_bytes()).splitlines()
    ] == rows


# table and figures


def planted(law="gaussian", k=20, covered=190, bounded=200, right=190, repeats=200, **config):
    """A row whose toolkit covers as often as stated; the other methods have the same numbers."""
    one = {"covered": [covered] * 3, "bounded": [bounded] * 3, "covered_bounded": [right] * 3}
    one |= {"high_miss": [0] * 3, "low_miss": [0] * 3, "width": [None] * 3, "width_bounded": [0.5] * 3}
    one |= {"low": [0.5] * 3, "point": 1.0}
    place = {"law": law, "spectrum": "1/j", "n": 16, "direction": "even", "b_simple": 5, "k": k, "seed": 0}
    about = {"status": "done", "commit": "c0ffee", "python": "3", "numpy": "2", "scipy": "1"}
    return {
        **about,
        "hash": str((law, k, config)),
        "config": place | {"repeats": repeats} | config,
        "methods": dict.fromkeys(METHODS, one),
        "statuses": [{"measured": bounded, "lower bound": repeats - bounded}] * 3,
    }


def test_the_table_counts_the_cells_on_target_and_names_those_that_are_not():
    rows = [
        planted(),  # 95 %
        planted(b_simple=50, covered=170),  # 85 %: far off
        planted(b_simple=500, covered=184),  # 92 %: off, but 200 repeats cannot tell
        planted(b_simple=5000, bounded=20, covered=199),  # 99.5 %, legal where sets are unbounded
        planted(b_simple=20000, bounded=20, covered=160),
        planted(k=10, covered=100),  # no target
        planted("t5", covered=100),
    ]
    text = target(rows)
    assert "| at least half the sets bounded | 93–97 % | 3 | 1 | 85.0 … 95.0 |" in text
    assert "| elsewhere | at least 93 % | 2 | 1 | 80.0 … 99.5 |" in text
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(lines) == 3
    assert "B = 50: 85.0 % (79.3 … 89.6), beyond Monte Carlo error" in lines[0]
    assert "B = 500: 92.0 % (87.3 … 95.4), within Monte Carlo error" in lines[1]
    assert "No cell misses" in target(rows[:1])


def test_the_table_conditions_on_measured():
    rows = [planted(right=180), planted(b_simple=500, bounded=10, right=2)]
    lines = conditional(rows).splitlines()
    assert "| Gaussian | 90–100 % | 1 | 90.0 | 10.0 |" in lines
    assert "| Gaussian | 0–10 % | 1 | 20.0 | 4.0 |" in lines


def test_levels_keep_bounded_and_unbounded_cells_apart():
    text = levels([planted(), planted(b_simple=500, bounded=20, covered=198)])
    assert "| Gaussian | 20 | 95.0 … 95.0 | 99.0 … 99.0 |" in text


def test_the_table_says_on_which_side_sets_miss():
    row = planted()
    row["methods"]["toolkit"] = row["methods"]["toolkit"] | {"low_miss": [9] * 3, "high_miss": [1] * 3}
    assert sides([row, planted("t5")]).endswith("Gaussian 90 %.")


def test_a_quick_run_does_not_blur_the_study():
    rows = [planted(repeats=200), planted(repeats=2000, covered=1900)]
    assert usable(rows) == rows[1:]


def test_nothing_to_draw_says_what_to_do():
    with pytest.raises(ValueError, match="experiments.coverage"):
        usable([planted() | {"status": "failed"}])


def test_the_report_needs_nothing_but_the_rows_and_is_the_same_again(tmp_path):
    wanted = [
        Cell(law, "1/j", 4, direction, b, k, repeats=6)
        for law in ("gaussian", "t5")
        for direction in ("even", "top")
        for b in (5, 500)
        for k in (10, 20)
    ]
    run(wanted, tmp_path / "rows.jsonl.gz")
    contents = []
    for folder in ("one", "two"):
        paths = report(read(tmp_path / "rows.jsonl.gz"), tmp_path / folder)
        contents.append({path.name: path.read_bytes() for path in paths})
    assert contents[0] == contents[1]
    assert {"README.md", "CELLS.md", "coverage_gaussian.png", "coverage_t5.png", "methods.png"} <= set(
        contents[0]
    )
    text = contents[0]["README.md"].decode()
    assert all(name in text for name in contents[0] if name.endswith(".png"))
    for name in contents[0]:
        if name.endswith(".png"):
            assert (
                matplotlib.image.imread(tmp_path / "one" / name)[..., :3].std() > 0.02
            )  # something is drawn


def test_the_command_runs_and_redraws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "TRUE_B", (5, 50))
    options = ["--law", "gaussian", "--spectrum", "1/j", "--examples", "4", "--repeats", "4"]
    study.main([*options, "--out", str(tmp_path)])
    written = capsys.readouterr().out.split()
    before = {path: Path(path).read_bytes() for path in written}
    monkeypatch.setattr(study, "simulate", None)
    study.main(["--figures", "--out", str(tmp_path)])
    assert {path: Path(path).read_bytes() for path in written} == before


def test_one_repeat_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        study.main(["--repeats", "1", "--out", str(tmp_path)])
    assert ended.value.code == 2 and not list(tmp_path.iterdir())
    assert "--repeats 1: at least 2 are needed" in capsys.readouterr().err


def test_the_command_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run", stopped)
    with pytest.raises(SystemExit) as ended:
        study.main(["--out", str(tmp_path)])
    assert ended.value.code == 130
    assert "same command goes on" in capsys.readouterr().err


def test_the_binomial_interval_is_exact():
    assert interval(0, 10) == (0.0, pytest.approx(1 - 0.025 ** (1 / 10)))
    assert interval(10, 10) == (pytest.approx(0.025 ** (1 / 10)), 1.0)
    assert interval(0, 0) == (0.0, 1.0)
    low, high = interval(95, 100)  # by the tables
    assert (low, high) == (pytest.approx(0.8872, abs=1e-4), pytest.approx(0.9836, abs=1e-4))


def test_the_committed_study_meets_its_target():
    """The rows in the repository: whole, at 2,000 repeats or more, and no Gaussian cell off target."""
    rows = usable(read(study.RESULTS / study.ROWS))
    assert rows[0]["config"]["repeats"] >= 2000
    assert len(rows) == 1080
    assert "No cell misses the target." in target(rows)
    readme = (study.RESULTS / "README.md").read_text(encoding="utf-8")
    assert target(rows) in readme
