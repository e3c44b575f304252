"""Predictions judged by intervals, on rows whose truth is known."""

import math
from dataclasses import replace

import numpy as np
import pytest

from experiments.analysis.curves import Estimated
from experiments.critical import Efficiency
from experiments.evidence.judged import Judged, gain, judge
from experiments.evidence.measured import CURVED, measured
from experiments.evidence.predictions import (
    harmless,
    plug_in_excess,
    rank_slope,
    ratio,
    size_slope,
    verdict,
    zero_verdict,
)
from experiments.evidence.readout import BY_DEFAULT, BY_SIZE, read_out
from experiments.evidence.sentences import answer
from tests.experiments.evidence.synthetic import curvature, rows


def number(value, low, high, note=""):
    return Estimated(value, low, high, note)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.9, 1.1, "held"),
        (0.2, 1.1, "undecided"),
        (0.1, 0.4, "failed"),
        (1.6, math.inf, "failed"),
        (0.0, math.inf, "undecided"),
    ],
)
def test_an_interval_decides(low, high, said):
    assert verdict(number(1.0, low, high), 0.5, 1.5) == said


@pytest.mark.parametrize(
    ("low", "high", "inside", "outside"),
    [
        (-1.0, 1.0, "held", "failed"),
        (0.5, 1.0, "failed", "held"),
        (-1.0, -0.5, "failed", "held"),
        (-1.0, math.inf, "undecided", "undecided"),  # an end that is open holds any number
        (-1.1, 1.0, "undecided", "undecided"),  # and one beyond an octave what would matter
        (-1.0, 1.1, "undecided", "undecided"),
        (0.5, math.inf, "failed", "held"),
        (-math.inf, -0.5, "failed", "held"),
    ],
)
def test_a_claim_about_zero_is_judged_by_where_it_lies(low, high, inside, outside):
    assert zero_verdict(number(0.0, low, high), True) == inside
    assert zero_verdict(number(0.0, low, high), False) == outside


def test_a_number_beyond_the_grid_is_undecided_about_zero_and_a_missing_one_not_measured():
    nothing = number(math.nan, -math.inf, math.inf)
    assert zero_verdict(nothing, True) == "not measured"
    assert zero_verdict(number(math.nan, -math.inf, math.inf, "at the edge"), True) == "undecided"


def judged(share, correlation, pairs=10, high=1.0, ceiling=1.0):
    value, off = number(share, 0.0, high), number(1.5, 1.2, 2.0)
    follows, constant = number(correlation, -0.5, 0.9), number(1.0, 0.5, 2.0)
    return Judged("B", follows, constant, value, off, ceiling, pairs, 0, pairs)


@pytest.mark.parametrize(
    ("share", "correlation", "needed"),
    [
        (0.5, 0.5, 11),  # 1.96² · 0.25/0.3²
        (0.7, 0.5, 81),  # 1.96² · 0.21/0.1²
        (0.0, 0.5, 10),  # never fewer than there are
        (0.9, 0.5, 18),  # 3 + 1.96² · 1.125/atanh(0.5)²
        (0.9, 0.2, 99),
        (0.9, 0.0, math.inf),
        (0.9, math.nan, math.inf),
    ],
)
def test_how_many_configurations_would_decide(share, correlation, needed):
    assert judged(share, correlation).needed.value == needed
    assert judged(share, correlation).needed.high == math.inf  # neither end that speaks against it decides


def test_what_measurement_alone_would_do_is_no_failure():
    assert judged(0.4, 0.5, high=0.7).verdict == "does not"
    assert judged(0.4, 0.5, high=0.7, ceiling=0.65).verdict == "undecided"
    assert judged(0.4, 0.5, high=0.6, ceiling=0.65).verdict == "does not"
    assert judged(0.4, 0.5, high=0.7, ceiling=math.nan).verdict == "does not"  # not known
    assert judged(0.7, 0.5, ceiling=0.6).needed.value == math.inf
    assert judged(0.5, 0.5, ceiling=0.7).needed.value == 25 > judged(0.5, 0.5).needed.value


def test_the_page_says_how_many_configurations_would_decide():
    made = rows(8.0, 8.0, noise=0.01, n=1) + rows(16.0, 16.0, noise=0.01, n=2, dials={"label_noise": 0.2})
    found = read_out(made + rows(8.0, 8.0, noise=0.01, n=3, rank=4), [])
    for each, said in (
        (judged(0.7, 0.5, 3), "about 81 configurations would decide in half of the cases (3 … ∞ over"),
        (judged(0.9, 0.0, 3), "no number of configurations would decide"),
    ):
        found.judged["B"] = each
        assert said in answer(found)


def test_what_was_not_measured_is_neither_held_nor_undecided():
    assert verdict(number(math.nan, -math.inf, math.inf), 0.5, 1.5) == "not measured"


