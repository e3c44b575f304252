"""The figure of B_noise beside B_simple."""

import numpy as np

from gns.report.figures import course, curvature
from gns.sums import StepSums
from tests.gns.test_curvature_course import readings


def steps(n, seed=0):
    rng = np.random.default_rng(seed)
    return [StepSums(k, 16, 17.0 + rng.normal(), 1.9 + 0.1 * rng.normal()) for k in range(n)]


def test_it_shows_both_bands_their_ratio_and_the_cost():
    figure = curvature(readings(10), course(steps(500), 0.95), 0.95)
    above, below = figure.axes
    labels = above.get_legend_handles_labels()[1]
    assert len(labels) == 2 and "B_simple" in labels[0] and "B_noise" in labels[1]
    assert len(above.collections) >= 2  # the bands
    assert above.get_title(loc="left") == "10 readings of about 10 steps each: 20 % more time"
    ratio = below.lines[0].get_ydata()
    assert len(ratio) == 8 and np.isfinite(ratio).all() and below.get_ylabel() == "B_noise / B_simple"


def test_without_a_resolved_ratio_there_is_one_panel():
    figure = curvature(readings(10, sign=-1.0), course(steps(500), 0.95), 0.95)
    assert len(figure.axes) == 1


def test_too_little_is_not_drawn():
    assert curvature(readings(3), course(steps(500), 0.95), 0.95) is None
    assert curvature(readings(9), course([], 0.95), 0.95) is None
