"""B_noise on real gloo processes: that of one process on all ranks' batches, or one error on all of them."""

from __future__ import annotations

import math

import pytest
import torch

from gns import b_noise
from tests.gns.distributed import curvature
from tests.gns.small_models import lora, tokens
from tests.reference.tolerances import close


def numbers(found):
    """All finite numbers of a result, and where there are others, which."""
    if isinstance(found, dict):
        parts = [numbers(value) for value in found.values()]
        return [x for finite, _ in parts for x in finite], [x for _, others in parts for x in others]
    if not isinstance(found, int | float):
        return [], []
    return ([float(found)], ["finite"]) if math.isfinite(found) else ([], [str(found)])


@pytest.mark.parametrize("name", curvature.ASKED)
def test_the_numbers_are_those_of_one_process(ranks, name):
    assert "error" not in ranks[0]["same_numbers"], ranks[0]["same_numbers"]
    counts = "few" if name == "few" else "many"
    of_ranks = [curvature.batches(counts, rank) for rank in range(len(ranks))]
    for_g, for_h = (curvature.in_order([each[i] for each in of_ranks]) for i in (0, 1))
    expected = curvature.measure(name, for_g, for_h, wrap=False)
    found = ranks[0]["same_numbers"][name]
    assert all(repr(rank["same_numbers"][name]) == repr(found) for rank in ranks)
    assert found["n_examples"] == expected["n_examples"] == sum(len(b["input_ids"]) for b in for_g)
    assert (found["method"], found["status"]) == (expected["method"], expected["status"])
    rtol = 1e-3 if name == "difference" else 1e-10  # each rank finds a step of its own
    for key, value in expected.items():
        (here, others), (there, theirs) = numbers(found[key]), numbers(value)
        assert others == theirs, key
        close(here, there, rtol=rtol, what=key)


def test_control_another_order_gives_other_numbers(ranks):
    """With as few batches, the signs go by place: the ranks' batches one after another are another list."""
    of_ranks = [curvature.batches("few", rank) for rank in range(len(ranks))]
    other = curvature.measure("few", *(sum((each[i] for each in of_ranks), []) for i in (0, 1)), wrap=False)
    found = ranks[0]["same_numbers"]["few"]
    assert abs(other["trace_h_sigma"] / found["trace_h_sigma"] - 1) > 1e-3


def test_during_a_training(found):
    assert all(each == found[0] and each["untouched"] for each in found)
    assert [step for step, *_ in found[0]["readings"]] == [1, 3, 5]
    for (step, *both), weights in zip(found[0]["readings"], found[0]["weights"], strict=True):
        model = lora("gpt2").train()
        model.load_state_dict({n: torch.tensor(w) for n, w in weights.items()}, strict=False)
        for_g, for_h = (
            [tokens(3 + rank, seed=10 * s + rank) for rank in range(len(found))] for s in (step, step - 1)
        )
        probes = min(8, sum(3 + rank for rank in range(len(found))))  # no more than there are examples
        e = b_noise(model, for_g, hessian_batches=for_h, probes=probes, seed=step)
        close(both, [e.trace_h_sigma, e.g_h_g], rtol=1e-4)


REFUSED = {
    "in a loss": "CurvatureError: rank 1: RuntimeError: of its own",
    "gradients": "CurvatureError: rank 1: batch 0 cannot be used",
    "no H": "CurvatureError: rank 1: no batch for g, or none for H",
    "argument": "CurvatureError: rank 0: probes is 1",
    "other arguments": "CurvatureError: rank 0: ranks 0 and 1 have other arguments",
    "other weights": "CurvatureError: rank 0: ranks 0 and 1 have other weights",
    "no loss": "ProbeError: rank 1: the loss is a NoneType",
    "same g": "CurvatureError: rank 0: two batches for g have the same examples",
    "H of another's g": "CurvatureError: rank 0: batch 0 for H of rank 1 has the same examples as one for g",
    "after all that": "nothing: B_noise",
}


@pytest.mark.parametrize(("name", "text"), REFUSED.items())
def test_an_error_on_one_rank_is_the_same_on_all(ranks, name, text):
    assert "error" not in ranks[0]["refusals"], ranks[0]["refusals"]
    found = [rank["refusals"][name] for rank in ranks]
    assert found[0].startswith(text) and found == [found[0]] * len(found), found


def test_sharded(found):
    assert all("is sharded over ranks (fully_shard, FSDP or ZeRO-3)" in each["said"] for each in found)


def test_one_does_not_come(found):
    text = f"NotAll: only 1 of {len(found)} data-parallel ranks came to measure B_noise within 0 s"
    assert found[0]["said"].startswith(text), found[0]
    assert all(each["then"].startswith("nothing: B_noise") for each in found), found


def test_one_is_too_late(found):
    for each in found:
        assert "a data-parallel rank left while B_noise was measured" in each["said"], each
        assert each["seconds"] < 20 and each["then"].startswith("nothing: B_noise"), each
    assert found[0]["said"].endswith("no answer within 0 s")


def test_one_has_no_memory(found):
    """All raise at once; nobody is left to wait in a sum."""
    assert all(each["said"] == "CurvatureError: rank 1: MemoryError: no room for a copy" for each in found), (
        found
    )
    assert all(each["copied"] == 3 and each["seconds"] < 15 for each in found), found
    assert all(each["then"].startswith("nothing: B_noise") for each in found), found


def test_one_has_no_second_derivative(found):
    """All go over to differences, so that no reading is made in two ways."""
    assert [each["method"] for each in found] == ["difference"] * len(found)
    assert found[0]["numbers"] == found[1]["numbers"] and "no second derivative" in str(found[0]["notes"])


def test_one_is_idle(found):
    for each in found:
        assert each["steps"] == [1, 5, 7] and each["stopped"] is None
        told = [text for text in each["warnings"] if "no B_noise" in text]
        assert len(told) == 1 and "rank 1: this data-parallel rank did not call the model" in told[0]
