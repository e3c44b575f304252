"""Readings of B_noise during a training: taken where they should be, written, and never in the loop's way."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch

from gns import GNSMonitor, b_noise, load
from gns.curvature.readingsfile import CURVATURE, cut_readings, read_readings, reading_of, record_of
from gns.monitor import GNSWarning
from gns.records import RecordsError
from gns.segments import stacked
from tests.gns.small_models import lora, tokens, train
from tests.reference.tolerances import close


def loop(model, steps, *, monitor=None, batch=8, external_loss=False):
    """Train; each step's batch is `tokens(batch, seed=step)`."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        given = tokens(batch, seed=step)
        if external_loss:
            labels = given.pop("labels")
            logits = model(**given).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        else:
            model(**given).loss.backward()
        yield step
        optimizer.step()


def test_a_reading_is_that_of_b_noise_on_the_last_two_steps_batches():
    model = lora("llama").train()
    with GNSMonitor(model, curvature_every=3) as monitor:
        expected = []
        for step in loop(model, 7):
            if step in (2, 5):
                monitor_off = [dict(m._forward_hooks) for m in model.modules()]
                from gns.curvature.watching import unhooked

                with unhooked(model):
                    expected.append(
                        b_noise(
                            model,
                            [tokens(8, seed=step)],
                            hessian_batches=[tokens(8, seed=step - 1)],
                            seed=step,
                            contributions=False,
                        )
                    )
                assert monitor_off == [dict(m._forward_hooks) for m in model.modules()]
        found = monitor.curvature
    assert [r.step for r in found] == [2, 5] and found[0].learning_rate == 1e-2
    for reading, e in zip(found, expected, strict=True):
        close(
            [reading.estimate.trace_h_sigma, reading.estimate.g_h_g], [e.trace_h_sigma, e.g_h_g], rtol=1e-12
        )
    assert len(monitor.history) == 7 and all(s.usable for s in monitor.history)


def test_the_cost_is_told_in_steps_of_the_training_without_its_readings(monkeypatch):
    from gns.curvature import watching

    now, read = [0.0], watching.CurvatureWatch._read

    def slow(self, *given):
        now[0] += 30
        return read(self, *given)

    monkeypatch.setattr(watching, "perf_counter", lambda: now[0])
    monkeypatch.setattr(watching.CurvatureWatch, "_read", slow)
    with GNSMonitor(lora("llama").train(), curvature_every=2) as monitor:
        for _ in loop(monitor.model, 5):
            now[0] += 2
        first, second = (r.estimate.cost for r in monitor.curvature)
    assert first.step_seconds == second.step_seconds == 2
    assert second.steps == second.seconds / 2 and second.tapped_passes > 1
    assert math.isnan(dataclasses.replace(second, step_seconds=None).steps)


class Regression(torch.nn.Module):
    """Linear regression that gives its loss; at weight w, with x ~ N(0, 1), G = w − target and H = 1."""

    def __init__(self, d):
        super().__init__()
        self.linear = torch.nn.Linear(d, 1, bias=False).double()

    def forward(self, x, labels):
        return {"loss": 0.5 * (self.linear(x) - labels).square().mean()}


def test_g_is_not_taken_on_examples_that_the_weights_have_just_been_moved_by():
    torch.manual_seed(0)
    d, found, expected = 8, [], []
    model = Regression(d).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    with GNSMonitor(model, curvature_every=2) as monitor:
        for _ in range(300):
            x = torch.randn(16, d).double()
            model(x=x, labels=x.sum(1, keepdim=True) + torch.randn(16, 1).double()).get("loss").backward()
            expected.append(float((model.linear.weight.detach() - 1).square().sum()))
            optimizer.step()
            optimizer.zero_grad()
        found = monitor.curvature
    off = np.array([r.estimate.g_h_g - expected[r.step] for r in found[10:]])
    assert abs(off.mean()) < 4 * off.std(ddof=1) / math.sqrt(len(off))


def test_a_loop_may_write_its_batches_into_the_same_tensors():
    numbers = []
    for static in (False, True):
        model, kept = lora("llama").train(), tokens(8)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        with GNSMonitor(model, curvature_every=2) as monitor:
            for step in range(4):
                given = tokens(8, seed=step)
                if static:
                    for name, value in given.items():
                        kept[name].copy_(value)
                    given = kept
                model(**given).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        numbers.append([(r.estimate.trace_h_sigma, r.estimate.g_h_g) for r in monitor.curvature])
    assert len(numbers[0]) == 2 and numbers[0] == numbers[1]


def test_a_reading_is_made_under_the_autocast_of_the_training():
    model, seen = lora("llama").train(), []
    model.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with GNSMonitor(model, curvature_every=2) as monitor:
        train(model, steps=2, accumulate=1, autocast=torch.bfloat16)
    assert len(monitor.curvature) == 1 and len(seen) > 4 and all(seen)


@pytest.mark.parametrize("whole", [False, True])
def test_of_a_step_of_many_calls_eight_are_kept_and_evaluation_is_none(whole):
    model = lora("llama").train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with GNSMonitor(model, curvature_every=2) as monitor:
        for step in range(2):
            model.eval()
            model(**tokens(5, seed=1000 + step))
            model.train()
            for call in range(10):
                n = {"num_items_in_batch": 480} if whole else {}
                model(**tokens(3, seed=20 * step + call), **n).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    (reading,) = monitor.curvature
    expected = b_noise(
        model,
        [tokens(3, seed=20 + call) for call in range(8)],
        hessian_batches=[tokens(3, seed=call) for call in range(8)],
        seed=1,
    )
    assert reading.estimate.n_examples == 24 and reading.estimate.n_hessian == 8
    assert reading.estimate.unit == expected.unit and expected.trace_h_sigma != 0
    assert 0.3 < reading.estimate.trace_sigma / expected.trace_sigma < 3  # one small step later


