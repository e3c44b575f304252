"""The share of the largest examples against all examples; warnings that light tails must not raise."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gns.estimate import estimate, summarise
from gns.statistics import tails
from gns.statistics.tails import CAP, MIN_EXAMPLES, effective_rank, kurtosis, light_share, tail_share
from gns.sums import StepSums
from tests.reference import estimators as slow
from tests.reference.tolerances import close

SPECTRA = {"flat": np.ones(64), "1/j": 1 / np.arange(1, 65), "j^-2": 1 / np.arange(1, 33) ** 2.0}


def gradients(rng, kind: str, spectrum: np.ndarray, k: int, n: int, b: float = 100.0) -> np.ndarray:
    """[k, n, d] per-example gradients: Gaussian, or with a scale of its own for each example."""
    scale_sq = {
        "gaussian": lambda: np.ones((k, n)),
        "t5": lambda: 3 / rng.chisquare(5, (k, n)),
        "lognormal": lambda: np.exp(2 * rng.standard_normal((k, n)) - 2),
    }[kind]()
    noise = rng.standard_normal((k, n, len(spectrum))) * np.sqrt(spectrum)
    return noise * np.sqrt(scale_sq)[..., None] + math.sqrt(spectrum.sum() / b / len(spectrum))


def records(g: np.ndarray) -> list[StepSums]:
    """The records of [k, n, d] gradients, with the largest tenth of the norms of each step."""
    n = g.shape[1]
    sq = (g**2).sum(2)
    return [
        StepSums(
            i,
            n,
            float(each.mean()),
            float((g[i].mean(0) ** 2).sum()),
            mean_fourth=float((each**2).mean()),
            top_sq_norms=tuple(sorted(each.tolist(), reverse=True)[: math.ceil(n / 10)]),
        )
        for i, each in enumerate(sq)
    ]


@pytest.mark.parametrize("kind", ["gaussian", "t5", "lognormal"])
def test_the_share_is_that_of_all_examples_where_the_steps_are_alike(kind):
    g = gradients(np.random.default_rng(1), kind, SPECTRA["1/j"], 50, 16)
    close(tail_share(records(g)), slow.top_share((g**2).sum(2)), rtol=1e-12)


def test_the_share_is_a_lower_bound_where_one_step_is_the_loudest():
    g = gradients(np.random.default_rng(1), "gaussian", SPECTRA["1/j"], 50, 16)
    g[3] *= 10
    found, truth = tail_share(records(g)), slow.top_share((g**2).sum(2))
    assert found is not None
    assert 0.3 * truth < found < truth


def test_the_share_is_unknown_without_norms_or_examples():
    steps = records(gradients(np.random.default_rng(1), "gaussian", SPECTRA["1/j"], 20, 16))
    known = MIN_EXAMPLES // 16 + 1
    assert tail_share(steps[: known - 1]) is None and tail_share(steps[:known]) is not None
    assert tail_share([replace(s, top_sq_norms=()) for s in steps]) is None
    assert tail_share([replace(s, mean_sq_norm=0.0, top_sq_norms=(0.0, 0.0)) for s in steps]) is None
    part = [replace(s, top_sq_norms=()) if s.step % 2 else s for s in steps]
    assert tail_share(part) == tail_share(steps[::2]), "steps without norms count in neither sum"
    assert tail_share([*steps, replace(steps[0], reason="no")]) == tail_share(steps)


def test_kurtosis_is_that_of_all_examples():
    g = gradients(np.random.default_rng(2), "t5", SPECTRA["1/j"], 40, 16)
    sq = (g**2).sum(2)
    close(kurtosis(records(g)), (sq**2).mean() / sq.mean() ** 2, rtol=1e-12)
    equal = records(np.ones((3, 16, 4)))
    assert kurtosis(equal) == pytest.approx(1)
    assert kurtosis([replace(s, mean_fourth=None) for s in equal]) is None
    assert kurtosis([]) is None
    # 1 + 2/r_eff for Gaussians: 8,000 examples of one direction, standard error 0.13
    assert kurtosis(records(np.random.default_rng(3).standard_normal((500, 16, 1)))) == pytest.approx(
        3, abs=0.5
    )


@pytest.mark.parametrize("power", [-60, 60])
def test_no_scale_of_the_loss_changes_them(power):
    g = gradients(np.random.default_rng(2), "t5", SPECTRA["1/j"], 40, 16)
    plain, scaled = records(g), records(g * 10.0**power)
    close(tail_share(scaled), tail_share(plain), rtol=1e-9)
    close(kurtosis(scaled), kurtosis(plain), rtol=1e-9)
    assert estimate(scaled).warnings == estimate(plain).warnings


@pytest.mark.parametrize("name", SPECTRA)
def test_the_effective_rank_comes_from_the_scatter_of_the_signal(name):
    """3,000 steps without signal, Gaussian or with heavy tails alike: within 20 % of (tr Σ)²/tr Σ²."""
    lam = SPECTRA[name]
    truth = lam.sum() ** 2 / (lam**2).sum()
    for kind in ("gaussian", "t5"):
        e = estimate(records(gradients(np.random.default_rng(5), kind, lam, 3000, 8, 1e9)))
        assert e.moments is not None
        assert effective_rank(e.moments, 3000 * 8 * 7) == pytest.approx(truth, rel=0.2)


@pytest.mark.parametrize(("rank", "share"), [(1, 0.0847), (64, 0.0153)])
def test_light_share_is_that_of_a_chi_square(rank, share):
    """Flat spectra have exactly χ² norms: 200,000 draws."""
    draws = np.random.default_rng(0).chisquare(rank, 200_000)
    assert light_share(rank) == pytest.approx(slow.top_share(draws), rel=0.03)
    assert light_share(rank) == pytest.approx(share, rel=0.01)
    assert light_share(math.inf) == 0.01 and light_share(1) < CAP


def warned(kind: str, name: str, k: int, n: int, runs: int) -> int:
    rng = np.random.default_rng(7)
    made = (records(gradients(rng, kind, SPECTRA[name], k, n)) for _ in range(runs))
    return sum(bool(estimate(steps).warnings) for steps in made)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("k", "n"), [(20, 16), (50, 4)])
def test_gaussian_gradients_do_not_fire(name, k, n):
    """100 runs: at 0.3 % (r_eff of 14 and more) or 3 % (less) more than 4 or 11 have a chance below 1e-4."""
    assert stats.binom.sf(4, 100, 0.003) < 1e-4 and stats.binom.sf(11, 100, 0.03) < 1e-4
    assert warned("gaussian", name, k, n, 100) <= (11 if name == "j^-2" else 4)


@pytest.mark.parametrize(
    ("kind", "name", "least"), [("lognormal", "j^-2", 45), ("t5", "flat", 45), ("t5", "1/j", 34)]
)
def test_heavy_tails_fire(kind, name, least):
    """50 runs a cell. At 99 % fewer than 45 have a chance of 1e-5, at 87 % fewer than 34 one of 1e-4."""
    assert stats.binom.cdf(44, 50, 0.99) < 1e-4 and stats.binom.cdf(33, 50, 0.87) < 1e-3
    assert warned(kind, name, 20, 16, 50) >= least


def test_where_the_scatter_is_signal_the_cap_still_speaks():
    """With n above B, r_eff is read as below 1, where light tails would explain any share."""
    rng = np.random.default_rng(3)
    e = estimate(records(gradients(rng, "lognormal", SPECTRA["j^-2"], 30, 64, 2.0)))
    assert e.moments is not None and e.tail_share is not None and e.tail_share > CAP
    narrow = 1 / (1 + 3 * math.sqrt(14 / e.moments.k))
    assert effective_rank(e.moments, 30 * 64 * 63) < 1 and e.tail_share < 1.5 * light_share(narrow)
    assert e.warnings


def test_pairs_are_those_inside_the_steps(monkeypatch):
    """Of unequal size, or repeated by their weight: the pairs that give |G|² the same variance."""
    asked, true = [], tails.of
    monkeypatch.setattr(tails, "of", lambda *a: asked.append(a[2]) or true(*a))
    sizes = [2, 3, 5, 16]
    steps = [StepSums(i, n, 3.0 + i % 2, 1.0) for i, n in enumerate(sizes * 5)]
    estimate(steps)
    summarise(steps, level=0.95, weights=np.array([1.0, 0.0, 0.0, 2.0] * 5))
    of_size = {n: n * (n - 1) for n in sizes}
    var = (
        sum(w * w * of_size[n] for w, n in ((1, 2), (2, 16)))
        / sum(w * of_size[n] for w, n in ((1, 2), (2, 16))) ** 2
    )
    close(asked, [5 * sum(of_size.values()), 5 / var], rtol=1e-12)


def test_the_warning_names_the_share():
    e = estimate(records(gradients(np.random.default_rng(1), "lognormal", SPECTRA["1/j"], 50, 16)))
    assert e.tail_share is not None
    (text,) = e.warnings
    assert text.startswith(
        f"Heavy tails: 1 % of the examples hold at least {100 * e.tail_share:.0f} % of the squ"
    )
    assert "‖g‖⁴ is" in text and "covers less often than it says" in text
    light = estimate(records(gradients(np.random.default_rng(1), "gaussian", SPECTRA["1/j"], 50, 16)))
    assert light.warnings == () and light.tail_share == pytest.approx(0.027, abs=0.006)
    assert estimate([StepSums(i, 8, 2.0 + i, 1.0) for i in range(30)]).tail_share is None
