"""Critical batch sizes from rows whose E(B) is known."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.configs import RunConfig
from experiments.critical import branched, efficiency, hyperbola, overhead, target_runs

B_CRIT, E_MIN, TARGET, SEEN = 24.0, 3_000.0, 1.0, 200_000
BATCHES = tuple(2**k for k in range(9))


def _row(batch, examples, seed=0, lr=1e-3, status="done", seen=None):
    """A run whose loss falls from 2 to the target at `examples`, linear in their logarithm."""
    config = RunConfig(
        "1m", "wordmath", n_train=SEEN, batch_size=batch, lr=lr, seed=seed, data_seed=seed,
        protocol="target", target_loss=TARGET, schedule="constant",
    )  # fmt: skip
    reached = examples is not None
    last = examples * 1.5 if reached else seen or SEEN
    points = [(0, 2.0), (last / 3, 1.6), (last, 1.6 - 0.6 * math.log(3) / math.log(2) if reached else 1.1)]
    return {
        "status": status,
        "config": config.to_dict(),
        "examples_seen": last,
        "validation": [{"step": int(e / batch), "examples": e, "loss": loss} for e, loss in points],
        "test_loss": None if status == "diverged" else points[-1][1],
    }


def _exact(batches=BATCHES, seeds=2, noise=0.0, b_crit=B_CRIT, random=None):
    random = random or np.random.default_rng(0)
    shifts = noise * random.standard_normal(seeds)  # of a seed, on all batches
    return [
        _row(b, E_MIN * (1 + b / b_crit) * math.exp(shifts[s] + noise * random.standard_normal()), seed=s)
        for b in batches
        for s in range(seeds)
    ]


def _truth(share, b_crit=B_CRIT, smallest=1):
    """Where E(B) = (1 + share) E(smallest), on the hyperbola."""
    return b_crit * ((1 + share) * (1 + smallest / b_crit) - 1)


@pytest.mark.parametrize("protocol", ["target", "epochs"])
def test_rows_that_were_evaluated_more_and_less_often_are_not_one_curve(protocol):
    made = _exact()
    for i, row in enumerate(made):
        told = {"protocol": protocol, "target_loss": TARGET if protocol == "target" else None}
        row["config"] |= told | {"evals": 64 if i % 2 else 4}
    said = {"target": "differ in evals", "epochs": "evals is 4 in some rows and 64 in others"}[protocol]
    with pytest.raises(ValueError, match=said):
        efficiency(made, TARGET, draws=5)


@pytest.mark.parametrize("share", [1.0, 0.2])
@pytest.mark.parametrize("b_crit", [6.0, 24.0, 100.0])
def test_a_known_hyperbola_is_read_off(share, b_crit):
    found = efficiency(_exact(b_crit=b_crit), draws=50)
    assert overhead(found, share).value == pytest.approx(_truth(share, b_crit), rel=0.03)
    fit = hyperbola(found)
    assert fit.b_crit.value == pytest.approx(b_crit, rel=0.02)  # 20 values an octave
    assert fit.e_min == pytest.approx(E_MIN, rel=0.01) and fit.s_min == pytest.approx(
        E_MIN / b_crit, rel=0.03
    )
    assert fit.misfit < 0.01


@pytest.mark.parametrize("seeds, noise", [(2, 0.05), (4, 0.1)])
def test_intervals_cover(seeds, noise):
    # fewer than 46 of 60 have a probability below 1e-6 at a coverage of 95 %, above 0.99 at one of 60 %
    random, repeats = np.random.default_rng(1), 60
    hits = {1.0: 0, 0.2: 0, "fit": 0}
    assert stats.binom.cdf(45, repeats, 0.95) < 1e-6 and stats.binom.cdf(45, repeats, 0.6) > 0.99
    for _ in range(repeats):
        found = efficiency(_exact(seeds=seeds, noise=noise, random=random), draws=150)
        for share in (1.0, 0.2):
            one = overhead(found, share)
            hits[share] += one.low <= _truth(share) <= one.high
            assert one.low > 0 and one.low < one.high
        fit = hyperbola(found).b_crit
        hits["fit"] += fit.low <= B_CRIT <= fit.high
    assert min(hits.values()) >= 46, hits


def test_seeds_that_share_data_do_not_count_as_two_draws_beside_others():
    """Data move each batch of a seed, its adapter hardly: with two of four on one data set, three draws."""
    hits = {"as one": 0, "as two": 0}
    for n in range(60):
        random = np.random.default_rng(n)
        made = _exact(seeds=3, noise=0.15, random=random)
        twin = [
            row | {"config": row["config"] | {"seed": 7, "data_seed": 0}}
            for row in made
            if row["config"]["data_seed"] == 0
        ]
        forgotten = [row | {"config": row["config"] | {"data_seed": 7}} for row in twin]
        for name, more in (("as one", twin), ("as two", forgotten)):
            one = overhead(efficiency(made + more, draws=150))
            hits[name] += one.low <= _truth(1.0) <= one.high
            if name == "as one":
                alone = overhead(efficiency(made, draws=150))
                assert (one.value, one.low, one.high) == (alone.value, alone.low, alone.high)
    assert hits["as one"] >= 50 and hits["as two"] < hits["as one"]


def test_a_draw_of_several_seeds_is_censored_where_one_of_them_is():
    made = _exact(seeds=3)
    twins = [_row(b, E_MIN * (1 + b / B_CRIT) if b < 16 else None, seed=0) for b in BATCHES]
    for row in twins:
        row["config"]["seed"] = 7
    found = efficiency(made + twins, draws=20)
    assert found.batches[found.censored].tolist() == [16, 32, 64, 128, 256]
    assert overhead(found).at_least and not overhead(efficiency(made, draws=20)).at_least


def test_a_number_that_a_censored_batch_leaves_open_is_a_bound_and_so_are_its_replicates():
    made = [row for row in _exact(noise=0.02) if row["config"]["batch_size"] <= 64]
    lost = [_row(b, None, seed=s, seen=20_000) for b in (128, 256) for s in (0, 1)]
    found = overhead(efficiency([row for row in made if row["config"]["batch_size"] <= 16] + lost, draws=50))
    assert found.at_least and (found.most > found.least).all()
    sure = overhead(efficiency(made, draws=50))
    assert not sure.at_least and list(sure.most) == list(sure.least) == list(sure.draws)


def test_what_is_censored_beyond_the_crossing_leaves_it_as_it_is():
    """Where the doubling lies between batches that arrived, one that did not only bends the interpolant."""
    random = np.random.default_rng(0)
    for _ in range(25):
        b_crit = math.exp(random.uniform(math.log(4), math.log(20)))
        noise = np.exp(0.05 * random.standard_normal(6))
        arrived = [E_MIN * (1 + b / b_crit) * f for b, f in zip(BATCHES[:6], noise, strict=True)]  # to 32
        made = [_row(b, e) for b, e in zip(BATCHES[:6], arrived, strict=True)] + [_row(64, None, seen=6_000)]
        twice = [row | {"config": row["config"] | {"seed": 1, "data_seed": 1}} for row in made]
        found = overhead(efficiency(made + twice, draws=5))
        assert found.at_least == (found.value >= 32 * (1 - 1e-6)), (b_crit, found)
        assert found.high >= found.value >= found.low


def test_more_noise_gives_wider_intervals():
    widths = []
    for noise in (0.02, 0.2):
        one = overhead(efficiency(_exact(seeds=3, noise=noise), draws=200))
        widths.append(math.log(one.high / max(one.low, 1e-3)))
    assert widths[0] * 3 < widths[1]


def test_beyond_the_grid_is_an_answer():
    one = overhead(efficiency(_exact(b_crit=1e4), draws=50))
    assert math.isinf(one.value) and math.isinf(one.high) and one.note == "beyond the grid"
    fit = hyperbola(efficiency(_exact(b_crit=1e12), draws=50))
    assert math.isinf(fit.b_crit.value) and "does not bend" in fit.b_crit.note


def test_a_smallest_batch_that_is_not_small_is_noted():
    one = overhead(efficiency(_exact(batches=(16, 32, 64, 128)), draws=50))
    assert "batch 16 is not small against it: reads high" in one.note
    assert "not small" not in overhead(efficiency(_exact(), draws=50)).note


def test_a_batch_that_never_arrives_is_censored_not_dropped():
    reached = _exact(batches=BATCHES[:4])  # up to 8: a third more than at 1
    seen = [_row(b, None, seed=s, seen=n) for b, n in ((16, 3_600), (32, 9_000)) for s in range(2)]
    found = efficiency(reached + seen, draws=50)
    assert found.censored.tolist() == [False] * 4 + [True] * 2
    one = overhead(found)
    assert one.value == one.low == pytest.approx(8.0)  # right after the last that arrived, at the least
    assert 16 < one.high < 32 and one.note.startswith("at least: censored at batch 16, 32")
    without = overhead(efficiency(reached, draws=50))
    assert math.isinf(without.value)  # dropping them would have said: beyond the grid
    open_ = overhead(efficiency(reached + seen[:2], draws=50))
    assert math.isinf(open_.high) and open_.low == pytest.approx(8.0)
    assert hyperbola(found).b_crit.note == "without batch 16, censored; without batch 32, censored"
    assert hyperbola(found).b_crit.value == pytest.approx(B_CRIT, rel=0.02)


def test_a_rate_at_which_one_seed_diverges_says_nothing_of_the_others():
    """At batch 16 it arrives with one seed and diverges with the other; below it runs saw 9,000 examples."""
    made = _exact(batches=BATCHES[:4])
    made += [_row(16, None, seed=s, seen=9_000) for s in range(2)]
    made += [_row(16, 3_500, seed=0, lr=2e-3), _row(16, None, seed=1, lr=2e-3, status="diverged", seen=32)]
    made += [_row(16, None, seed=0, lr=4e-3, seen=9_000)]  # a rate that the other seed lacks
    found = efficiency(made, draws=50)
    assert found.rates[-1] == 2e-3 and (found.draws[:, -1] < 9.3).all()  # ln 9,000 is 9.1
    one = overhead(found)
    assert one.at_least and one.value == pytest.approx(8.0) and 8.5 < one.high < 16


def test_where_every_learning_rate_diverges_no_batch_arrives():
    rows = _exact(batches=BATCHES[:4])
    rows += [_row(16, None, seed=s, status="diverged", seen=32) for s in range(2)]
    found = efficiency(rows, draws=50)
    assert math.isinf(found.log_examples[-1]) and found.censored[-1]
    one = overhead(found)
    assert one.value == pytest.approx(8.0) and one.high == pytest.approx(8.0)


def test_the_smallest_batch_must_arrive():
    rows = [_row(1, None, seed=s) for s in range(2)] + _exact(batches=BATCHES[1:])
    one = overhead(efficiency(rows, draws=20))
    assert math.isnan(one.value) and (one.low, one.high) == (0.0, math.inf) and "did not reach" in one.note


def test_the_best_learning_rate_of_each_batch_is_used():
    rows = []
    for b in BATCHES:
        best = E_MIN * (1 + b / B_CRIT)
        for s in range(2):
            rows += [_row(b, best * f, seed=s, lr=lr) for lr, f in ((1e-4, 3), (1e-3, 1), (2e-3, 2))]
            rows.append(_row(b, None, seed=s, lr=1e-2, status="diverged", seen=10))
            rows.append(_row(b, None, seed=s, lr=5e-3, seen=best / 2))  # few examples, but it did not arrive
    found = efficiency(rows, draws=50)
    assert found.rates.tolist() == [1e-3] * 9 and found.edges == ()
    assert overhead(found).value == pytest.approx(_truth(1.0), rel=0.03)
    edge = efficiency([row for row in rows if row["config"]["lr"] > 5e-4], draws=50)
    assert edge.edges == BATCHES
    assert "learning rate at the edge of its grid at batch 1, 2," in overhead(edge).note


def test_one_seed_has_no_interval():
    one = overhead(efficiency(_exact(seeds=1)))
    assert (one.low, one.high) == (0.0, math.inf) and "one seed, or one batch with all" in one.note
    assert one.value == pytest.approx(_truth(1.0), rel=0.03)


def test_a_lower_target_than_the_runs_censors_and_a_higher_one_reads_earlier():
    rows = _exact()
    assert efficiency(rows, target=0.2, draws=5).censored.all()
    earlier = efficiency(rows, target=1.3, draws=5)
    assert (earlier.log_examples < efficiency(rows, draws=5).log_examples).all()


@pytest.mark.parametrize(
    "rows, said",
    [
        ([], "rows of one configuration are needed; seen 0"),
        ([{**_row(1, 10), "status": "failed"}], "seen 0"),
        ([_row(1, 10), {**_row(2, 10), "config": RunConfig("1m", "wordmath", rank=3).to_dict()}], "rank"),
        ([{**_row(1, 10), "config": RunConfig("1m", "wordmath").to_dict()}], "name a target"),
        ([_row(1, 10, seed=0), _row(2, 10, seed=1)], "all seeds; run what is missing"),
    ],
)
def test_rows_that_say_nothing_are_refused(rows, said):
    with pytest.raises(ValueError, match=said):
        efficiency(rows)


def test_a_hyperbola_needs_three_batches():
    with pytest.raises(ValueError, match="three batch sizes that reach the target; 2 do"):
        hyperbola(efficiency(_exact(batches=(1, 2)), draws=5))


def test_runs_to_a_target_differ_in_batch_rate_and_seed_only():
    runs = target_runs(RunConfig("1m", "wordmath", epochs=3), 1.5, (1, 2), (1e-3, 2e-3), (0, 1, 2))
    assert len({run.hash for run in runs}) == 12
    assert {(r.protocol, r.target_loss, r.schedule, r.epochs) for r in runs} == {
        ("target", 1.5, "constant", 3)
    }
    assert all(run.seed == run.data_seed for run in runs)


def _branch(multiple, loss, seed=0, status="done", at=10, examples=640):
    config = RunConfig("1m", "wordmath", batch_size=4, seed=seed, data_seed=seed)
    about = {
        "multiple": multiple,
        "batch_size": 4 * multiple,
        "lr": 1e-3,
        "at_step": at,
        "at_examples": 4 * at,
    }
    return {
        "status": status, "config": config.to_dict(), "branch": about | {"examples": examples}, "loss": loss,
    }  # fmt: skip


def _branches(excess, shifts=(0.0, 0.05), noise=0.0):
    random = np.random.default_rng(2)
    return [
        _branch(k, 1.0 + shift + e + noise * random.standard_normal() * (k > 1), seed=s)
        for k, e in zip((1, 2, 4, 8), excess, strict=True)
        for s, shift in enumerate(shifts)
    ]


def test_a_branch_within_the_tolerance_is_found():
    one = branched(_branches((0.0, 0.005, 0.01, 0.1)))
    assert one.value == pytest.approx(16, rel=1e-3) and one.low == pytest.approx(one.high, rel=1e-6)
    wide = branched(_branches((0.0, 0.005, 0.015, 0.1), noise=0.003))
    assert 8 < wide.value < 16 and wide.low < wide.value < wide.high
    assert branched(_branches((0.0, 0.005, 0.01, 0.1)), delta=0.005).value == pytest.approx(8, rel=1e-3)


def test_one_batch_that_arrives_shows_no_spread_of_its_seeds():
    rows = [
        _row(1, 2_000, seed=0),
        _row(1, 6_000, seed=1),
        *(_row(64, None, seed=s, seen=20_000) for s in (0, 1)),
    ]
    found = overhead(efficiency(rows))
    assert math.isinf(found.high) and "no interval" in found.note


def test_a_rate_that_no_seed_reached_with_is_not_chosen():
    reached = [_row(64, 9_000, seed=0, lr=1e-3), _row(64, None, seed=1, lr=1e-3, status="diverged")]
    neither = [_row(64, None, seed=s, lr=1e-4) for s in (0, 1)]
    found = efficiency([*_exact(batches=(1,)), *reached, *neither])
    assert found.rates[-1] == 1e-3


def test_branches_that_all_stay_within_it_or_diverge():
    assert branched(_branches((0.0, 0.0, 0.001, 0.002))).note == "beyond the grid"
    rows = _branches((0.0, 0.001, 0.002, 0.003))[:6] + [
        _branch(8, None, seed=s, status="diverged") for s in (0, 1)
    ]
    one = branched(rows)
    assert one.value == pytest.approx(16) and one.note == "diverged at batch 32"
    alone = branched([row for row in _branches((0.0, 0.005, 0.02, 0.1)) if row["config"]["seed"] == 0])
    assert "one seed: no interval" in alone.note and math.isinf(alone.high)


@pytest.mark.parametrize(
    "rows, said",
    [
        ([_branch(2, 1.0)], r"no branch goes on at the trunk's batch \[4\]; seen \[8\]"),
        ([_branch(1, 1.0), _branch(2, 1.0, at=11)], "from one point and of one length"),
        ([_branch(1, 1.0), _branch(2, 1.0, seed=1)], r"no branch at \(batch, seed, data_seed\) \(4, 1, 1\)"),
        ([_branch(1, None, status="diverged"), _branch(2, 1.0)], "trunk's batch diverged"),
    ],
)
def test_branches_that_do_not_belong_together_are_refused(rows, said):
    with pytest.raises(ValueError, match=said):
        branched(rows)
