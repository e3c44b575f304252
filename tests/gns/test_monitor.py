"""The monitor on plain modules: what it measures, what it leaves out and says, what it leaves behind."""

import copy
import gc
import pickle
import re
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from gns.monitor import GNSMonitor, GNSWarning
from gns.sums import StepSums


class Reuser(nn.Module):
    """One linear layer called twice, then another."""

    def __init__(self):
        super().__init__()
        self.twice, self.head = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.twice(torch.tanh(self.twice(x))))


class Tied(nn.Module):
    """Two layers that share one weight and keep their own biases."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Functional(nn.Module):
    """One layer whose weight is also used without calling the module."""

    def __init__(self):
        super().__init__()
        self.honest, self.sly = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = torch.tanh(self.honest(x))
        return self.sly(hidden) + 3 * hidden @ self.sly.weight.T


class Bypassed(Functional):
    """One layer that is never called as a module."""

    def forward(self, x):
        return torch.tanh(self.honest(x)) @ self.sly.weight.T


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def loss_of(model, x):
    return model(x).square().sum(-1).mean()


def truth(model, x, parameters):
    """(m, q) by one backward pass per example; equal weights."""
    grads = []
    for row in x:
        found = torch.autograd.grad(loss_of(model, row[None]), parameters, allow_unused=True)
        grads.append(
            torch.cat(
                [
                    torch.zeros(p.numel()).to(p) if g is None else g.flatten()
                    for g, p in zip(found, parameters, strict=True)
                ]
            )
        )
    stacked = torch.stack(grads)
    return stacked.square().sum(1).mean().item(), stacked.mean(0).square().sum().item()


def run(model, monitor, batches, *, set_to_none=True):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    expected = []
    for x in batches:
        parameters = [p for p in model.parameters() if p.requires_grad]
        expected.append(truth(model, x, parameters))
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model, x).backward()
        optimizer.step()
    return expected


def batches(k=4, n=6, dtype=torch.float64, seed=1, extra=()):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *extra, 5, generator=generator, dtype=dtype) for _ in range(k)]


def agree(step, expected, tolerance=1e-10):
    m, q = expected
    assert step.reason is None
    assert step.mean_sq_norm == pytest.approx(m, rel=tolerance)
    assert step.sq_norm_of_mean == pytest.approx(q, rel=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_each_step_equals_one_backward_pass_per_example(dtype, tolerance, set_to_none):
    model = mlp(dtype)
    with GNSMonitor(model, on_error="raise") as monitor:
        expected = run(model, monitor, batches(dtype=dtype), set_to_none=set_to_none)
    assert len(monitor.history) == len(expected) == 4
    for step, e in zip(monitor.history, expected, strict=True):
        agree(step, e, tolerance)


def test_a_module_called_twice_is_joined_with_its_cross_terms_from_the_second_step_on():
    torch.manual_seed(0)
    model = Reuser().double()
    with pytest.warns(GNSWarning, match="called more than once per example"):
        with GNSMonitor(model, on_error="raise") as monitor:
            expected = run(model, monitor, batches())
            first, *rest = monitor.history
    assert "joined from the next step on" in first.reason
    for step, e in zip(rest, expected[1:], strict=True):
        agree(step, e)
    assert monitor.coverage().share == 1


def test_without_its_cross_terms_a_module_called_twice_would_be_wrong():
    torch.manual_seed(0)
    model = Reuser().double()
    x = batches()[0]
    m, _ = truth(model, x, list(model.parameters()))
    inputs = []
    handle = model.twice.register_forward_hook(lambda module, args, out: inputs.append((args[0], out)))
    loss = loss_of(model, x)
    handle.remove()
    naive = 0
    for i, o in inputs:
        dy = torch.autograd.grad(loss, o, retain_graph=True)[0] * len(x)
        naive += ((i.square().sum(1) + 1) * dy.square().sum(1)).mean().item()
    head = [torch.autograd.grad(loss_of(model, r[None]), list(model.head.parameters())) for r in x]
    naive += torch.stack([torch.cat([g.flatten() for g in gs]).square().sum() for gs in head]).mean().item()
    assert naive != pytest.approx(m, rel=1e-2)


def test_tied_weights_are_joined_from_the_first_step_on():
    torch.manual_seed(0)
    model = Tied().double()
    with GNSMonitor(model, on_error="raise") as monitor:
        expected = run(model, monitor, batches())
    for step, e in zip(monitor.history, expected, strict=True):
        agree(step, e)
    assert monitor.coverage().share == 1
    assert "first.weight" in monitor.coverage().verified


def test_a_weight_also_used_functionally_leaves_both_sums_and_is_named():
    torch.manual_seed(0)
    model = Functional().double()
    with pytest.warns(GNSWarning, match="sly.weight"):
        with GNSMonitor(model, on_error="raise") as monitor:
            data = batches()
            kept = [model.honest.weight, model.honest.bias, model.sly.bias]
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            for x in data:
                expected = truth(model, x, kept)
                optimizer.zero_grad()
                loss_of(model, x).backward()
                optimizer.step()
                agree(monitor.latest, expected)
    coverage = monitor.coverage()
    assert set(coverage.unmeasured) == {"sly.weight"}
    assert "self-check failed" in coverage.reasons["sly.weight"]


def test_a_parameter_whose_tap_never_fires_is_listed():
    torch.manual_seed(0)
    model = Bypassed().double()
    with pytest.warns(GNSWarning, match="never fired"):
        with GNSMonitor(model, on_error="raise") as monitor:
            run(model, monitor, batches())
            coverage = monitor.coverage()
    assert "never fired" in coverage.reasons["sly.weight"]
    assert "no example has reached it" in coverage.reasons["sly.bias"]
    assert set(coverage.measured) == {"honest.weight", "honest.bias"}


class Gated(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(features))

    def forward(self, x):
        return x * torch.sigmoid(self.gate)


def test_a_trainable_parameter_without_a_rule_is_named_and_warned_about_once():
    model = nn.Sequential(nn.Linear(5, 5), Gated(5), nn.Linear(5, 3)).double()
    with pytest.warns(GNSWarning, match=r"`1` \(Gated\): no per-example rule") as seen:
        with GNSMonitor(model, on_error="raise") as monitor:
            run(model, monitor, batches())
    assert len(seen) == 1
    assert set(monitor.coverage().unmeasured) == {"1.gate"}
    assert 0 < monitor.coverage().share < 1


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Linear(2, 2).requires_grad_(False), "no trainable parameter.*add an adapter"),
        (nn.Bilinear(4, 4, 2), "none of the 2 trainable parameters.*no per-example rule"),
        (nn.Identity(), "no trainable parameter"),
    ],
)
def test_a_model_with_nothing_to_measure_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        GNSMonitor(model).attach()
    assert not model._forward_hooks


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"every": 0}, "every is 0"),
        ({"every": 1.5}, "every is 1.5"),
        ({"history": -1}, "history is -1"),
        ({"weights": "none"}, "weights is 'none'; known: 'auto', 'tokens', 'equal'"),
        ({"metric": "l1"}, "metric is 'l1'; known: 'euclidean', 'adam'"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"max_bytes": 0}, "max_bytes is 0; a whole number of bytes"),
        ({"curvature_every": 0}, "curvature_every is 0"),
        ({"curvature_spectrum": 3}, "curvature_spectrum is 3 and curvature_every None"),
        ({"curvature_contributions": True}, "curvature_contributions is True and curvature_every None"),
        ({"curvature_spectrum": -1}, "curvature_spectrum is -1; a whole number of products"),
    ],
)
def test_a_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GNSMonitor(mlp(), **kwargs)


def test_segments_that_are_no_function_are_refused():
    with pytest.raises(TypeError, match="segments is a list; a function of .args, kwargs., the name of a"):
        GNSMonitor(mlp(), segments=[1])


def test_a_model_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match="model is a str"):
        GNSMonitor("llama")


def test_one_that_was_never_attached_says_so(tmp_path):
    for asked in (GNSMonitor.estimate, lambda monitor: monitor.report(tmp_path / "run")):
        with pytest.warns(
            GNSWarning, match=r"never attached, so nothing was measured: call attach\(\)"
        ) as seen:
            asked(GNSMonitor(mlp()))
        assert len(seen) == 1
    with pytest.raises(RuntimeError, match="never attached"):
        GNSMonitor(mlp()).coverage()


def test_numpy_counts_are_whole_numbers():
    assert GNSMonitor(mlp(), every=np.int64(2), history=np.int32(5)).every == 2
    with pytest.raises(ValueError, match="every is "):
        GNSMonitor(mlp(), every=np.float64(2))


def test_attaching_twice_raises_and_the_first_goes_on():
    model = mlp()
    monitor = GNSMonitor(model, on_error="raise").attach()
    with pytest.raises(RuntimeError, match="attached already"):
        monitor.attach()
    with pytest.raises(RuntimeError, match="another GNSMonitor"):
        GNSMonitor(model).attach()
    run(model, monitor, batches(2))
    assert len(monitor.history) == 2
    monitor.detach()
    monitor.detach()
    GNSMonitor(model).attach().detach()


def test_nothing_is_left_after_detach():
    from torch.optim import optimizer as hooks

    model = mlp()
    before = {name: sorted(vars(module)) for name, module in model.named_modules()}
    global_hooks = len(hooks._global_optimizer_pre_hooks), len(hooks._global_optimizer_post_hooks)
    monitor = GNSMonitor(model, on_error="raise").attach()
    run(model, monitor, batches(2))
    monitor.detach()
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == before
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
    for p in model.parameters():
        assert not p._backward_hooks and not p._post_accumulate_grad_hooks
    assert (len(hooks._global_optimizer_pre_hooks), len(hooks._global_optimizer_post_hooks)) == global_hooks
    assert len(monitor.history) == 2


def test_a_forgotten_monitor_and_its_model_are_freed():
    model = mlp()
    monitor = GNSMonitor(model, on_error="raise").attach()
    run(model, monitor, batches(2))
    seen = weakref.ref(model)
    del model, monitor
    gc.collect()
    assert seen() is None


def test_copies_and_pickles_of_the_model_carry_inert_hooks():
    model = mlp()
    monitor = GNSMonitor(model, on_error="raise").attach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        loss_of(twin, batches()[0]).backward()
        optimizer.step()
    assert monitor.history == []
    expected = run(model, monitor, batches(1))
    agree(monitor.latest, expected[0])
    monitor.detach()


def test_every_k_measures_one_step_in_k_and_taps_nothing_in_between():
    model, fired = mlp(), []
    with GNSMonitor(model, every=3, on_error="raise") as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for x in batches(7):
            optimizer.zero_grad()
            loss = loss_of(model, x)
            fired.append(any("TapFunction" in name for name in graph_names(loss.grad_fn)))
            loss.backward()
            optimizer.step()
    assert [s.step for s in monitor.history] == [0, 3, 6]
    assert fired == [True, False, False, True, False, False, True]


def graph_names(node, seen=None):
    seen = set() if seen is None else seen
    if node is None or node in seen:
        return []
    seen.add(node)
    return [node.name()] + [n for f, _ in node.next_functions for n in graph_names(f, seen)]


def test_n_counts_what_was_run_backward_not_what_was_run_forward():
    model = mlp()
    x = batches(1, n=6)[0]
    with GNSMonitor(model, on_error="raise") as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model(x)  # a forward pass nobody runs backward
        with torch.no_grad():
            model(x)
        torch.autograd.grad(loss_of(model, x), list(model.parameters()))  # reaches no `.grad`
        loss_of(model, x).backward()
        with torch.no_grad():
            model(x)
        optimizer.step()
    assert monitor.latest.n_examples == 6
    assert monitor.latest.reason is None


def test_the_same_graph_run_backward_twice_is_refused():
    model = mlp()
    with pytest.warns(GNSWarning, match="backward twice"), GNSMonitor(model, on_error="raise") as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        loss = loss_of(model, batches()[0])
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        assert "backward twice" in monitor.latest.reason


def test_a_gradient_left_over_from_before_is_refused():
    model = mlp()
    loss_of(model, batches()[0]).backward()
    with pytest.warns(GNSWarning, match="zero the gradients"), GNSMonitor(model, on_error="raise") as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        loss_of(model, batches()[0]).backward()
        optimizer.step()
        assert "before this step's first backward pass" in monitor.latest.reason
        assert monitor.coverage().share == 1


def test_one_example_is_recorded_with_its_reason():
    model = mlp()
    with pytest.warns(GNSWarning, match="at least 2"), GNSMonitor(model, on_error="raise") as monitor:
        run(model, monitor, batches(1, n=1))
        assert monitor.latest.n_examples == 1
    assert monitor.estimate().status == "collecting"


def test_a_nan_loss_is_recorded_as_not_finite_and_does_not_touch_the_next_step():
    model = mlp()
    bad, good = batches(2)
    bad[0, 0] = float("nan")
    with pytest.warns(GNSWarning, match="not finite"), GNSMonitor(model, on_error="raise") as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for x in (bad, good):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            for p in model.parameters():
                p.grad.nan_to_num_(0.0) if x is bad else None
            optimizer.step()
        first, second = monitor.history
    assert not first.finite and "not finite" in first.reason
    agree(second, truth(model, good, list(model.parameters())))


def test_an_error_of_ours_never_reaches_the_loop(monkeypatch):
    from gns import reducers

    def broken(*args):
        raise ArithmeticError("planted")

    model, twin = mlp(), mlp()
    with pytest.warns(GNSWarning, match="stands down.*planted") as seen:
        with GNSMonitor(model) as monitor:
            run(model, monitor, batches(2))
            monkeypatch.setattr(reducers, "sq_norms", broken)
            run(model, monitor, batches(2))
    assert len(seen) == 1
    assert len(monitor.history) == 2
    run(twin, None, batches(2))
    run(twin, None, batches(2))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_an_exception_in_the_users_backward_is_survived():
    class Boom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise KeyError("the user's own")

    model = mlp()
    x = batches()[0]
    with GNSMonitor(model, on_error="raise") as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        hidden = model[1](model[0](x))
        with pytest.raises(KeyError):
            model[2](Boom.apply(hidden)).sum().backward()
        optimizer.zero_grad()
        expected = truth(model, x, list(model.parameters()))
        loss_of(model, x).backward()
        optimizer.step()
    agree(monitor.latest, expected)


class Wrapper(torch.optim.Optimizer):
    """Steps another optimizer, as Lookahead and schedule-free wrappers do: PRE and POST fire twice."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        return self.inner.step()


