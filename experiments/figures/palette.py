"""Colours and look of every figure of the experiments.

Colours are Okabe and Ito's, which colour-blind readers tell apart; lines differ in dash or marker as well.
"""

from __future__ import annotations

from typing import Any

INK, GREY, BLUE, SKY = "#222222", "#767676", "#0072B2", "#56B4E9"
VERMILION, ORANGE, GREEN, PURPLE = "#D55E00", "#E69F00", "#009E73", "#CC79A7"
LOOK: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8E8E8",
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
