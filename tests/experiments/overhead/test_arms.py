"""The benchmark compares like with like: every arm makes the same step and measures the same norms."""

import pytest
import torch

from experiments.overhead.arms import OURS, PEERS, Arm, Backpack, Direct, Gram, Monitored
from experiments.overhead.settings import batches, build
from gns.rules import linear
from tests.experiments.overhead.rows_by_hand import setting

PACKAGE = {"opacus": "opacus", "backpack": "backpack"}


def stepped(kind, given):
    """Parameters after one step, and the norms the arm made."""
    arm = kind(given, build(given, "cpu"))
    arm.step(batches(given, "cpu")[0])
    return arm, [p.detach().clone() for p in arm.trained]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", PEERS, ids=lambda k: k.name)
def test_peers_measure_the_norms_that_the_monitor_measures(kind):
    for word, package in PACKAGE.items():
        if word in kind.name:
            pytest.importorskip(package)
    watched, weights = stepped(Monitored, setting())
    arm, peer = stepped(kind, setting())
    found = watched.monitor.latest
    watched.close()
    assert float(arm.sq_norms.mean()) == pytest.approx(found.mean_sq_norm, rel=1e-4)
    assert len(arm.sq_norms) == 3
    for mine, theirs in zip(weights, peer, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", OURS, ids=lambda k: k.name)
def test_our_arms_make_the_untouched_step_bit_for_bit(kind):
    given = setting(accumulate=2)
    _, plain = stepped(Arm, given)
    arm, watched = stepped(kind, given)
    arm.close()
    assert all(map(torch.equal, plain, watched))


def test_arms_share_what_is_frozen_and_nothing_else():
    model = build(setting(), "cpu")
    first, second = Arm(setting(), model), Arm(setting(), model)
    pairs = list(zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert any(a is b for a, b in pairs)
    assert all((a is b) != a.requires_grad for a, b in pairs)


def test_an_arm_that_stood_down_is_not_timed(monkeypatch):
    arm = Monitored(setting(), build(setting(), "cpu"))
    with pytest.raises(RuntimeError, match="'monitor': 0 steps"):
        arm.close()


@pytest.mark.parametrize(("kind", "name"), [(Direct, "_direct_sq_norms"), (Gram, "linear_sq_norms_gram")])
def test_an_arm_held_to_one_form_uses_it_alone(kind, name, monkeypatch):
    used = []
    for each in ("_direct_sq_norms", "linear_sq_norms_gram"):
        own = getattr(linear, each)
        monkeypatch.setattr(linear, each, lambda *a, own=own, each=each: used.append(each) or own(*a))
    arm, _ = stepped(kind, setting(rank=None))
    arm.close()
    assert set(used) == {name}
    assert linear.gram_is_cheaper(torch.empty(1, 2, 9), torch.empty(1, 2, 9))


def test_adapters_on_the_first_layers_only():
    model = build(setting(adapted=3), "cpu")
    assert len([n for n, p in model.named_parameters() if p.requires_grad]) == 6


def test_backpack_names_the_layers_that_it_has_no_rule_for():
    pytest.importorskip("backpack")
    with pytest.raises(NotImplementedError, match="no rule for Embedding and LlamaRMSNorm"):
        Backpack(setting(rank=None), build(setting(rank=None), "cpu"))
