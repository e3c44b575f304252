"""How often the confidence set of B_noise holds the truth, by simulation of Gaussian examples."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from gns.curvature.conclude import Known, _joined, set_of
from gns.curvature.contractions import Contractions
from gns.curvature.course import joined
from gns.statistics.sets import honest_set


def simulate(rng, *, level=0.95, **cell):
    """The set of a simulated reading, and the truth."""
    contractions, known, truth = simulated(rng, **cell)
    return set_of(contractions, known, level), truth


def simulated(rng, *, d, n, m, probes, parts, b_noise, spectrum, noise_of_h):
    """One reading: g ~ N(G, Σ) with Σ = diag(λ), H = diag(h) seen through m noisy examples; and the truth."""
    lam = np.arange(1, d + 1) ** -float(spectrum)
    h = lam + 0.01
    direction = np.sqrt(lam)
    trace = (h * lam).sum()
    g = direction * np.sqrt(trace / b_noise / (h * direction**2).sum())
    c = (g + np.sqrt(lam) * rng.standard_normal((n, d))) / n
    mean = c.sum(0)
    probe = np.arange(n) % probes
    member = (np.arange(probes)[:, None] == probe).astype(float)
    signs = member * rng.choice([-1.0, 1.0], n)
    u = signs @ (c - mean / n)
    part = member @ c
    h_parts = h * (1 + noise_of_h * rng.standard_normal((parts, d)) / np.sqrt(m / parts))
    contractions = Contractions(
        probes=np.einsum("sd,md,sd->ms", u, h_parts, u)[..., None],
        groups=np.einsum("sd,md,d->ms", part, h_parts, mean)[..., None],
        weighted=(h_parts @ (mean * mean) / n)[:, None],
        mass=np.full(parts, 1 / parts),
        method="exact",
        products=probes + 1,
    )
    known = Known(
        centred=float(((c - mean / n) ** 2).sum()),
        probe_sq=(u**2).sum(1),
        traces=member @ ((c - mean / n) ** 2).sum(1),
        by_probe=member @ (c**2).sum(1),
        share=member.sum(1) / n,
        sum_sq_weights=1 / n,
        n=n,
    )
    return contractions, known, trace / (h * g * g).sum()


def coverage(repeats, seed=0, **cell):
    rng = np.random.default_rng(seed)
    hits, bounded = 0, 0
    for _ in range(repeats):
        found, truth = simulate(rng, **cell)
        hits += found.low <= truth <= found.high
        bounded += np.isfinite(found.high)
    return hits / repeats, bounded / repeats


def of_several(repeats, readings, seed=0, **cell):
    """Coverage of the set of several readings, and how often it has an upper end."""
    rng, hits, bounded = np.random.default_rng(seed), 0, 0
    for _ in range(repeats):
        found = [simulate(rng, **cell) for _ in range(readings)]
        each = [SimpleNamespace(trace_h_sigma=s.x, g_h_g=s.y, moments=s.moments) for s, _ in found]
        low, high, _ = honest_set(joined(each), 0.95)
        hits += low <= found[0][1] <= high
        bounded += np.isfinite(high)
    return hits / repeats, bounded / repeats


CELL = dict(d=64, n=256, m=32, probes=8, parts=4, b_noise=40.0, spectrum=1, noise_of_h=1.0)


@pytest.mark.parametrize("change", [{}, {"b_noise": 400.0}, {"probes": 16, "n": 512}], ids=str)
def test_the_set_covers(change):
    found, _ = coverage(400, **{**CELL, **change})
    assert found > 0.90  # 2.6 standard errors below 93 %


def test_a_set_of_too_low_a_level_is_caught():
    assert coverage(400, **{**CELL, "b_noise": 10.0, "n": 512}, level=0.6)[0] < 0.75


def test_what_h_owes_to_its_examples_is_in_the_set():
    found, known, _ = simulated(np.random.default_rng(3), **{**CELL, "b_noise": 2.0, "n": 512})
    tilt = np.linspace(0.5, 1.5, len(found.mass))[:, None, None]  # one mean, very different parts
    same = replace(found, probes=0 * tilt + found.probes.mean(0))
    a, b = (set_of(each, known, 0.95) for each in (same, replace(same, probes=same.probes * tilt)))
    assert abs(a.x / b.x - 1) < 1e-9 and a.status == b.status == "measured"
    assert b.high - b.low > 1.3 * (a.high - a.low)


def test_spread_is_that_of_independent_sources_added():
    rng = np.random.default_rng(0)
    (a, b), (c, d) = rng.standard_normal((2, 8)), rng.standard_normal((2, 4))
    found = _joined(5.0, 2.0, [(a, b), (c, d)])
    assert abs(found.se_y() ** 2 - (b @ b * 8 / 7 + d @ d * 4 / 3)) < 1e-12
    assert 3 < found.df < 10


FEW = {**CELL, "n": 16, "m": 16}


def test_readings_together_cover_and_reach_further_than_one():
    flat = {**FEW, "spectrum": 0}  # on steeper ones 16 examples give neither an upper end
    alone, together = of_several(300, 1, **flat), of_several(300, 4, **flat)
    assert together[0] > 0.90 and together[1] > alone[1] + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("b_noise", [10.0, 40.0, 400.0])
@pytest.mark.parametrize("spectrum", [0, 1, 2])
def test_readings_together_cover_in_every_cell(b_noise, spectrum):
    assert of_several(1000, 4, **{**FEW, "b_noise": b_noise, "spectrum": spectrum})[0] > 0.91


@pytest.mark.slow
@pytest.mark.parametrize("b_noise", [10.0, 40.0, 400.0])
@pytest.mark.parametrize("spectrum", [0, 1, 2])
@pytest.mark.parametrize(("probes", "n"), [(8, 16), (8, 128), (16, 512)])
def test_the_set_covers_in_every_cell(b_noise, spectrum, probes, n):
    cell = {**CELL, "b_noise": b_noise, "spectrum": spectrum, "probes": probes, "n": n}
    assert coverage(2000, **cell)[0] > 0.89
