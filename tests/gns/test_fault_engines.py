"""Engines that skip, wrap, compile or interrupt a step: the readings are of the gradient that is used."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from gns.monitor import GNSMonitor, GNSWarning
from gns.reasons import NO_CALL, UNSEEN
from tests.gns.fault_tools import agree, draw, go, loss_of, mlp, sgd, truth, warned
from tests.gns.matrix_engines import compiler_noise
from tests.gns.matrix_models import batch, build, quiet
from tests.reference.tolerances import close


@pytest.fixture
def model():
    return mlp()


# precision


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_fp16_overflow_is_skipped_and_spoils_no_later_step(seed, fused, accumulate):
    """The scale begins far too high: some steps overflow, and all others have the sums without a scale."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x = draw(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=fused)
    expected, skipped = truth(model, x), 0
    with warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("always", category=GNSWarning)
        with GNSMonitor(model, scaler=scaler, on_error="raise") as monitor:
            for _ in range(14):
                optimizer.zero_grad()
                for part in x.split(len(x) // accumulate):
                    with torch.autocast("cpu", torch.float16):
                        loss = loss_of(model, part) / accumulate
                    scaler.scale(loss).backward()
                before = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                skipped += scaler.get_scale() < before
            history = monitor.history
    assert 2 < skipped < 12
    unusable = [s for s in history if not s.usable]
    assert len(unusable) == (skipped if fused else 0)  # unfused, no optimizer's step is ever called
    assert all(not s.finite and "not finite" in s.reason for s in unusable)
    assert len(warned(said, "not finite")) == bool(unusable)
    assert sum(s.usable for s in history) == 14 - skipped
    for s in history:
        if s.usable:
            agree(s, expected, rtol=1e-2)
            assert s.n_examples == 6 and not s.loss_scaled


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_left_out_of_the_estimate(model, value):
    optimizer = sgd(model, lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GNSWarning)
        with GNSMonitor(model, on_error="raise") as monitor:
            for k in range(24):
                x = draw(seed=k)
                if k == 7:
                    x[2, 3] = value
                optimizer.zero_grad()
                loss_of(model, x).backward()
                for p in model.parameters():
                    p.grad.nan_to_num_(0.0, 0.0, 0.0)  # else the weights are gone
                optimizer.step()
    assert [s.step for s in monitor.history if not s.usable] == [7]
    assert not monitor.history[7].finite and "not finite" in monitor.history[7].reason
    assert monitor.estimate().n_steps == 23 and monitor.estimate().n_examples == 23 * 6
    assert monitor.coverage().share == 1


# optimizers


class SAM(torch.optim.Optimizer):
    """Steps with the gradient at a disturbed point (Foret et al. 2021)."""

    def __init__(self, base, rho=0.1):
        self.base, self.rho = base, rho
        super().__init__(base.param_groups, {})

    @torch.no_grad()
    def climb(self):
        self.moved = [(p, self.rho * p.grad) for g in self.param_groups for p in g["params"]]
        for p, by in self.moved:
            p.add_(by)
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        for p, by in self.moved:
            p.sub_(by)
        self.base.step()


class Lookahead(torch.optim.Optimizer):
    """Every second step pulls the weights halfway back (Zhang et al. 2019)."""

    def __init__(self, base):
        self.base, self.count = base, 0
        super().__init__(base.param_groups, {})
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self.base.step()
        self.count += 1
        for p, slow in zip((p for g in self.param_groups for p in g["params"]), self.slow, strict=True):
            if self.count % 2 == 0:
                p.copy_(slow.lerp_(p, 0.5))


def with_sam(model, x, measured):
    optimizer = SAM(sgd(model))
    for _ in range(4):
        loss_of(model, x).backward()
        optimizer.climb()
        measured(model, x)
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()


def with_lookahead(model, x, measured):
    optimizer = Lookahead(torch.optim.AdamW(model.parameters(), lr=0.01, fused=True))
    for _ in range(4):
        measured(model, x)
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()


def with_a_compiled_optimizer(model, x, measured):
    torch._dynamo.reset()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(4):
        optimizer.zero_grad()
        measured(model, x)
        loss_of(model, x).backward()
        with compiler_noise():
            step()


def with_clipping_by_value_and_noise(model, x, measured):
    """Whatever the loop does to `.grad` after backward is not the examples' doing."""
    optimizer = sgd(model)
    for _ in range(4):
        optimizer.zero_grad()
        measured(model, x)
        loss_of(model, x).backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        for p in model.parameters():
            p.grad.add_(torch.ones_like(p), alpha=0.1)
        optimizer.step()


@pytest.mark.parametrize(
    "loop", [with_sam, with_lookahead, with_a_compiled_optimizer, with_clipping_by_value_and_noise]
)
def test_readings_are_of_the_gradient_that_is_used_and_weights_are_left_alone(model, loop):
    x, twin, expected = draw(), copy.deepcopy(model), []
    loop(twin, x, lambda m, x: expected.append(truth(m, x)))
    with GNSMonitor(model, on_error="raise") as monitor:
        loop(model, x, lambda m, x: None)
    assert len(monitor.history) == len(expected) == 4
    for step, e in zip(monitor.history, expected, strict=True):
        agree(step, e)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_training_step_compiled_with_its_backward_and_optimizer_is_measured(model):
    twin, expected = copy.deepcopy(model), []
    for m in (twin, model):
        torch._dynamo.reset()
        optimizer = sgd(m)

        def step(x, m=m, optimizer=optimizer):
            optimizer.zero_grad()
            loss_of(m, x).backward()
            optimizer.step()

        if m is twin:
            for k in range(3):
                expected.append(truth(m, draw(seed=k)))
                step(draw(seed=k))
            continue
        with warnings.catch_warnings(record=True) as said, compiler_noise():
            warnings.filterwarnings("always", category=GNSWarning)
            with GNSMonitor(m, on_error="raise") as monitor:
                call = torch.compile(step, backend="aot_eager")
                for k in range(3):
                    call(draw(seed=k))
        assert len(warned(said, NO_CALL)) == 1
        assert len(monitor.history) == 3
        for s, e in zip(monitor.history, expected, strict=True):
            agree(s, e)
            assert not s.call_seen
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p, q, what="weights")


