"""All pairs of many batches: against every product taken one by one, and in simulation."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gns.probing.result import from_batches
from gns.statistics.pairs import Batches, SignFlip, dependence, jackknife, pooled, sign_flip
from gns.statistics.pairspread import score
from gns.statistics.sets import honest_set
from gns.sums import unbiased
from tests.reference import all_pairs as slow
from tests.reference.estimators import truth
from tests.reference.tolerances import EXACT, close

# --- exact


def batches_of(contributions, weights, mass) -> Batches:
    total = np.array([c.sum(0) for c in contributions])
    return Batches(
        gram=total @ total.T,
        n=np.array([len(c) for c in contributions]),
        sum_sq_norms=np.array([(c**2).sum() for c in contributions]),
        sum_sq_weights=np.array([(a**2).sum() for a in weights]),
        mass=np.array(mass, dtype=float),
    )


def equal(examples) -> Batches:
    """Batches [n, d] of equal weights from the examples' own gradients."""
    weights = [np.full(len(g), 1 / len(g)) for g in examples]
    return batches_of(
        [a[:, None] * g for a, g in zip(weights, examples, strict=True)], weights, [len(g) for g in examples]
    )


@st.composite
def drawn(draw):
    """Batches of unequal size, of examples of unequal weight."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    tokens = [rng.integers(1, 9, n).astype(float) for n in sizes]
    by_tokens = draw(st.booleans())
    tokens = tokens if by_tokens else [np.ones(n) for n in sizes]
    weights = [t / t.sum() for t in tokens]
    mean = rng.standard_normal(3) * draw(st.sampled_from([0.0, 1.0]))
    contributions = [a[:, None] * (mean + rng.standard_normal((len(a), 3))) for a in weights]
    return contributions, weights, [t.sum() for t in tokens]


@given(drawn())
def test_all_pairs_are_those_of_the_joined_batch(data):
    close(pooled(batches_of(*data)), slow.trace_and_grad(*slow.joined(*data)), what="tr Σ, |G|²")


@given(drawn())
def test_permuting_batches_changes_nothing(data):
    order = np.random.default_rng(1).permutation(len(data[0]))
    there = [[part[i] for i in order] for part in data]
    one, other = (from_batches(batches_of(*d)) for d in (data, there))
    close([other.trace_sigma, other.grad_sq_norm], [one.trace_sigma, one.grad_sq_norm])
    assert other.status == one.status
    if one.moments is not None:
        close(other.moments.second, one.moments.second, rtol=1e-9)


@given(drawn())
def test_one_batch_of_all_is_one_step(data):
    c, a = slow.joined(*data)
    n, total = len(a), c.sum(0)
    step = unbiased(n, n * float((c**2).sum()), float(total @ total), float((a**2).sum()))
    close(pooled(batches_of([c], [a], [1.0])), (step.trace_sigma, step.grad_sq_norm))
    close(pooled(batches_of(*data)), (step.trace_sigma, step.grad_sq_norm))


@given(drawn())
def test_the_jackknife_leaves_each_batch_out(data):
    if len(data[0]) < 3 or min(sum(len(a) for a in data[1]) - len(a) for a in data[1]) < 2:
        return
    found, (x, y) = jackknife(batches_of(*data)), pooled(batches_of(*data))
    p = np.array(data[2]) / sum(data[2])
    left = np.array(slow.leave_one_out(*data))
    pseudo = np.array([x, y]) / p[:, None] - (1 / p[:, None] - 1) * left
    off = p[:, None] * (pseudo - p @ pseudo)
    close(found.second, [off[:, 0] @ off[:, 0], off[:, 0] @ off[:, 1], off[:, 1] @ off[:, 1]], rtol=1e-8)
    assert (found.x, found.y) == (x, y)


def test_two_of_equal_size_by_hand():
    """Two batches of one example, g = 1 and 3: one pair, 1·3; tr Σ = (3 − 1)²/2."""
    assert pooled(equal([np.array([[1.0]]), np.array([[3.0]])])) == (2.0, 3.0)


def test_exactly_unbiased_over_all_ordered_draws():
    data = np.array([[1.0, 0.0], [3.0, 1.0], [2.0, -1.0]])
    found = [
        pooled(equal([data[list(draw[:2])], data[list(draw[2:])]]))
        for draw in itertools.product(range(3), repeat=4)
    ]
    grad, trace = truth(data)
    close(np.mean(found, axis=0), [trace, grad], rtol=EXACT)


def test_exactly_unbiased_with_weights_too():
    """Tokens 1, 7 | 3 | 2, 30: |G|² as it is; tr Σ is NA times that of equal weights."""
    data = np.array([[1.0, 0.0], [3.0, 1.0], [2.0, -1.0]])
    tokens = [np.array([1.0, 7.0]), np.array([3.0]), np.array([2.0, 30.0])]
    weights, mass = [t / t.sum() for t in tokens], [t.sum() for t in tokens]
    found = []
    for draw in itertools.product(range(3), repeat=5):
        rows = np.split(data[list(draw)], [2, 3])
        c = [a[:, None] * g for a, g in zip(weights, rows, strict=True)]
        found.append(pooled(batches_of(c, weights, mass)))
    grad, trace = truth(data)
    share = np.concatenate(tokens) / sum(mass)
    close(np.mean(found, axis=0), [5 * float(share @ share) * trace, grad], rtol=EXACT)


def test_control_an_average_of_steps_is_another_number():
    rng = np.random.default_rng(0)
    examples = [rng.standard_normal((4, 3)) for _ in range(5)]
    steps = [pooled(equal([g]))[1] for g in examples]
    assert abs(np.mean(steps) / pooled(equal(examples))[1] - 1) > 0.05


def test_identical_examples_have_no_noise():
    found = pooled(equal([np.ones((3, 2)), np.ones((5, 2))]))
    close(found, [0.0, 2.0], rtol=EXACT)


def test_scale_goes_out_of_the_ratio():
    rng = np.random.default_rng(0)
    b = equal([1 + rng.standard_normal((4, 3)) for _ in range(25)])
    one, other = from_batches(b), from_batches(b.scaled(1e-120))
    close([other.b_simple, other.low, other.high], [one.b_simple, one.low, one.high], rtol=1e-9)
    close(other.trace_sigma, one.trace_sigma * 1e-120)


def test_a_better_known_sum_wins_over_the_sketch():
    """The sketch moves products; the exact cross sum keeps X and Y where they were."""
    rng = np.random.default_rng(0)
    b = equal([1 + rng.standard_normal((4, 3)) for _ in range(25)])
    noise = rng.standard_normal((25, 25)) * 0.3
    moved = b.gram + noise + noise.T - np.diag(np.diag(noise + noise.T))
    found = replace(b, gram=moved, cross=float(b.weighted.sum()))
    close(pooled(found), pooled(b))
    assert abs(pooled(replace(b, gram=moved))[1] / pooled(b)[1] - 1) > 1e-3
    close(jackknife(found).y, jackknife(b).y)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"gram": np.zeros((2, 3))}, r"gram has shape \(2, 3\); \[2, 2\] is needed"),
        ({"mass": np.array([0.0, 1.0])}, "mass is 0 of a batch; more than 0 is needed"),
        ({"mass": np.ones(3)}, "mass has 3 entries; 2 are needed"),
    ],
)
def test_what_does_not_fit_is_refused(changed, says):
    b = equal([np.ones((2, 1)), np.ones((2, 1))])
    with pytest.raises(ValueError, match=says):
        replace(b, **changed)


def test_one_batch_has_no_spread():
    b = equal([np.array([[1.0], [3.0]])])
    with pytest.raises(
        ValueError, match=r"1 batch\(es\) of \[2\] examples; at least 2 are needed, and a pair"
    ):
        jackknife(b)
    found = from_batches(b)
    assert found.status == "collecting" and np.isnan(found.b_simple) and found.trace_sigma == 2
    assert from_batches(equal([np.array([[1.0]]), np.array([[3.0]])])).status == "collecting"


# --- sign flips


@pytest.mark.parametrize("seed", range(3))
def test_sign_flips_are_those_of_the_enumeration(seed):
    rng = np.random.default_rng(seed)
    examples = [0.5 + rng.standard_normal((n, 2)) for n in (1, 2, 3, 2, 1)]
    mass = [len(g) for g in examples]
    found = sign_flip(equal(examples))
    assert found.exact and found.patterns == 16
    close(found.p_value, slow.flips(np.array([g.mean(0) for g in examples]), mass))


def test_drawn_patterns_agree_with_all_of_them():
    rng = np.random.default_rng(5)
    b = equal([0.2 + rng.standard_normal((2, 3)) for _ in range(13)])
    exact = sign_flip(b)
    one_more = equal([np.zeros((1, 3))])  # which no sign changes
    fields = ("n", "sum_sq_norms", "sum_sq_weights", "mass")
    longer = {f: np.append(getattr(b, f), getattr(one_more, f)) for f in fields}
    drawn = sign_flip(Batches(np.pad(b.gram, (0, 1)), **longer), draws=19_999)
    assert exact.exact and not drawn.exact
    assert abs(drawn.p_value - exact.p_value) < 5 * np.sqrt(exact.p_value / 19_999)


def test_no_p_value_is_below_one_over_the_patterns():
    same = equal([np.ones((2, 1))] * 20)  # no drawn pattern comes near
    assert sign_flip(same, draws=99).p_value == 1 / 100
    assert sign_flip(equal([np.ones((2, 1))] * 5)).p_value == 1 / 16


def test_patterns_are_needed():
    with pytest.raises(ValueError, match="draws is 0"):
        sign_flip(equal([np.ones((2, 1))] * 3), draws=0)


# --- simulated

SPECTRUM = 1 / np.arange(1, 65)  # r_eff 13.8


def simulated(seed: int, b_simple: float, k: int, n: int, spectrum=SPECTRUM) -> Batches:
    """K batches of n Gaussian gradients; no example is drawn, see `gaussian_steps` of the twin."""
    rng, d = np.random.default_rng(seed), len(spectrum)
    mean = np.full(d, np.sqrt(spectrum.sum() / b_simple / d))
    centre = mean + rng.standard_normal((k, d)) * np.sqrt(spectrum / n)
    scatter = (rng.chisquare(n - 1, (k, d)) * spectrum).sum(1) if n > 1 else np.zeros(k)
    size = np.full(k, n)
    norms = ((centre**2).sum(1) + scatter / n) / n
    return Batches(centre @ centre.T, size, norms, 1 / size, size.astype(float))


def steps_see_it(b: Batches, level: float = 0.05) -> bool:
    """Whether the same batches, as training steps, tell |G|² from 0: Student's t over steps, one-sided."""
    y = (b.n**2 * b.within) / (b.n * (b.n - 1))
    return bool(stats.ttest_1samp(y, 0, alternative="greater").pvalue < level)


