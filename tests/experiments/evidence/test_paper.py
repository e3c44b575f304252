"""The paper's figures are drawn from rows of their presets, with critical batch sizes of the same data."""

import math
from types import SimpleNamespace

import pytest

from experiments import grids
from experiments.analysis.cells import cells
from experiments.analysis.curves import Estimated
from experiments.evidence.page import WHOLE, page
from experiments.evidence.paper import FIGURES, critical, figures
from experiments.evidence.readout import read_out
from tests.experiments.evidence.test_tuned import rows as whole


def rows(preset, keep=lambda config: True):
    """All runs of a preset, their loss a bowl about batch 8."""
    made = []
    for config in grids.load(preset).configs:
        if keep(config):
            loss = 1 + 0.01 * math.log2(config.batch_size / 8) ** 2 + 0.01 * config.seed
            loss += 0.02 * math.log2(config.lr / (1e-3 * math.sqrt(config.batch_size))) ** 2
            made.append(
                {"hash": config.hash, "status": "done", "config": config.to_dict(), "test_loss": loss}
                | {"validation": [{"loss": loss}], "gns": None, "commit": "abc"}
            )
    return made


def reading(value):
    return SimpleNamespace(doubled=Estimated(value, value / 2, value * 2))


def test_every_figure_of_the_paper_has_a_preset():
    said = {grids.load(name).paper for name in FIGURES}
    assert said >= {f"Fig. {i}" for i in range(1, 6)}
    for name, title in FIGURES.items():
        assert grids.load(name).paper in ("", title.partition(":")[0])


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("laptop-rank", "Batch size and rank (Fig. 2: rank)"),
        ("laptop-lr", "Best learning rate over batch size (Fig. 5: best learning rate)"),
        ("laptop-beta2", "The optimizer's memory"),  # of no figure of the paper
    ],
)
def test_a_sweep_with_rows_is_drawn(name, called, tmp_path):
    made = figures(rows(name), {"rank 4": {1_024: reading(10.0)}})
    assert name in made  # the rates of one rank are a sweep of their own too
    figure, title, numbers = made[name]
    assert numbers.startswith("| cell | seeds | best test loss |") and numbers.count("\n") >= 2
    assert title == called
    texts = [text.get_text() for text in figure.texts]
    preset = grids.load(name)
    assert any(f"{len(preset.configs)} of {len(preset.configs)} runs" in text for text in texts)
    labels = [handle.get_text() for axes in figure.axes if (box := axes.get_legend()) for handle in box.texts]
    assert ("B_crit (constant rate)" in labels) == (name == "laptop-rank")
    figure.savefig(tmp_path / "a.png")


def test_with_answers_every_panel_has_room_and_the_title_fits():
    made = rows("laptop-data")
    noise = {"b_simple": 20.0, "low": 10.0, "high": 40.0, "status": "measured"}
    for row in made:
        row |= {"accuracy": 0.5, "items_right": [0, 1]}
        if row["config"]["gns_every"]:  # four entries in the legend of places
            row["gns"] = {"metric": "euclidean", "progress_weighted": {"joint": noise, "B": noise}}
    figure, _, numbers = figures(made, {"reference": {1_024: reading(10.0)}})["laptop-data"]
    assert numbers.count(" | 50\N{NO-BREAK SPACE}% | ") == 3
    figure.canvas.draw()
    loss, accuracy, places = (axes.get_position() for axes in figure.axes)
    assert loss.height > 0.3 and places.height > 0.15 and accuracy.height > 0.7
    assert min(loss.width, accuracy.width) > 0.35
    legend = figure.axes[2].get_legend().get_window_extent()
    assert legend.x1 <= figure.axes[2].get_window_extent().x1  # it does not reach into the panel beside it
    assert figure.axes[1].get_legend() is not None and figure.axes[0].get_legend() is None


def test_the_page_has_the_numbers_beside_each_of_these_figures():
    made = rows("laptop-rank")
    text = page(read_out(made, []), figures(made, {}))
    title = "Batch size and rank (Fig. 2: rank)"
    below = text.partition(f"## Whole runs, by batch size\n\n{WHOLE}\n\n### {title}\n\n")[2]
    assert below.startswith(f"![{title}](laptop-rank.png)\n\n| cell | seeds |")
    assert [line.split(" | ")[0] for line in below.splitlines()[4:7]] == [
        "| rank 4",
        "| rank 16",
        "| rank 64",
    ]


def test_titles_are_as_wide_as_the_figure(tmp_path):
    figure = figures(rows("laptop-lr"), {})["laptop-lr"].figure
    figure.canvas.draw()
    assert figure._suptitle.get_window_extent().x1 <= figure.bbox.x1


def test_a_sweep_of_one_curve_is_not_drawn_and_half_of_one_says_so():
    assert figures(rows("laptop-rank", lambda c: c.rank == 4), {}) == {}
    made = figures(rows("laptop-rank", lambda c: c.rank != 64), {})
    of = len(grids.load("laptop-rank").configs)
    assert any(f" of {of} runs, 4 seed(s)" in text.get_text() for text in made["laptop-rank"][0].texts)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, 10.0),
        ({"rank": 4}, 20.0),
        ({"schedule": "constant"}, 10.0),
        ({"n_train": 512}, None),  # not read there
        ({"n_train": 512, "dials": {"merged": 2}}, 30.0),  # 1,024 examples in 512 rows
        ({"rank": 64}, None),
        ({"rank": 5}, None),
        ({"protocol": "steps", "epochs": None}, None),
        ({"beta2_batch": 16}, None),  # another optimizer's memory was not measured at a constant rate
    ],
)
def test_a_critical_batch_is_that_of_the_same_configuration_and_data(fields, wanted):
    found = {"reference": {1_024: reading(10.0)}, "rank 4": {1_024: reading(20.0)}}
    found["merged"] = {1_024: reading(30.0)}
    (cell,) = cells(whole(**fields))
    place = critical(cell, found)
    assert (place and place.value) == wanted