# other passes in the middle of a step


def reference_pass(model):
    """As preference losses do: the same model with its adapter off, for logits without a gradient."""
    with model.disable_adapter(), torch.no_grad():
        model(**batch(3, seed=9))


def reference_pass_with_a_graph(model):
    with model.disable_adapter():
        model(**batch(3, seed=9))


def evaluation(model):
    model.eval()
    with torch.inference_mode():
        model(**batch(5, seed=9))
    model.train()


def generation(model):
    model.generate(input_ids=batch(2)["input_ids"], max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("reentrant", [None, False], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("pause", [reference_pass, reference_pass_with_a_graph, evaluation, generation])
def test_other_passes_between_forward_and_backward_change_nothing(pause, reentrant):
    found = []
    for interrupt in (lambda m: None, pause):
        model = build("llama", "lora", torch.float64)
        if reentrant is not None:
            with quiet():
                model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with GNSMonitor(model, on_error="raise") as monitor:
            for k in range(3):
                optimizer.zero_grad()
                loss = model(**batch(seed=k)).loss
                interrupt(model)
                loss.backward()
                interrupt(model)
                optimizer.step()
        assert monitor.coverage().share == 1 and not any(s.reason for s in monitor.history)
        found.append([(s.n_examples, s.mean_sq_norm, s.sq_norm_of_mean) for s in monitor.history])
    assert found[0] == found[1]


def test_attached_between_forward_and_backward_that_step_is_refused_and_the_next_is_right(model):
    optimizer, monitor = sgd(model), GNSMonitor(model, on_error="raise")
    loss = loss_of(model, draw())
    with pytest.warns(GNSWarning, match="no backward pass through the measured layers"), monitor:
        loss.backward()
        optimizer.step()
        expected = truth(model, draw(seed=2))
        go(model, optimizer, draw(seed=2))
    assert monitor.history[0].reason == UNSEEN
    agree(monitor.latest, expected)


def test_detached_between_forward_and_backward_leaves_the_training_alone(model):
    twin = copy.deepcopy(model)
    for m in (model, twin):
        optimizer = sgd(m)
        monitor = GNSMonitor(m, on_error="raise")
        if m is model:
            monitor.attach()
        loss = loss_of(m, draw())
        monitor.detach()
        loss.backward()
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert monitor.history == []
