import io
import subprocess
import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from gns.advice import advise
from gns.estimate import MIN_STEPS, estimate
from gns.report import figures
from gns.sums import StepSums


def texts(figure) -> str:
    found = [
        t.get_text() for ax in figure.axes for t in (ax.xaxis.label, ax.yaxis.label, ax.title, *ax.texts)
    ]
    found += [t.get_text() for ax in figure.axes for t in ax.get_yticklabels()]
    found += [ax.get_title(loc="left") for ax in figure.axes]
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    return "\n".join(found + [t.get_text() for legend in legends for t in legend.get_texts()])


def drawn(steps: list[StepSums]) -> list:
    result, run = estimate(steps), figures.course(steps, 0.95)
    advice = advise(result, batch_size=16)
    return [
        figures.noise_scale(run, result, 16),
        figures.signal_and_noise(steps, run),
        figures.trade_off(advice),
        figures.factors(result),
    ]


@pytest.mark.parametrize("status", ["measured", "lower bound", "not detectable"])
def test_every_figure_renders_with_labels_and_units(runs, status):
    for figure in drawn(runs[status]):
        image = imread(io.BytesIO(figures.png(figure)))
        assert image.shape[1] > 1000 and image[..., :3].std() > 0.05  # something is on it
    above, parts, costs, factors = (texts(f) for f in drawn(runs[status]))
    assert "B_simple (examples)" in above and "optimizer step" in above and "batch in use, 16" in above
    assert "tr Σ" in parts and "|G|²" in parts and "(loss² / parameter²)" in parts
    assert "batch size (examples per optimizer step)" in costs and "E / E_min" in costs
    assert "factor A" in factors and "factor B" in factors and "all together" in factors


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


def test_current_batch_and_paying_range_are_marked(runs):
    result = estimate(runs["measured"])
    advice = advise(result, batch_size=16)
    ax = figures.trade_off(advice).axes[0]
    assert any(list(line.get_xdata()) == [16, 16] for line in ax.lines)
    span = ax.patches[-1]
    near = advice.ranges[-1]
    assert span.get_x() == pytest.approx(near.low)
    assert span.get_x() + span.get_width() == pytest.approx(near.high)


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
