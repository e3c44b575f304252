"""The frozen probe's cells: the vectorised sets and sign flips against `pairs` of `gns`, probe by probe."""

import math
from dataclasses import replace

import numpy as np
import pytest

from experiments.coverage import frozen as study
from experiments.coverage.frozen import FrozenCell, SignFlips, cells, jackknifed, main, measure, scored
from experiments.coverage.frozen_page import covered, limit, limits, report
from experiments.coverage.noise import DIMENSIONS, DIRECTIONS, LAWS, SPECTRA, simulate_pooled
from experiments.coverage.page import share, usable
from experiments.coverage.sets import METHODS, hull_of, statuses
from experiments.coverage.study import LEVELS, RESULTS
from experiments.rows import complete, read
from gns.statistics.pairs import Batches, jackknife
from gns.statistics.pairspread import score
from gns.statistics.sets import honest_set, status_of
from tests.reference.tolerances import close


def batches_of(noise, r, b_simple, direction):
    """The record that the probe would keep of simulated probe r."""
    k, g2, p = noise.mean_sq.shape[1], 1 / b_simple, noise.along[direction][r]
    gram = g2 + math.sqrt(g2) * (p[:, None] + p[None, :]) + noise.gram[r]
    norms = (g2 + 2 * math.sqrt(g2) * p + noise.mean_sq[r]) / noise.n  # Σ‖cᵢ‖² = m/n
    return Batches(gram, np.full(k, noise.n), norms, np.full(k, 1 / noise.n), np.full(k, noise.n))


MOMENTS = {"jackknife": jackknife, "score": score}


def sets_of(noise, b_simple, direction, method):
    plain = jackknifed(noise, b_simple, direction)
    return hull_of(plain if method == "jackknife" else scored(plain, noise), LEVELS)