def test_a_ratio_has_the_spread_of_both():
    random = np.random.default_rng(0)
    top = Estimated(6.0, 5, 7, "", 6 * np.exp(0.1 * random.standard_normal(2_000)))
    bottom = Estimated(2.0, 1, 3, "", 2 * np.exp(0.2 * random.standard_normal(2_000)))
    found = ratio(top, bottom)
    assert found.value == 3.0
    assert math.log(found.high / found.low) == pytest.approx(2 * 1.96 * math.hypot(0.1, 0.2), rel=0.1)
    ends = ratio(number(6, 5, math.inf), number(2, 1, 3, "censored"))
    assert (ends.low, ends.high, ends.note) == (5 / 3, math.inf, "under: censored")
    open_ended = ratio(Estimated(6.0, 5, math.inf, "", top.draws), bottom)
    assert (open_ended.low, open_ended.high) == (5 / 3, math.inf)
    # what a censored run leaves open is in its ends, and not in its draws
    censored = ratio(Estimated(6.0, 5, 60, "at least", top.draws, at_least=True), bottom)
    assert (censored.low, censored.high) == (5 / 3, 60.0)
    # and where it leaves single replicates open, in what they are at the most
    open_draws = ratio(Estimated(6.0, 5, 60, "", top.draws, top.draws, 3 * top.draws), bottom)
    assert open_draws.low == found.low and open_draws.high == pytest.approx(3 * found.high)
    under_open = Estimated(2.0, 1, 9, "", bottom.draws, bottom.draws, 3 * bottom.draws)
    assert ratio(top, under_open).low == pytest.approx(found.low / 3)
    assert ratio(top, under_open).high == found.high


def test_draws_of_two_configurations_have_nothing_to_do_with_each_other():
    """Drawn from one stream they would cancel in a ratio, which then looks surer than its parts."""
    one = measured(rows(8.0, 8.0, noise=0.2, n=1), 1_024)
    other = measured(rows(16.0, 16.0, noise=0.2, n=2, dials={"label_noise": 0.5}), 1_024)
    for a, b in ((one.noise["B"], other.noise["B"]), (one.doubled, other.doubled)):
        assert abs(np.corrcoef(np.log(a.draws), np.log(b.draws))[0, 1]) < 0.15
    between = ratio(other.noise["B"], one.noise["B"])
    width = math.hypot(*(math.log(each.noise["B"].high / each.noise["B"].low) for each in (one, other)))
    assert math.log(between.high / between.low) == pytest.approx(width, rel=0.15)


def frozen(slope=0.0, growth=0.0, spread=0.02, base="math-200k", b=4.0):
    random = np.random.default_rng(1)
    made = []
    for rank, seed, data, n in [
        *((r, s, 0, 2_048) for r in (4, 16, 64) for s in (0, 1, 2)),
        *((16, 0, d, n) for d in (0, 1, 2, 3) for n in (128, 512, 2_048) if (d, n) != (0, 2_048)),
    ]:
        value = b * rank**slope * n**growth * math.exp(spread * random.standard_normal())
        made.append(
            {
                "base": base, "adapter": "lora", "rank": rank, "seed": seed, "data_seed": data, "n": n,
                "b_simple": value, "low": value / 1.1, "high": value * 1.1,
                "plug_in": 1 / (1 / value + 1 / n),
            }
        )  # fmt: skip
    return made


def test_no_draw_of_a_censored_batch_needs_less_than_that_batch_saw():
    """Batches 32 and 64 saw 2,000 rows each without arriving; draws below that cannot make them harmless."""
    batches = np.array([4.0, 8, 16, 32, 64])
    logs = np.log([1_000.0, 1_100, 1_300, 2_000, 2_000])
    low = logs - np.array([0, 0, 0, 0.3, 0.3])  # 1,482
    censored, rates = batches >= 32, np.full(5, 1e-3)
    found = Efficiency(1.0, batches, logs, censored, rates, (), np.tile(low, (50, 1)))
    (within,) = harmless(replace(measured(rows(), 1_024), examples=found), [1_600])
    assert within.value == pytest.approx(16.0) and within.at_least
    assert 16 < within.high < 32 and (within.most < 32).all()


def test_slopes_at_initialisation():
    flat, steep = frozen(), frozen(slope=0.3, growth=0.2)
    for found, truth in ((rank_slope(flat, "math-200k"), 0.0), (rank_slope(steep, "math-200k"), 0.3)):
        assert found.low < truth < found.high and found.high - found.low < 0.1
    for found, truth in ((size_slope(flat, "math-200k"), 0.0), (size_slope(steep, "math-200k"), 0.2)):
        assert found.low < truth < found.high and found.high - found.low < 0.1
    assert math.isnan(rank_slope([], "math-200k").value)


def test_sizes_of_one_data_set_count_as_one():
    """They share rows: what one set does to all its sizes must not shrink with their number."""
    made = frozen(spread=0.0)
    for row in made:
        if row["seed"] == 0 and row["rank"] == 16:
            row["b_simple"] *= row["n"] ** (0.1 * (-1) ** row["data_seed"])  # slopes of ± 0.1, exactly
    found = size_slope(made, "math-200k")
    assert found.value == pytest.approx(0.0, abs=1e-9)
    half = 3.182 * 0.1 * math.sqrt(4 / 3) / 2  # Student's at 3 degrees of freedom
    assert found.high == pytest.approx(half, rel=1e-3)