@pytest.mark.parametrize(("spectrum", "b_simple", "ratio"), [(np.ones(64), 350, 7), (SPECTRUM, 170, 6)])
def test_pooling_sees_seven_times_larger_noise_scales(spectrum, b_simple, ratio):
    """800 examples: where 50 steps of 16 see |G|² half the time, their pairs do at 6 to 7 times that B.

    The facts' 1,277 against 175 (7.3 times) are for a Gaussian statistic. That of the pairs is skewed, the
    more the steeper the spectrum: 6.9 times on the flat one, 6.0 on 1/j.
    """
    repeats = 400
    steps = np.mean([steps_see_it(simulated(r, b_simple, 50, 16, spectrum)) for r in range(repeats)])
    far = (simulated(r, ratio * b_simple, 50, 16, spectrum) for r in range(repeats))
    pairs = np.mean([sign_flip(b, draws=499).p_value <= 0.05 for b in far])
    near = (simulated(r, b_simple, 50, 16, spectrum) for r in range(100))
    assert 0.4 < steps < 0.6 and abs(pairs - steps) < 4 * np.sqrt(2 * 0.25 / repeats), (steps, pairs)
    assert np.mean([sign_flip(b, draws=499).p_value <= 0.05 for b in near]) > 0.98


def test_sign_flips_hold_their_size_without_a_gradient():
    """5 % at |G|² = 0 on a steep spectrum, where Student's t over the products would not hold it."""
    repeats = 600
    alarms = sum(
        sign_flip(simulated(r, 1e12, 20, 8, 1 / np.arange(1, 33) ** 2.0), draws=199).p_value <= 0.05
        for r in range(repeats)
    )
    assert stats.binom.cdf(alarms, repeats, 0.05) > 1e-4 and stats.binom.sf(alarms - 1, repeats, 0.05) > 1e-4


