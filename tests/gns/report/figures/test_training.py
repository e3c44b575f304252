import io
import subprocess
import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from gns.advice import advise
from gns.estimate import MIN_STEPS, estimate
from gns.report import figures
from gns.sums import StepSums
from tests.gns.report.conftest import texts


def drawn(steps: list[StepSums], theme=figures.LIGHT) -> list:
    result, run = estimate(steps), figures.course(steps, 0.95)
    advice = advise(result, batch_size=16)
    return [
        figures.noise_scale(run, result, 16, theme=theme),
        figures.signal_and_noise(steps, run, theme=theme),
        figures.trade_off(advice, theme=theme),
        figures.factors(result, theme=theme),
    ]


@pytest.mark.parametrize("status", ["measured", "lower bound", "not detectable"])
def test_every_figure_renders_with_labels_and_units(runs, status):
    for figure in drawn(runs[status]):
        image = imread(io.BytesIO(figures.png(figure)))
        assert image.shape[1] > 900 and image[..., :3].std() > 0.05  # something is on it
    above, parts, costs, factors = (texts(f) for f in drawn(runs[status]))
    assert "B_simple (examples)" in above and "optimizer step" in above and "batch in use, 16" in above
    assert "detection limit" in above
    assert "tr Σ" in parts and "|G|²" in parts and "(loss² / parameter²)" in parts
    assert "batch size (examples per optimizer step)" in costs and "E / E_min" in costs
    assert "factor A" in factors and "factor B" in factors and "all together *" in factors
    assert "detection limit" in factors


def test_dark_figures_are_light_on_the_dark_card(runs):
    for light, dark in zip(drawn(runs["measured"]), drawn(runs["measured"], figures.DARK), strict=True):
        images = [
            imread(io.BytesIO(figures.png(figure, theme)))[..., :3]
            for figure, theme in ((light, figures.LIGHT), (dark, figures.DARK))
        ]
        corners = [to_hex(image[-1, 0]) for image in images]
        assert corners == [figures.LIGHT.card, figures.DARK.card]
        assert images[0].shape == images[1].shape
        assert images[0].mean() > 0.85 and images[1].mean() < 0.3 and images[1].max() > 0.8


def test_the_detection_limit_grows_with_the_steps(runs):
    steps = runs["measured"]
    run = figures.course(steps, 0.95)
    line = next(
        line
        for line in figures.noise_scale(run, estimate(steps), 16).axes[0].lines
        if "detection" in line.get_label()
    )
    assert list(line.get_ydata()) == [r.detection_limit for _, r in run.so_far]
    assert line.get_ydata()[-1] == estimate(steps).detection_limit > line.get_ydata()[0]


def test_too_little_data_gives_no_figure(runs):
    assert [f is None for f in drawn(runs["collecting"])] == [False, False, True, False]
    assert drawn(runs["empty"]) == [None] * 4
    assert figures.trade_off(None) is None


def test_course_is_the_estimate_at_each_place(runs):
    steps = runs["measured"]
    usable = [s for s in steps if s.usable]
    run = figures.course(steps, 0.95)
    assert run.window == MIN_STEPS
    for step, so_far in run.so_far:
        expected = estimate([s for s in usable if s.step <= step])
        assert (so_far.b_simple, so_far.low, so_far.high) == (expected.b_simple, expected.low, expected.high)
    at, trailing = run.trailing[-1]
    assert at == usable[-1].step and trailing.n_steps == run.window
    assert trailing.b_simple == estimate(usable[-run.window :]).b_simple


def test_long_runs_are_subsampled(runs):
    steps = [replace(runs["measured"][0], step=i, rows=None, layout=None) for i in range(6000)]
    steps = [replace(s, mean_sq_norm=s.mean_sq_norm * (1 + 0.1 * (s.step % 7))) for s in steps]
    run = figures.course(steps, 0.95)
    assert len(run.so_far) == figures.EVALUATIONS
    dots = figures.signal_and_noise(steps, run).axes[0].lines[0]
    assert len(dots.get_xdata()) <= figures.DOTS


def test_unbounded_sets_get_arrows_at_the_top_and_bounded_ones_none(runs):
    for status, expected in (("measured", False), ("not detectable", True)):
        figure = drawn(runs[status])[0]
        top = figure.axes[0].get_ylim()[1]
        arrows = [line for line in figure.axes[0].lines if line.get_marker() == "^" and len(line.get_xdata())]
        assert bool(arrows) is expected, status
        assert all(np.all(line.get_ydata() == top) for line in arrows)
        assert ("no upper end" in texts(figure)) is expected


def test_negative_signal_is_drawn_on_an_axis_that_shows_it(runs):
    _, parts, *_ = drawn(runs["not detectable"])
    below = parts.axes[1]
    assert below.get_yscale() == "symlog"
    values = below.lines[0].get_ydata()
    assert min(values) < 0 and below.get_ylim()[0] <= min(values)


def test_loss_scale_is_named_in_the_unit(runs):
    steps = [replace(s, loss_scaled=True) for s in runs["measured"]]
    assert "unknown loss scale" in texts(figures.signal_and_noise(steps, figures.course(steps, 0.95)))


def test_nothing_of_the_users_matplotlib_changes(runs):
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.usetex": True}):
        before = matplotlib.rcParams.copy()
        figure = drawn(runs["measured"])[0]
        figures.png(figure)
        assert matplotlib.rcParams.copy() == before
        assert figure.axes[0].get_facecolor() == (1, 1, 1, 1)


def test_pyplot_and_torch_stay_out_of_it(tmp_path):
    code = f"""
import sys
from gns.report import write_report
from gns.sums import StepSums
steps = [StepSums(step=i, n_examples=4, mean_sq_norm=2 + i % 3, sq_norm_of_mean=1 + i % 2) for i in range(30)]
write_report({str(tmp_path)!r}, steps)
assert "matplotlib.pyplot" not in sys.modules, "pyplot was imported"
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
