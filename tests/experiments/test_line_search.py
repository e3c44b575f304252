"""The arithmetic of the line search, on losses whose law is known."""

import math

import numpy as np
import pytest

from experiments.line_search import best_of, draw, fit
from tests.reference.tolerances import close

SIGNAL, CURVED, B_NOISE = 2.0, 0.5, 12.0  # |G|², GᵀHG, tr(HΣ)/GᵀHG


def rows(noise=0.0, seed=0, sizes=(2, 8, 32, 128), count=40):
    """Changes of the loss −ε|G|² + ½ε²(GᵀHG + tr(HΣ)/B), each batch with its own error."""
    rng = np.random.default_rng(seed)
    out = []
    for size in sizes:
        curved = CURVED * (1 + B_NOISE / size)
        steps = np.array([0.5, 1.0, 1.5]) * SIGNAL / curved
        slope = SIGNAL * (1 + noise * rng.standard_normal((count, 1)) / math.sqrt(size))
        changes = -steps * slope + steps**2 / 2 * curved
        best = best_of(steps, changes)
        out.append(
            {
                "kind": "line search",
                "size": size,
                "steps": steps.tolist(),
                "changes": changes.tolist(),
                "best": best,
            }
        )
    numbers = {"b_noise": 11.0, "low": 8.0, "high": 16.0, "g_h_g": CURVED, "grad_sq_norm": SIGNAL}
    return [*out, {"kind": "hessian", **numbers}]


def test_the_best_step_is_the_parabolas():
    steps = np.array([1.0, 2.0, 3.0])
    close(best_of(steps, (-3 * steps + steps**2 / 2 * 1.5)[None]), 2.0, rtol=1e-12)
    assert math.isnan(best_of(steps, (3 * steps)[None]))  # uphill: there is none


def test_the_law_gives_back_its_noise_scale():
    found = fit(rows(noise=1e-9))
    close(found.b_noise, B_NOISE, rtol=1e-6)
    close(1 / found.intercept, SIGNAL / CURVED, rtol=1e-6)


def test_the_interval_holds_the_noise_scale_about_as_often_as_it_says():
    hits = 0
    for seed in range(100):
        low, high = fit(rows(noise=1.0, seed=seed), draws=200).interval
        hits += low <= B_NOISE <= high
    assert hits >= 86  # 93 % less 2.8 standard errors


def test_one_size_is_no_line():
    with pytest.raises(ValueError, match="at least 2 are needed for a line"):
        fit(rows(sizes=(8,)))


def test_the_figure_shows_both_laws():
    ax = draw(rows(noise=0.5)).axes[0]
    labels = ax.get_legend_handles_labels()[1]
    assert any("law fitted" in text for text in labels) and any("Hessian: B_noise 11" in t for t in labels)
