"""The figure of B_noise beside B_simple."""

from dataclasses import replace

import numpy as np
import pytest

from gns.report.figures import course, curvature
from gns.report.figures.look import png
from gns.sums import StepSums
from tests.gns.curvature.test_course import readings


def steps(n, seed=0):
    rng = np.random.default_rng(seed)
    return [StepSums(k, 16, 17.0 + rng.normal(), 1.9 + 0.1 * rng.normal()) for k in range(n)]


def resolved(n, **changed):
    """Readings that have a value and both ends, but for the last, which has no upper end."""
    found = readings(n)
    how = [{"b_noise": 20.0 + k, "low": 5.0, "high": 90.0 if k < n - 1 else np.inf} for k in range(n)]
    return [
        replace(r, estimate=replace(r.estimate, **each, **changed))
        for r, each in zip(found, how, strict=True)
    ]


def drawn(of):
    figure = curvature(of, course(steps(500), 0.95), 0.95)
    png(figure)  # the layout must work out
    return figure, [text.get_text() for text in figure.legends[0].get_texts()]


def bars(ax):
    """Lower and upper ends of all bars."""
    return [segment[:, 1].tolist() for c in ax.collections if hasattr(c, "get_segments")
            for segment in c.get_segments()]  # fmt: skip


def test_it_shows_both_bands_their_ratio_and_the_cost():
    figure, labels = drawn(readings(10))
    above, below = figure.axes
    assert [label.split(",")[0] for label in labels] == ["B_simple", "B_noise", "B_noise", "goes on"]
    assert len(above.collections) >= 2  # the bands
    said = above.get_title(loc="left").splitlines()
    assert said[0].startswith("B_noise / B_simple 1") and said[0].endswith("by all 10 readings")
    assert said[1] == "10 readings of about 10 steps each: 20 % more time"
    ratio = below.lines[0].get_ydata()
    assert len(ratio) == 8 and np.isfinite(ratio).all() and below.get_ylabel() == "B_noise / B_simple"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_readings_are_drawn_one_by_one_and_together_from_the_third(n):
    figure, labels = drawn(resolved(n))
    above, below = figure.axes
    top = above.get_ylim()[1]
    assert bars(above)[: n - 1] == [[5.0, 90.0]] * (n - 1) and bars(above)[n - 1] == [5.0, top]
    assert len(bars(above)) == n + (n == 3)
    assert ("B_noise, all readings so far (95 %)" in labels) == (n == 3)
    arrows = [line for line in above.lines if line.get_marker() == "^" and len(line.get_xdata())]
    assert len(arrows) == 1 and arrows[0].get_ydata().tolist() == [top]
    cost = "1 reading of about 9 steps each: 900 % more time" if n == 1 else f"{n} readings of about"
    assert above.get_title(loc="left").splitlines()[-1].startswith(cost)
    x, simple = above.lines[0].get_data()
    at = np.interp([50 * k for k in range(n)], x, simple)
    assert np.allclose([low for low, _ in bars(below)[-n:]], 5.0 / at)


def test_an_indefinite_reading_is_marked_and_has_no_bar():
    figure, labels = drawn(resolved(2, status="indefinite"))
    assert len(figure.axes) == 1 and not bars(figure.axes[0])
    assert "reading is indefinite" in labels and "B_noise, one reading (95 %)" not in labels


def test_without_a_resolved_ratio_there_is_one_panel():
    figure, _ = drawn(readings(10, sign=-1.0))
    assert len(figure.axes) == 1


def test_too_little_is_not_drawn():
    assert curvature([], course(steps(500), 0.95), 0.95) is None
    assert curvature(readings(9), course([], 0.95), 0.95) is None
