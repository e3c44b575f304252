"""Figures of sweeps: drawn from rows alone, whatever the rows lack; the table's numbers are the rows'."""

import gzip
import json
import math
import tomllib
from dataclasses import replace

import matplotlib
import pytest

from experiments import grids
from experiments.analysis.cells import cells
from experiments.analysis.curves import curve
from experiments.analysis.noise import measured
from experiments.configs import RunError
from experiments.figures.__main__ import DRAW, draw_all, main, read
from experiments.figures.style import LOOK, named
from experiments.figures.table import table
from tests.experiments.analysis.synthetic import rows

BASE = {"adapter": "lora", "base": "1m", "task": "wordmath", "n_train": 512}


def with_noise(made, value=12.0, high=None):
    for row in made:
        if row["status"] == "done" and row["config"]["batch_size"] <= 2:
            reading = {"b_simple": value * row["config"]["batch_size"], "low": 4.0, "high": high}
            row["gns"] = {
                "metric": "euclidean",
                "progress_weighted": {"joint": {}, "B": reading},
                "summary": {},
            }
    return made


def without_a_survivor(made, batch):
    lost = {"status": "diverged", "test_loss": None}
    return [r | lost if r["config"]["batch_size"] == batch else r for r in made]


def curves_of(made):
    return [curve(cell, draws=30) for cell in cells(made)]


