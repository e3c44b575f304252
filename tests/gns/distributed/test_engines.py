"""DDP and FSDP2 on real gloo processes: the readings are those of one process on the same examples."""

from __future__ import annotations

import pytest
import torch

from gns.reasons import NO_STATE, SHARDED_STATE
from tests.gns.distributed.cases import BY_NAME, CASES, twin
from tests.reference.tolerances import close

MONITORED = [case for case in CASES if case.monitored and not case.adam]


@pytest.mark.parametrize("case", MONITORED, ids=lambda case: case.name)
def test_readings_equal_one_backward_pass_per_example(ranks, case):
    if case.ranks not in (None, len(ranks)):
        pytest.skip(f"needs {case.ranks} ranks")
    every = case.monitor.get("every", 1)
    expected = {i: e for i, e in enumerate(twin(case, len(ranks))) if i % every == 0}
    for found in (rank[case.name] for rank in ranks):
        assert "error" not in found, found["error"]
        assert found["stopped"] is None and not found["unmeasured"] and not found["warnings"], found
        assert [s["step"] for s in found["steps"]] == list(expected)
        assert found["verified"] == sorted(found["steps"][0]["rows"])
        for step in found["steps"]:
            e = expected[step["step"]]
            assert step["reason"] is None and step["finite"] and step["n"] == e.n
            assert step["weights"] == 1 / e.n  # nothing says that the loss is a mean
            names = list(e.sums)
            assert list(step["rows"]) == names
            close([step["rows"][k] for k in names], [e.sums[k] for k in names], case.tolerance or case.dtype)
            joint = [sum(v[i] for v in e.sums.values()) for i in (0, 1)]
            close([step["m"], step["q"]], joint, case.tolerance or case.dtype)
            close(step["spread"], e.spread, case.tolerance or case.dtype, what="Σ‖g‖⁴/n and the largest ‖g‖²")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rank_holds_the_same(ranks, case):
    assert all(rank[case.name] == ranks[0][case.name] for rank in ranks)


def test_the_optimizers_metric_is_that_of_one_process(ranks):
    expected = twin(BY_NAME["adam"], len(ranks))
    for found in (rank["adam"] for rank in ranks):
        first, *later = found["steps"]
        assert first["reason"] == NO_STATE and first["m"] is None and not found["warnings"]
        for step in later:
            e = expected[step["step"]]
            assert step["reason"] is None and list(step["rows"]) == list(e.in_metric)
            close(list(step["rows"].values()), list(e.in_metric.values()), what="(m, q) in the metric")
        assert found["verified"] == sorted(later[0]["rows"])


def test_a_sharded_second_moment_is_refused(ranks):
    for found in (rank["fsdp adam"] for rank in ranks):
        reasons = [step["reason"] for step in found["steps"]]
        assert reasons == [NO_STATE] + [SHARDED_STATE] * 3 and not found["unmeasured"]


@pytest.mark.parametrize(("on", "off"), [("float32", "unmonitored"), ("fsdp float32", "fsdp unmonitored")])
def test_weights_are_those_of_unmonitored_training(ranks, on, off):
    assert ranks[0][on]["weights"] == ranks[0][off]["weights"]
    assert torch.tensor(ranks[0][on]["weights"][0]).any()


@pytest.mark.parametrize("case", ["shared", "shared, buckets"])
def test_a_weight_gradient_out_of_the_norms_product_is_reduced_like_any(ranks, case):
    """Once a backward pass, in buckets too; equal up to rounding to the run without a monitor."""
    for found in (rank[case] for rank in ranks):
        assert found["shared"] == ["0.weight", "2.weight", "4.weight"]
        for p, q in zip(found["weights"], ranks[0][f"not {case}"]["weights"], strict=True):
            close(p, q, rtol=1e-12)


def test_a_sharded_weight_goes_unshared(ranks):
    assert all(rank["fsdp shared"]["shared"] == [] for rank in ranks)


def test_control_another_factor_is_not_within_the_tolerance(ranks):
    """The mean's twin does not pass for the run whose gradients are divided by 3."""
    wrong, found = twin(BY_NAME["fsdp"], len(ranks))[0], ranks[0]["fsdp divisor"]["steps"][0]
    with pytest.raises(AssertionError, match="ratio"):
        close(found["m"], sum(m for m, _ in wrong.sums.values()))
