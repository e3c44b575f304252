"""What a row keeps of the noise scale is enough to estimate it again."""

import dataclasses
import json

import pytest
import torch

from experiments.readings import KEPT, readings, steps_of
from gns import GNSMonitor
from gns.estimate import estimate
from gns.statistics.views import progress_weighted
from tests.gns import small_models


def _measured(model, **options):
    with GNSMonitor(model, **options) as monitor:
        small_models.train(model, steps=12)
    return monitor


@pytest.fixture(scope="module", params=["lora", "full", "adam"])
def monitor(request):
    if request.param == "full":
        torch.manual_seed(0)
        return _measured(small_models._llama(tie_word_embeddings=False))
    return _measured(small_models.lora("llama"), metric="adam" if request.param == "adam" else "euclidean")


def test_estimates_from_a_row_are_the_monitors(monitor):
    kept = json.loads(json.dumps(readings(monitor), allow_nan=False))
    for view in (estimate, progress_weighted):
        expected, found = view(monitor.history), view(steps_of(kept))
        assert found.groups.keys() == expected.groups.keys()
        pairs = [(found, expected), *((found.groups[g], expected.groups[g]) for g in expected.groups)]
        for mine, theirs in pairs:
            assert mine.status == theirs.status
            for name in ("b_simple", "low", "high", "trace_sigma", "grad_sq_norm"):
                assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-6, nan_ok=True), (
                    name
                )
    assert found.unit == expected.unit
    assert [s.learning_rate for s in steps_of(kept)] == [s.learning_rate for s in monitor.history if s.usable]


def test_summaries_are_the_estimates(monitor):
    kept, found = readings(monitor, ["a remark"]), monitor.estimate()
    assert kept["remarks"] == ["a remark"]
    assert kept["metric"] == monitor.metric and kept["level"] == 0.95 and kept["every"] == 1
    assert kept["summary"]["joint"]["b_simple"] == found.b_simple
    assert kept["summary"]["joint"]["n_examples"] == found.n_examples
    assert set(kept["summary"]) == {"joint", *found.groups}
    assert set(kept["progress_weighted"]["joint"]) >= set(KEPT)
    assert kept["progress_weighted"]["joint"]["b_simple"] == progress_weighted(monitor.history).b_simple
    assert len(kept["steps"]) + kept["skipped"] == len(monitor.history)
    assert kept["skipped"] == (monitor.metric == "adam")  # the first step has no second moment yet
    assert kept["coverage"] == monitor.coverage().share > 0.9


def test_the_factors_of_lora_are_kept_apart(monitor):
    kept = readings(monitor)
    if "A" in kept["summary"]:
        assert kept["columns"][-4:] == ["m_A", "q_A", "m_B", "q_B"]
        first = dict(zip(kept["columns"], kept["steps"][0], strict=True))
        assert first["m_A"] + first["m_B"] == pytest.approx(first["m"], rel=1e-6)


def test_a_run_without_usable_steps_has_nulls():
    model = small_models.lora("llama")
    with GNSMonitor(model) as monitor:
        pass
    kept = json.loads(json.dumps(readings(monitor), allow_nan=False))
    assert kept["steps"] == steps_of(kept) == [] and kept["skipped"] == 0
    assert kept["summary"]["joint"]["b_simple"] is None
    assert kept["summary"]["joint"]["status"] == "collecting"


def test_a_progress_that_is_not_resolved_says_why(monitor, monkeypatch):
    def refuse(steps):
        raise ValueError("E q_k is negative")

    monkeypatch.setattr("experiments.readings.progress_weighted", refuse)
    assert readings(monitor)["progress_weighted"] == {"unresolved": "E q_k is negative"}


def test_sums_keep_nine_digits(monitor):
    history = [dataclasses.replace(s) for s in monitor.history if s.usable]
    for mine, theirs in zip(steps_of(readings(monitor)), history, strict=True):
        assert mine.grad_sq_norm == pytest.approx(theirs.grad_sq_norm, rel=1e-6)
        assert mine.sum_sq_weights == theirs.sum_sq_weights and mine.step == theirs.step
