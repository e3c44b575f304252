"""Figures of runs. Every one takes steps or results and gives a `Figure`, or None with too little to draw.

Each says its units on its axes and shows intervals, not points alone; each is drawn for light or dark pages.
"""

from gns.report.figures.costs import learning_rates, trade_off
from gns.report.figures.curvature import curvature
from gns.report.figures.look import DARK, LIGHT, Theme, png
from gns.report.figures.parts import depth, factors, heat_map
from gns.report.figures.runs import compared
from gns.report.figures.training import DOTS, EVALUATIONS, Course, course, noise_scale, signal_and_noise

__all__ = [
    "DARK",
    "DOTS",
    "EVALUATIONS",
    "LIGHT",
    "Course",
    "Theme",
    "compared",
    "course",
    "curvature",
    "depth",
    "factors",
    "heat_map",
    "learning_rates",
    "noise_scale",
    "png",
    "signal_and_noise",
    "trade_off",
]