def test_the_plug_in_is_set_beside_the_noise_scale_of_other_data():
    assert plug_in_excess(frozen(), "math-200k").value == pytest.approx(1.0, abs=0.05)
    assert plug_in_excess(frozen(growth=0.3), "math-200k").high < 0.9  # a plug-in that grows with the data
    wide, narrow = frozen(), frozen()
    for row in wide:
        row["low"], row["high"] = row["b_simple"] / 2, row["b_simple"] * 2
    widths = [f.high - f.low for f in (plug_in_excess(made, "math-200k") for made in (wide, narrow))]
    assert widths[0] > 2 * math.log(2) > 3 * widths[1]  # the reference's own set counts


def test_a_noise_scale_that_follows_is_told_from_one_that_does_not():
    random = np.random.default_rng(3)
    critical = np.exp(random.uniform(0, 3, 14))
    exact = [number(c, c, c) for c in critical]
    near = [c / 3 * math.exp(0.1 * random.standard_normal()) for c in critical]
    follows = [number(x, x, x) for x in near]
    good = judge("B", follows, exact)
    assert good.verdict == "predicts" and good.constant.value == pytest.approx(3, rel=0.2)
    assert (good.pairs, good.of) == (14, 14)
    assert good.ceiling == 1.0 and 1 < good.off.value < 1.2
    bad = judge("B", [number(x, x, x) for x in random.permutation(critical) ** 2], exact)
    assert bad.verdict == "does not" and bad.share.high < 0.8
    fixed = judge("a constant", [number(1, 1, 1)] * 14, exact)
    assert math.isnan(fixed.correlation.value) and fixed.share.value < 0.8
    nearer = gain(follows, [number(1, 1, 1)] * 14, exact)
    assert nearer.high < 1 and nearer.value == pytest.approx(good.off.value / fixed.off.value)
    assert math.isnan(gain(follows[:2], follows[:2], exact[:2]).value)
    few = judge("B", follows[:2], exact[:2])
    assert few.verdict == "undecided" and math.isnan(few.share.value)


def test_a_readout_of_several_configurations():
    """Noise moves both by two, a larger rank neither; merged rows halve both on the way to the same loss."""
    made = rows(8.0, 8.0, noise=0.01, n=1)
    made += rows(16.0, 16.0, noise=0.01, n=2, dials={"label_noise": 0.2})
    made += rows(8.0, 8.0, noise=0.01, n=3, rank=4) + rows(8.0, 8.0, noise=0.01, n=4, rank=64)
    found = read_out(made, frozen())
    assert list(found.compared) == ["reference", "noise 0.2", "rank 4", "rank 64"]
    assert found.broken == {} and "merged" in found.missing and found.commits == ["abc"]
    said = {(p.name, p.says): p for p in found.predicted}
    noise = said["P6", "factor on B_crit over factor on B_simple, label noise 0.2"]
    assert noise.number.value == pytest.approx(1.0, rel=0.2) and noise.verdict == "held"
    assert said["P8", "B_crit, rank 64 over rank 4"].verdict == "held"
    assert said["P5", "B_crit, merged over single"].verdict == "not measured"
    assert said["P1", "slope of log B_simple on log rank, math-200k"].verdict == "held"
    assert found.judged["B"].pairs == 4
    assert found.over_sizes["B"].of == 12
    for rival, of in ((BY_DEFAULT, found.judged), (BY_SIZE, found.over_sizes)):
        assert found.gains[rival].value == pytest.approx(of["B"].off.value / of[rival].off.value)
    assert found.gains[BY_DEFAULT].value < 1 and not found.harmless["constant"].scale.bounds


def test_b_noise_is_judged_under_sgd_and_shown_under_adamw():
    plain, noisy = rows(8.0, 8.0), rows(16.0, 16.0, dials={"label_noise": 0.2})
    sgd = rows(8.0, 8.0, optimizer="sgd")
    readings = curvature(plain, 80.0) + curvature(noisy, 40.0) + curvature(sgd, 16.0)
    found = read_out(plain + noisy + sgd, [], readings)
    assert CURVED in found.judged and CURVED not in found.over_sizes  # it was read at one size
    said = {p.says: p for p in found.predicted if p.name == "P7"}
    judged = said["B_noise / B_crit under SGD"]
    assert judged.number.value == pytest.approx(2.0, rel=0.2) and judged.verdict == "held"
    shown = said["the same under AdamW, middle (smallest … largest)"]
    assert shown.verdict == "shown" and shown.number.note == "2 configuration(s)"
    assert shown.number.low == pytest.approx(2.5, rel=0.2) and shown.number.high == pytest.approx(10, rel=0.2)
    unread = {p.says: p.verdict for p in read_out(plain, []).predicted if p.name == "P7"}
    assert set(unread.values()) == {"not measured"} and len(unread) == 2
