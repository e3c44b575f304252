"""What ranks make of the sum of their vectors; the processes themselves are in tests/gns/distributed/."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gns.capture import pooling
from gns.capture.plan import plan
from gns.capture.pooling import Own, Pool, refusal
from gns.capture.projections import K
from gns.capture.ranks import Refused
from gns.capture.readings import Readings, empty
from gns.capture.spread import Spread
from gns.monitor import GNSMonitor
from gns.reasons import APART, IDLE_RANK, LEFTOVER, NO_FACTOR, REASON_ELSEWHERE
from tests.reference.tolerances import close


class FakeRanks:
    def __init__(self, what):
        self.size, self.rank, self.what = 2, 0, what


@pytest.fixture
def pool(monkeypatch, seed):
    monkeypatch.setattr(pooling, "Ranks", FakeRanks)
    return Pool(plan(nn.Linear(3, 2).double()).entries, "")


def readings(s, q=(4.0, 9.0), n=3, **more):
    return Readings(np.array(s), np.array(q), np.full(2, float(n)), n, totals=(5.0, 1.0, 0.5), **more)


def checked(factor):
    """Projections of Σc = 1, 2 on this rank, so of ḡ = factor · (2, 4) on both."""
    a = np.array([1.0, 2.0])[:, None] * np.ones(K)
    return np.stack([a, 2 * factor * a], axis=1)


def total(pool, *owns):
    return sum(pool._vector(own) for own in owns)


def test_sums_add_and_are_scaled_by_the_factor_that_was_found(pool):
    names = ("weight", "bias")
    owns = [
        Own(0, readings([1.0, 2.0]), names, checked(0.5)),
        Own(0, readings([3.0, 5.0]), names, checked(0.5)),
    ]
    found = pool.conclude(total(pool, *owns), owns[0])
    assert pool.factor == 0.5 and found.reason is None and found.n == 6
    close([*found.s, *found.q], [1.0, 1.75, 4.0, 9.0])
    close(list(found.mismatch.values()), [0.0, 0.0])
    assert found.totals == (10.0, 2.0, 1.0)


def joined(pool, *owns):
    """What the thread of each rank makes of both exchanges."""
    first, second = total(pool, *owns), []
    for rank, own in enumerate(owns):
        pool._ranks.rank = rank
        second.append(pool._largest(first, own))
    return first if second[0] is None else np.concatenate([first, sum(second)])


def of_examples(sq_norms, **more):
    return readings([sum(sq_norms), 0.0], n=len(sq_norms), spread=Spread.of(np.array(sq_norms)), **more)


def test_norms_of_single_examples_are_merged_whatever_rank_has_the_largest(pool):
    owns = [Own(0, of_examples([1.0, 2, 3])), Own(0, of_examples([*map(float, range(4, 13)), 50.0, 40.0]))]
    pool.factor = 0.5
    spread = pool.conclude(joined(pool, *owns), owns[0]).spread
    each = np.array([1, 2, 3, *range(4, 13), 50, 40]) / 4  # ‖cᵢ‖² of c as the optimizer sees it
    close([spread.total, spread.fourth], [each.sum(), (each**2).sum()])
    close(spread.fields(14)["top_sq_norms"], 14**2 * np.array([12.5, 10.0]))


def test_norms_that_one_rank_does_not_know_are_not_known(pool):
    owns = [Own(0, of_examples([1.0, 2, 3])), Own(0, readings([1.0, 2.0]))]
    assert pool._largest(total(pool, *owns), owns[0]) is None
    assert pool.conclude(joined(pool, *owns), owns[0]).spread is None


def test_beyond_a_bound_only_the_sums_of_norms_are_exchanged(pool, monkeypatch):
    owns = [Own(0, of_examples([1.0] * 20)), Own(0, of_examples([2.0] * 20))]
    monkeypatch.setattr(pooling, "MOST_LARGEST", 7)  # ranks · ⌈n/10⌉ is 8
    spread = pool.conclude(joined(pool, *owns), owns[0]).spread
    assert spread.total == 15.0 and spread.fields(40)["top_sq_norms"] == ()


def test_a_step_before_the_factor_is_known_has_no_estimate(pool):
    own = Own(0, readings([1.0, 2.0]))
    assert pool.conclude(total(pool, own, own), own).reason == NO_FACTOR


def test_a_step_that_is_not_finite_is_called_that(pool):
    own = Own(0, readings([np.inf, 2.0]))
    found = pool.conclude(total(pool, own, own), own)
    assert found.reason is None and not found.finite


@pytest.mark.parametrize("other", [Own(1, readings([1.0, 2.0])), Own(0, readings([1.0, 2.0]), ("bias",))])
def test_ranks_at_different_steps_stand_down(pool, other):
    own = Own(0, readings([1.0, 2.0]))
    with pytest.raises(Refused) as error:
        pool.conclude(total(pool, own, other), own)
    assert str(error.value) == APART


@pytest.mark.parametrize(("text", "elsewhere"), [(LEFTOVER, LEFTOVER), ("my own words", REASON_ELSEWHERE)])
def test_a_reason_of_one_rank_holds_for_all(pool, text, elsewhere):
    good, bad = Own(0, readings([1.0, 2.0])), Own(0, readings([1.0, 2.0], reason=text))
    assert pool.conclude(total(pool, good, bad), bad).reason == text
    assert pool.conclude(total(pool, good, bad), good).reason == elsewhere


def test_a_rank_without_backward_adds_nothing_but_its_reason(pool):
    own, idle = Own(0, readings([1.0, 2.0])), Own(0, empty(2, reason=None))
    found = pool.conclude(total(pool, own, idle), own)
    assert found.reason == IDLE_RANK and found.n == 3
    close(found.q, [4.0, 9.0])
    assert pool.conclude(total(pool, idle, idle), idle).read is False


def test_the_coarsest_dtype_of_any_rank_counts(pool):
    dtypes = [{"weight": torch.float32, "bias": torch.float64}, {"weight": torch.bfloat16}]
    owns = [Own(0, readings([1.0, 2.0], dtypes=d)) for d in dtypes]
    found = pool.conclude(total(pool, *owns), owns[0])
    assert found.dtypes == {"weight": torch.bfloat16, "bias": torch.float64}


def test_words_about_another_ranks_rows(pool):
    here, there = readings([1.0, 2.0]), readings([1.0, 2.0], misfits={"bias": "seen there"})
    owns = [Own(0, here), Own(0, there)]
    found = [pool.conclude(total(pool, *owns), own).misfits for own in owns]
    assert [list(each) for each in found] == [["bias"], ["bias"]] and found[1]["bias"] == "seen there"


def test_a_plain_model_is_not_refused():
    model = nn.Linear(3, 2)
    assert refusal(model) is None
    with GNSMonitor(model) as monitor:
        assert monitor._collector.pool is None
