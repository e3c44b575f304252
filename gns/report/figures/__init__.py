"""Figures of a run. Every one takes steps or results and gives a `Figure`, or None with too little to draw.

Each says its units on its axes and shows intervals, not points alone; each is drawn for light or dark pages.
"""

from gns.report.figures.costs import trade_off
from gns.report.figures.course import DOTS, EVALUATIONS, Course, course, noise_scale, signal_and_noise
from gns.report.figures.look import DARK, LIGHT, Theme, png
from gns.report.figures.parts import factors

__all__ = [
    "DARK",
    "DOTS",
    "EVALUATIONS",
    "LIGHT",
    "Course",
    "Theme",
    "course",
    "factors",
    "noise_scale",
    "png",
    "signal_and_noise",
    "trade_off",
]
