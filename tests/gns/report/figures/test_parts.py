import math

import numpy as np
import pytest

from gns.estimate import Estimate, estimate
from gns.geometry import by_layer, by_module
from gns.report import figures
from gns.report.figures.parts import AT_LEAST, UNKNOWN
from tests.gns.report.conftest import draw, texts

ROWS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")


def known(b: float, high: float | None = None, status: str = "measured") -> Estimate:
    return Estimate(b, b / 2, 2 * b if high is None else high, 0.95, status, 1.0, 1 / b, 900, 50, 800)


def module(b: float, **factors: Estimate) -> Estimate:
    return Estimate(b, b / 2, 2 * b, 0.95, "measured", 1.0, 1 / b, 900, 50, 800, groups=factors)


@pytest.fixture
def modules() -> dict[str, Estimate]:
    """Four blocks of three projections, each factor with a value of its own; one bound, one unknown."""
    found = {
        f"model.layers.{i}.{name}": module(50, A=known(10 * (i + 1) + j), B=known(100 * (i + 1) + j))
        for i in range(4)
        for j, name in enumerate(ROWS)
    }
    bound = known(math.nan, high=math.inf, status="lower bound")
    nothing = known(40, status="collecting")
    found["model.layers.1.mlp.up_proj"] = module(50, A=Estimate(**{**vars(bound), "low": 77.0}), B=nothing)
    return found


def test_every_module_has_its_cell_in_the_panel_of_each_factor(modules):
    figure = figures.heat_map(modules)
    panels = figure.axes[:2]
    assert [ax.get_title(loc="left") for ax in panels] == ["factor A", "factor B"]
    for ax, scale in zip(panels, (10, 100), strict=True):
        grid = ax.collections[0].get_array()
        assert grid.shape == (3, 4)
        for i in range(4):
            for j in range(3):
                if (i, j) != (1, 2):
                    assert grid[j, i] == scale * (i + 1) + j
        assert [t.get_text() for t in ax.get_yticklabels()] == ["q_proj", "v_proj", "up_proj"]
    assert "block, in order of depth" in texts(figure) and "B_simple (examples)" in texts(figure)


def test_a_bound_is_hatched_in_the_colour_of_its_lower_end_and_nothing_is_dotted(modules):
    figure = figures.heat_map(modules)
    factor_a, factor_b = figure.axes[:2]
    assert factor_a.collections[0].get_array()[2, 1] == 77.0
    assert np.ma.is_masked(factor_b.collections[0].get_array()[2, 1])
    assert [p.get_hatch() for p in factor_a.patches] == [AT_LEAST]
    assert [p.get_hatch() for p in factor_b.patches] == [UNKNOWN]
    said = texts(figure)
    assert "≥ 77" in said and "no upper end" in said and "nothing known yet" in said


def test_one_scale_of_colour_for_all_panels_and_only_the_hatchings_there_are(modules):
    del modules["model.layers.1.mlp.up_proj"]
    figure = figures.heat_map(modules)
    assert len({(ax.collections[0].norm.vmin, ax.collections[0].norm.vmax) for ax in figure.axes[:2]}) == 1
    assert not figure.legends
    assert np.ma.is_masked(figure.axes[0].collections[0].get_array()[2, 1])  # left empty


def test_full_weights_have_one_panel(modules):
    figure = figures.heat_map({path: module(7) for path in modules})
    assert figure.axes[0].get_title(loc="left") == "every module" and len(figure.axes) == 2


def test_many_blocks_have_no_numbers_in_their_cells_and_readable_ticks():
    many = {f"h.{i}.{m}": module(2.0 + i, A=known(2.0 + i), B=known(90)) for i in range(48) for m in ROWS}
    ax = figures.heat_map(many).axes[0]
    assert not ax.texts and len(ax.get_xticks()) <= 16


def test_stacks_are_told_apart():
    both = {f"{s}.block.{i}.q": module(5.0 + i) for s in ("encoder", "decoder") for i in range(2)}
    said = texts(figures.heat_map(both))
    assert "encoder.block 0" in said and "decoder.block 1" in said


def test_no_map_without_depth_or_values(modules):
    assert figures.heat_map({}) is None
    assert figures.heat_map({"head": module(5), "embed": module(6)}) is None
    assert figures.heat_map({path: module(5, A=known(4, status="collecting")) for path in modules}) is None


def test_depth_shows_each_factor_of_each_block_with_its_interval():
    layers = {f"model.layers.{i}": module(50, A=known(10 + i), B=known(100 + i)) for i in range(3)}
    layers["score"] = module(30, A=known(5))
    layers["model.layers.1"] = module(50, A=known(20, high=math.inf, status="lower bound"), B=known(101))
    figure = figures.depth(layers)
    ax = figure.axes[0]
    values = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    assert values["factor A"] == [10, 20, 12, 5] and values["factor B"] == [100, 101, 102]
    spans = [tuple(line.get_ydata()) for line in ax.lines if len(line.get_xdata()) == 2]
    assert (5, 20) in spans and (50, 200) in spans
    top = ax.get_ylim()[1]
    assert (10, top) in spans and [list(line.get_ydata()) for line in ax.lines if line.get_marker() == "^"][
        0
    ] == [top]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1", "2", "score"]
    assert "95 % interval" in ax.get_ylabel() and "no upper end" in texts(figure)


def test_one_block_or_no_interval_gives_no_depth():
    assert figures.depth({"model.layers.0": module(5)}) is None
    assert figures.depth({}) is None


def test_both_draw_what_the_steps_hold():
    steps = draw(40, 16, 1 / 10)
    modules, layers = by_module(steps), by_layer(steps)
    figure = figures.heat_map(modules)
    grid = figure.axes[0].collections[0].get_array()
    assert grid.shape == (2, 2)
    assert grid[0, 1] == modules["layers.1.self_attn.q_proj"].groups["A"].b_simple
    line = next(line for line in figures.depth(layers).axes[0].lines if line.get_label() == "factor B")
    assert list(line.get_ydata()) == [r.groups["B"].b_simple for r in layers.values()]


def test_the_joint_number_is_marked_as_a_convention_only_beside_factors():
    steps = draw(40, 16, 1 / 10)
    assert "all together *" in texts(figures.factors(estimate(steps)))
    plain = estimate([type(s)(s.step, s.n_examples, s.mean_sq_norm, s.sq_norm_of_mean) for s in steps])
    assert "all together *" not in texts(figures.factors(plain))