def test_pairs_and_the_same_batch_again():
    model = lora("llama").train()
    with GNSMonitor(model, curvature_every=2, segments=stacked(2)) as monitor:
        list(loop(model, 2))
    assert [(r.estimate.n_examples, r.estimate.probes) for r in monitor.curvature] == [(4, 4)]
    assert monitor.curvature[0].estimate.n_hessian == 1  # no pair is cut in two
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with pytest.warns(GNSWarning, match="same examples") as told:
        with GNSMonitor(model, curvature_every=2) as monitor:
            for _ in range(4):
                optimizer.zero_grad()
                model(**tokens(8)).loss.backward()
                optimizer.step()
    assert not monitor.curvature and not any("`labels`" in str(w.message) for w in told)


SETUPS = {"plain": {}, "autocast": {"autocast": torch.bfloat16}, "one call": {"accumulate": 1}}
EVERY = [  # each setup, and each spacing of the other readings; the other three pairs are slow
    pytest.param(setup, every, marks=[] if fast else [pytest.mark.slow], id=f"{setup}-{every}")
    for setup, now in (("plain", 2), ("autocast", 1), ("one call", 2))
    for every in (1, 2)
    for fast in [every == now]
]


@pytest.mark.parametrize(("setup", "every"), EVERY)
def test_training_and_its_other_readings_are_bit_identical(setup, every):
    setup = SETUPS[setup]
    plain = lora("llama", dropout=0.1).train()
    with GNSMonitor(plain, every=every) as alone:
        weights = train(plain, steps=6, **setup)
    watched = lora("llama", dropout=0.1).train()
    with GNSMonitor(watched, every=every, curvature_every=2) as monitor:
        found = train(watched, steps=6, **setup)
    assert all(torch.equal(a, b) for a, b in zip(weights, found, strict=True))
    assert len(monitor.curvature) == 3
    assert [s.mean_sq_norm for s in monitor.history] == [s.mean_sq_norm for s in alone.history]
    assert [s.sq_norm_of_mean for s in monitor.history] == [s.sq_norm_of_mean for s in alone.history]


def test_what_goes_wrong_is_told_once_and_training_goes_on():
    model = lora("llama").train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with GNSMonitor(model, curvature_every=2) as monitor:
            list(loop(model, 8, external_loss=True))
    told = [str(w.message) for w in caught if issubclass(w.category, GNSWarning)]
    assert len([t for t in told if "no B_noise at optimizer step 1" in t]) == 1
    assert "given `labels` and returns `loss`" in told[-1]
    assert not monitor.curvature and len([s for s in monitor.history if s.usable]) == 8


@pytest.mark.parametrize("contributions", [False, True])
def test_readings_are_written_and_read_back(tmp_path, contributions, undrawn):
    model, sink = lora("llama").train(), tmp_path / "run" / "steps.jsonl"
    how = {"curvature_every": 2, "curvature_contributions": contributions}
    with GNSMonitor(model, sink=sink, **how) as monitor:
        list(loop(model, 6))
        monitor.report(tmp_path / "run")
        monitor.report(tmp_path / "other")
    for folder in ("run", "other"):
        found = load(tmp_path / folder).curvature
        assert [r.step for r in found] == [1, 3, 5]
        for read, there in zip(found, monitor.curvature, strict=True):
            a, b = (dataclasses.asdict(r.estimate) for r in (read, there))
            assert repr(a) == repr(b)  # NaN and infinities too
            groups, modules = read.estimate.groups, read.estimate.modules
            assert set(groups) == {"A", "B"} and modules if contributions else groups is modules is None
    cut_readings(tmp_path / "run", 3)
    assert [r.step for r in read_readings(tmp_path / "run")] == [1, 3]
    (rate,) = {
        type(reading_of(record_of(dataclasses.replace(r, learning_rate=math.nan))).learning_rate)
        for r in found
    }
    assert rate is float  # and not the word that stands for it
    path = tmp_path / "run" / CURVATURE
    path.write_bytes(path.read_bytes()[:-5])
    assert [r.step for r in read_readings(tmp_path / "run")] == [1]  # a last line cut short
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(RecordsError, match="line 1: malformed or foreign"):
        read_readings(tmp_path / "run")


def test_the_largest_eigenvalue_is_read_where_it_is_asked_for_and_stands_in_the_report(tmp_path, undrawn):
    model = lora("llama").train()
    with GNSMonitor(model, curvature_every=2, curvature_spectrum=6) as monitor:
        for _ in loop(model, 2):
            pass
        (found,) = monitor.curvature
        page = monitor.report(tmp_path).read_text()
    trained = lora("llama").train()
    list(loop(trained, 1))
    how = {"hessian_batches": [tokens(8, seed=0)], "seed": 1, "spectrum": 6}
    expected = b_noise(trained, [tokens(8, seed=1)], **how)
    close(found.estimate.largest_eigenvalue, expected.largest_eigenvalue, rtol=1e-6)
    assert found.estimate.largest_eigenvalue > 0
    assert f"λ_max ≥ {expected.largest_eigenvalue:.3g}" in page
    assert f"2/λ_max = {expected.max_learning_rate:.3g}" in page and "1 reading of about" in page


def test_few_rows_make_few_probes_and_say_so():
    model = lora("llama").train()
    with GNSMonitor(model, curvature_every=2) as monitor:
        list(loop(model, 2, batch=4))
    (reading,) = monitor.curvature
    assert reading.estimate.probes == 4 and reading.estimate.status == "collecting"
    assert math.isfinite(reading.estimate.trace_h_sigma)