@pytest.mark.parametrize(("b_simple", "bounded"), [(20, (1.0, 1.0)), (200, (0.95, 1.0)), (1e5, (0.0, 0.05))])
def test_the_set_covers_and_is_wide_past_the_limit(b_simple, bounded):
    """At least 94 % in 400 repeats: ≤ 356 then has probability < 1e-4 (see test_estimate)."""
    found = [honest_set(score(simulated(r, b_simple, 50, 16)), 0.95) for r in range(400)]
    covered = sum(low <= b_simple <= high for low, high, _ in found)
    share = np.mean([np.isfinite(high) for _, high, _ in found])
    assert covered > 356, f"{covered} of 400"
    assert bounded[0] <= share <= bounded[1], f"{share} bounded"


def test_looks_share_the_level():
    b = simulated(0, 50, 40, 8)
    one, many = from_batches(b), from_batches(b, looks=4)
    assert many.low < one.low < one.b_simple < one.high < many.high
    assert many.level == one.level == 0.95
    close(from_batches(b, level=1 - 0.05 / 4).high, many.high)
    shown, once = ((e.high - e.low) / 2 / e.b_simple for e in (many, one))
    assert once < shown and many.more_examples((shown + once) / 2) > 0, "the outlook is on the set shown"


@pytest.mark.parametrize("level", [0.95, 0.9875])
def test_without_a_gradient_an_upper_end_is_as_rare_as_the_level_says(level):
    """Alone, the score set has one in 3.8 % of these probes at 98.75 %, six times too many."""
    repeats, steep = 300, 1 / np.arange(1, 33) ** 2.0
    found = [from_batches(simulated(r, 1e12, 20, 16, steep), level=level) for r in range(repeats)]
    bounded = sum(np.isfinite(e.high) for e in found)
    assert stats.binom.sf(bounded - 1, repeats, (1 - level) / 2) > 1e-3, bounded
    alone = sum(np.isfinite(honest_set(e.moments, level)[1]) for e in found)
    assert alone > 2 * bounded, "the control"
    assert all(e.status == "lower bound" for e in found if np.isinf(e.high) and np.isfinite(e.low))