CASES = {
    "one cell": rows(**BASE),
    "noise scale, divergence": with_noise(rows(sigma=0.01, diverges=2e-3, **BASE))
    + rows(rank=64, best=0.2, **BASE),
    "a batch at which every run diverged": without_a_survivor(rows(**BASE), 128),
    "accuracy": [r | {"accuracy": 0.5, "items_right": [0, 1]} for r in rows(seeds=2, **BASE)],
    "one batch, one rate, one seed": rows(seeds=1, batches=[4], rates=[1e-3], **BASE),
    "nine cells": [
        r for i in range(9) for r in rows(seeds=1, batches=[1, 2, 4], rates=[1e-3], rank=i + 1, **BASE)
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_whatever_rows_there_are_each_figure_is_drawn(case, tmp_path):
    found = curves_of(CASES[case])
    for name, draw in DRAW.items():
        with matplotlib.rc_context(LOOK):
            figure = draw(found, ["rank"])
            figure.savefig(tmp_path / f"{name}.png", dpi=40)
        texts = " ".join(axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes)
        assert "batch size" in texts, name


def test_the_noise_scale_is_that_of_the_smallest_batch_and_its_best_rate():
    (cell,) = cells(with_noise(rows(seeds=2, **BASE), 9.0, high=90.0))
    found = measured(cell)
    assert (found.value, found.low, found.high) == pytest.approx((9.0, 4.0, 90.0))
    assert found.note == "batch 1, learning rate 0.001, 2 run(s)"
    (open_ended,) = cells(with_noise(rows(seeds=2, **BASE)))
    assert measured(open_ended).high == math.inf
    assert measured(cells(rows(**BASE))[0]) is None


def test_right_answers_are_those_at_the_batch_best_on_validation_data():
    made = rows(seeds=1, batches=[1, 2, 4], rates=[1e-3], shift=0, **BASE)
    for row in made:
        batch = row["config"]["batch_size"]
        row["validation"] = [{"loss": {1: 0.5, 2: 1.0, 4: 1.5}[batch]}]
        row |= {"test_loss": {1: 0.6, 2: 0.4, 4: 1.5}[batch], "items_right": [1, 1, 1, batch == 2]}
    (line,) = table(curves_of(made), []).splitlines()[2:]
    assert line.startswith("| all runs | 1 | 0.600 | 75\N{NO-BREAK SPACE}% |")


def test_the_table_says_what_was_found_and_what_to_extend():
    made = with_noise(rows(best=8, shift=0, **BASE), high=90.0) + rows(
        best=0.1, rank=64, rates=[1e-3, 2e-3], batches=[2, 4, 8], **BASE
    )
    text = table(curves_of(made), ["rank"]).splitlines()
    assert text[2].startswith("| rank 8 | 3 | 1.000 | – | 8 (8–8) |") and "| 12 (4–90) | – |" in text[2]
    assert "| ≤ 2 (…–2) |" in text[3] and "at the smallest batch, ε low at 2" in text[3]


def test_a_batch_at_which_every_run_diverged_is_a_bound_in_table_and_figure():
    found = curves_of(without_a_survivor(rows(best=64, flat=9.0, shift=0, **BASE), 128))
    (line,) = table(found, ["rank"]).splitlines()[2:]
    assert "| 64 (64–128) |" in line and "ε high at 128: every run diverged" in line
    with matplotlib.rc_context(LOOK):
        losses = DRAW["curves"](found, ["rank"]).axes[0]
    crosses = [mark for mark in losses.lines if mark.get_marker() == "x"]
    assert [list(mark.get_xdata()) for mark in crosses] == [[128.0]]


def test_cells_are_named_by_what_tells_them_apart():
    (cell,) = cells(
        rows(seeds=1, batches=[1], rates=[1e-3], dials={"label_noise": 0.2}, beta2_batch=None, **BASE)
    )
    assert named(cell, ["adapter", "n_train", "dials.label_noise"]) == "LoRA, N 512, label noise 0.2"
    assert named(cell, ["beta2_batch"]) == "β₂ fixed" and named(cell, []) == "all runs"
    assert named(replace(cell, fields=cell.fields | {"beta2_batch": 16}), ["beta2_batch"]) == "β₂^(B/16)"


@pytest.fixture
def preset():
    text = 'scale = "smoke"\ntitle = "T"\nfigures = ["curves"]\n'
    text += '[defaults]\nbase = "1m"\ntask = "wordmath"\nn_train = 64\n'
    text += "[grid]\nbatch_size = [1, 2, 4]\nlr = [1e-3, 2e-3]"
    return grids.parsed("x", tomllib.loads(text), "x.toml")


def row_of(config, **more):
    row = {"hash": config.hash, "config": config.to_dict(), "status": "done", "test_loss": 1.0 + config.lr}
    return row | {"validation": [{"loss": 1.0 + config.lr}]} | more


def test_a_sweep_half_done_is_drawn_and_says_so(preset, tmp_path):
    made = [row_of(config) for config in preset.configs[:5]] + [
        row_of(preset.configs[0]) | {"hash": "of another"}
    ]
    made += [row_of(preset.configs[5], status="diverged", test_loss=None)]
    written = draw_all(preset, made, tmp_path / "out")
    assert [path.name for path in written] == ["table.md", "curves.png"]
    assert "5 of 6 runs, 1 diverged (censored), 1 seed(s)" in written[0].read_text()
    with pytest.raises(RunError, match="preset x: none of 1 rows is a finished run of it"):
        draw_all(preset, made[5:6], tmp_path)


def test_curves_come_in_the_order_of_the_preset(tmp_path):
    """The reference's rows are merged first, whatever the rank that it has."""
    text = 'scale = "smoke"\ntitle = "T"\nfigures = ["curves"]\nseries = ["rank"]\n'
    text += '[defaults]\nbase = "1m"\ntask = "wordmath"\nn_train = 64\n'
    text += "[grid]\nrank = [4, 16, 64]\nbatch_size = [1, 2, 4]"
    three = grids.parsed("x", tomllib.loads(text), "x.toml")
    made = [row_of(config) for config in three.configs]
    lines = draw_all(three, [*made[3:6], *made[6:], *made[:3]], tmp_path)[0].read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if "| rank" in line] == [
        "| rank 4",
        "| rank 16",
        "| rank 64",
    ]


def test_rows_are_read_from_either_kind_of_file_and_each_run_once(preset, tmp_path):
    text = json.dumps(row_of(preset.configs[0])) + "\n"
    (tmp_path / "a.jsonl").write_text(text * 2)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert len(read([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"])) == 1
    with pytest.raises(RunError, match="c.jsonl: no such file; python -m experiments.sweep"):
        read([tmp_path / "c.jsonl"])


def test_the_command_names_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--preset", "smoke", "--rows", str(tmp_path / "none.jsonl")])
    assert stopped.value.code == 2 and "none.jsonl: no such file" in capsys.readouterr().err