@pytest.mark.parametrize("method", MOMENTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("b_simple", [1, 100, 20_000])
@pytest.mark.parametrize("law", LAWS)
def test_the_sets_are_those_of_the_package(law, b_simple, direction, method):
    noise = simulate_pooled(law, "1/j^2", 4, 6, 20, seed=5)
    found = sets_of(noise, b_simple, direction, method)
    status = statuses(found, 20)
    for r in range(6):
        moments = MOMENTS[method](batches_of(noise, r, b_simple, direction))
        for i, level in enumerate(LEVELS):
            low, high, empty = honest_set(moments, level)
            assert status[i, r] == status_of(moments, high, empty)
            for mine, theirs in ((found.low[i, r], low), (found.high[i, r], high)):
                if math.isinf(theirs):
                    assert mine == theirs
                else:
                    close(mine, theirs, rtol=1e-6, what=f"end {r} {level}")


def test_pooled_batches_are_one_large_batch():
    """|G|² and tr Σ over all pairs of examples are what one step of all examples would give."""
    noise, b, direction = simulate_pooled("t5", "1/j", 4, 3, 6, seed=2), 30.0, "top"
    x, y = noise.whole(b, direction)
    m, _ = noise.steps.recorded(b, direction)
    for r in range(3):
        batches = batches_of(noise, r, b, direction)
        q, total = batches.gram.mean(), 4 * 6  # ‖mean of the batch gradients‖²
        expected = (total * q - m[r].mean()) / (total - 1)
        close([y[r], x[r]], [expected, total * (m[r].mean() - q) / (total - 1)], rtol=1e-9)


def test_products_of_batches_are_those_of_their_examples(monkeypatch):
    """Planted examples: Gram matrix, squared norms and the direction, by hand."""
    z = np.random.default_rng(1).standard_normal((4, 3, DIMENSIONS)).astype(np.float32)
    monkeypatch.setitem(LAWS, "planted", lambda rng, shape: z.copy())
    noise = simulate_pooled("planted", "1/j", 3, 2, 2, seed=0)
    e = np.sqrt(SPECTRA["1/j"]) * z.astype(float)
    mean = e.mean(1).reshape(2, 2, DIMENSIONS)
    close(noise.gram, np.einsum("rkd,rld->rkl", mean, mean), rtol=1e-5)
    close(noise.mean_sq, (e**2).sum(2).mean(1).reshape(2, 2), rtol=1e-5)
    close(noise.along["even"], mean @ DIRECTIONS["even"], rtol=1e-4)


@pytest.mark.parametrize("b_simple", [20, 2_000])
def test_sign_flips_are_counted_as_the_definition_says(b_simple):
    noise = simulate_pooled("lognormal", "1/j", 4, 5, 9, seed=3)
    flips = SignFlips(noise, patterns=60, seed=1)
    found = flips.p_values(b_simple, "even")
    for r in range(5):
        gram = batches_of(noise, r, b_simple, "even").gram
        np.fill_diagonal(gram, 0)
        values = [float(s @ gram @ s) for s in flips.signs]
        assert found[r] == pytest.approx(sum(v >= values[0] - 1e-9 * abs(values[0]) for v in values) / 61)
    assert set(flips.signs[0]) == {1.0}


def test_the_sign_flip_test_holds_its_size_on_a_steep_spectrum():
    """No gradient to speak of: 5 % of 600, within 5 standard errors; the isotropic F test has 25 % there."""
    noise = simulate_pooled("gaussian", "1/j^2", 4, 600, 20, seed=4)
    share = (SignFlips(noise, patterns=199).p_values(1e12, "even") <= 0.05).mean()
    assert abs(share - 0.05) < 5 * math.sqrt(0.05 * 0.95 / 600)


def test_a_cell_counts_both_methods_on_the_same_noise():
    cell = FrozenCell("gaussian", "1/j", "even", 50, repeats=30)
    noise = simulate_pooled("gaussian", "1/j", 16, 30, 50, seed=6)
    found = measure(cell, noise, SignFlips(noise, 99))
    steps = METHODS["toolkit"](*noise.steps.unbiased(50, "even"), LEVELS)
    pairs = [(name, sets_of(noise, 50, "even", name)) for name in MOMENTS]
    for name, sets in (*pairs, ("steps", steps)):
        assert found["methods"][name]["covered"] == ((sets.low <= 50) & (sets.high >= 50)).sum(1).tolist()
        assert found["methods"][name]["bounded"] == np.isfinite(sets.high).sum(1).tolist()
    assert sum(found["statuses"][0].values()) == 30
    assert found["flips"] == 30  # far within reach


def test_every_cell_has_its_own_hash():
    every = cells(2000)
    assert len(every) == len({cell.hash for cell in every}) == 3 * 3 * 2 * 10
    assert replace(every[0], seed=1).hash != every[0].hash


def test_reach_is_where_half_the_runs_see_the_gradient():
    def row(b, seen):
        return {"config": {"b_simple": b, "repeats": 100}, "flips": seen}

    rows = [row(10, 100), row(100, 75), row(1_000, 25), row(10_000, 5)]
    assert limit(rows, "flips") == pytest.approx(math.sqrt(100 * 1_000))
    assert math.isnan(limit(rows[:2], "flips"))


def test_rows_resume_and_the_report_follows_from_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "LAWS", ("gaussian",))
    monkeypatch.setattr(study, "SPECTRA", ("1/j",))
    monkeypatch.setattr(study, "TRUE_B", (5, 20_000))
    monkeypatch.setattr(study, "FLIPS", 19)
    main(["--repeats", "5", "--out", str(tmp_path)])
    rows = read(tmp_path / study.ROWS)
    assert len(rows) == 4
    assert complete(cells(5), tmp_path / study.ROWS, lambda todo, bar: iter([1 / 0 for _ in todo])) == rows
    written = {path.name: path.read_bytes() for path in report(rows, tmp_path / "again")}
    assert set(written) == {"FROZEN.md", "frozen_coverage.png", "frozen_reach.png"}
    assert all((tmp_path / name).read_bytes() == content for name, content in written.items())
    assert "| Gaussian | 1/j | 175 |" in limits(rows)
    assert "1,280" in limits(rows)


def test_the_committed_study_shows_which_set_holds():
    """The rows in the repository: whole, and 93 % or more for the score set in every Gaussian and t₅ cell."""
    rows = usable(read(RESULTS / study.ROWS))
    assert len(rows) == 180
    assert rows[0]["config"]["repeats"] >= 2000
    light = [row for row in rows if row["config"]["law"] != "lognormal"]
    assert min(share(row, "score") for row in light) > 0.93
    assert min(share(row, "jackknife") for row in light) < 0.90
    assert covered(rows) in (RESULTS / "FROZEN.md").read_text(encoding="utf-8")