@pytest.mark.parametrize("every", [1, 2])
def test_a_wrapped_optimizer_is_one_step(every):
    model = mlp()
    optimizer = Wrapper(torch.optim.SGD(model.parameters(), lr=0.05))
    with GNSMonitor(model, every=every, on_error="raise") as monitor:
        for x in batches(6):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
    assert [s.step for s in monitor.history] == list(range(0, 6, every))
    assert not any(s.reason for s in monitor.history)


def test_sink_and_state_carry_the_readings_on():
    model, received = mlp(), []
    with GNSMonitor(model, sink=received.append, on_error="raise") as monitor:
        run(model, monitor, batches(3))
    assert received == monitor.history and isinstance(received[0], StepSums)
    later = GNSMonitor(model, on_error="raise")
    later.load_state_dict(monitor.state_dict())
    with later:
        run(model, later, batches(2, seed=9))
    assert [s.step for s in later.history] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="'next_step', 'layouts' and 'steps'"):
        GNSMonitor(model).load_state_dict({"steps": []})


def test_history_is_bounded_and_estimate_takes_the_last():
    model = mlp()
    with GNSMonitor(model, history=5, on_error="raise") as monitor:
        run(model, monitor, batches(8))
    assert [s.step for s in monitor.history] == [3, 4, 5, 6, 7]
    assert monitor.estimate(last=2).n_steps == 2
    with pytest.raises(ValueError, match="last is 0"):
        monitor.estimate(last=0)


