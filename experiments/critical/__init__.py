"""Measured critical batch size, from rows of runs to a target loss and from branched runs.

Three definitions, which differ (FACTS §4 of the project, and the sources named):

    overhead(found, 1.0)   twice the examples of the smallest batch (McCandlish et al. 2018, arXiv:1812.06162)
    overhead(found, 0.2)   20 % more (Zhang et al. 2025, arXiv:2410.21676)
    branched(rows)         no loss above +0.01 nat after a branch at a larger batch with a rescaled learning
                           rate (Merrill et al. 2025, arXiv:2505.23971); `experiments.branches` makes the rows

E(B), the examples to the target at the best learning rate, is read by a monotone interpolation: isotonic
regression of log E, then PCHIP in log B. The hyperbola E = E_min (1 + B/B_crit) is a diagnostic beside it.

A run that never reached the target is censored: its E is at least the examples it saw. One that diverged
would never have reached it: E = ∞ at that learning rate. An interval spans all that this leaves open.
"""

from experiments.critical.branching import branched
from experiments.critical.examples import Efficiency, efficiency, target_runs
from experiments.critical.law import Hyperbola, hyperbola
from experiments.critical.rise import open_above, overhead

__all__ = [
    "Efficiency",
    "Hyperbola",
    "branched",
    "efficiency",
    "hyperbola",
    "open_above",
    "overhead",
    "target_runs",
]