@pytest.mark.parametrize(
    ("p", "exact", "patterns", "level", "kept"),
    [
        (0.025, False, 9_999, 0.95, True),
        (0.0251, False, 9_999, 0.95, False),
        (1e-4, False, 9_999, 0.999999, True),  # no smaller p can be had
        (2e-4, False, 9_999, 0.999999, False),
        (1 / 8, True, 8, 0.95, True),
        (2 / 8, True, 8, 0.95, False),
    ],
)
def test_an_upper_end_needs_a_gradient(p, exact, patterns, level, kept):
    assert SignFlip(p, exact, patterns).upper_end(7.0, level) == (7.0 if kept else np.inf)


# --- dependence inside a batch


def planted(seed: int, duplicates: int, k: int = 30, n: int = 8) -> Batches:
    """Batches whose every example is there `duplicates` times."""
    rng = np.random.default_rng(seed)
    return equal(
        [np.repeat(0.5 + rng.standard_normal((n // duplicates, 20)), duplicates, 0) for _ in range(k)]
    )


def test_pairs_inside_and_across_are_those_of_the_enumeration():
    rng = np.random.default_rng(2)
    examples = [1 + rng.standard_normal((n, 3)) for n in (3, 2, 4, 1)]
    found = dependence(equal(examples))
    n = [len(g) for g in examples]
    twin = slow.within_and_across([g / len(g) for g in examples], n)
    close([found.within, found.across], twin)
    close(found.difference, twin[0] - twin[1])


def test_duplicates_inside_batches_are_found():
    found = [dependence(planted(seed, 2)) for seed in range(20)]
    assert all(d.p_value < 0.01 and d.difference > 0 for d in found)
    e = from_batches(planted(0, 2))
    assert "agree more than examples of different batches" in e.warnings[0]
    assert found[0].b_simple_within < found[0].b_simple_across


def test_data_in_order_are_found():
    """Examples whose gradients drift along the data: neighbours are alike."""
    rng = np.random.default_rng(0)
    drift = np.repeat(np.linspace(-2, 2, 30), 8)[:, None] * np.eye(20)[0]
    rows = 0.5 + rng.standard_normal((240, 20)) + drift
    found = dependence(equal(np.split(rows, 30)))
    assert found.p_value < 0.01 and found.difference > 0
    shuffled = dependence(equal(np.split(rng.permutation(rows), 30)))
    assert shuffled.p_value > 0.01


def test_balanced_batches_agree_less():
    rng = np.random.default_rng(0)
    halves = [rng.standard_normal((4, 20)) for _ in range(30)]
    found = dependence(equal([1 + np.concatenate([g, -g]) for g in halves]))
    assert found.difference < 0 and found.p_value < 0.01
    assert "agree less" in from_batches(equal([1 + np.concatenate([g, -g]) for g in halves])).warnings[0]


@pytest.mark.parametrize("b_simple", [5, 500])
def test_control_independent_examples_raise_no_more_alarms_than_their_rate(b_simple):
    """1 % a probe: more than 19 alarms in 800 have probability < 1e-3."""
    assert stats.binom.sf(19, 800, 0.01) < 1e-3
    alarms = sum(dependence(simulated(r, b_simple, 40, 8)).p_value < 0.01 for r in range(800))
    assert alarms <= 19


def test_pairs_inside_batches_are_needed_for_a_comparison():
    rng = np.random.default_rng(0)
    assert dependence(equal([rng.standard_normal((1, 3)) for _ in range(10)])) is None
    assert dependence(equal([rng.standard_normal((4, 3)) for _ in range(2)])) is None


def test_few_batches_of_a_steep_spectrum_are_not_called_balanced():
    """With 8 batches of 16, p < 1 % in 4 % of probes: a warning would come four times too often."""
    steep = 1 / np.arange(1, 33) ** 2.0
    found = [from_batches(simulated(r, 1e9, 8, 16, steep)) for r in range(200)]
    low = sum(e.dependence.p_value < 0.01 for e in found)
    assert low >= 3, "the control"
    assert sum(bool(e.warnings) for e in found) <= 2 < low


def test_what_rounding_leaves_is_no_dependence():
    same = equal([np.ones((4, 2)) for _ in range(25)])
    rounded = replace(same, sum_sq_norms=same.sum_sq_norms * (1 - 1e-7))
    assert dependence(rounded).p_value == 1 and not from_batches(rounded).warnings
    apart = replace(same, sum_sq_norms=same.sum_sq_norms * 0.9)
    assert dependence(apart).p_value < 0.01, "the control"