def test_learning_rate_stands_beside_the_step():
    model = mlp()
    with GNSMonitor(model, on_error="raise") as monitor:
        run(model, monitor, batches(1))
    assert monitor.latest.learning_rate == 0.05


def test_steps_share_one_small_array_each():
    model = mlp(torch.float32)
    with GNSMonitor(model, on_error="raise") as monitor:
        run(model, monitor, batches(3, dtype=torch.float32))
    first, *rest = monitor.history
    assert first.rows.shape == (4, 2) and first.rows.nbytes == 32
    assert all(s.layout is first.layout for s in rest)


@pytest.mark.slow
def test_ten_thousand_steps_leak_nothing():
    import tracemalloc

    model = mlp(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = batches(1, dtype=torch.float32)[0]
    with GNSMonitor(model, history=100, on_error="raise") as monitor:

        def go(k):
            for _ in range(k):
                optimizer.zero_grad()
                loss_of(model, x).backward()
                optimizer.step()
            gc.collect()

        go(500)
        tracemalloc.start()
        objects, memory = len(gc.get_objects()), tracemalloc.get_traced_memory()[0]
        go(10_000)
        assert len(gc.get_objects()) - objects < 200
        assert tracemalloc.get_traced_memory()[0] - memory < 200_000
        tracemalloc.stop()
    assert len(monitor.history) == 100


def test_a_report_is_read_back_as_what_was_measured(tmp_path):
    import gns

    model = mlp()
    with GNSMonitor(model, sink=tmp_path / "live.jsonl", on_error="raise") as monitor:
        run(model, monitor, batches(25))
        page = monitor.report(tmp_path / "run", settings={"learning_rate": 0.05})
    assert page == tmp_path / "run" / "report.html" and page.stat().st_size > 10_000
    assert {p.name for p in page.parent.iterdir()} >= {"steps.jsonl", "summary.json", "noise_scale.png"}
    back = gns.load(tmp_path / "run")
    assert back == monitor.estimate() and back.status != "collecting"
    assert list(back.history) == monitor.history
    assert (tmp_path / "live.jsonl").read_text() == (tmp_path / "run" / "steps.jsonl").read_text()
