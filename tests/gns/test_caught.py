"""Ways in which a number could be wrong without a word, each planted, each caught."""

import contextlib
import copy
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from torch import nn

from gns.estimate import estimate
from gns.monitor import GNSMonitor, GNSWarning
from tests.gns.small_models import SHAPE, _llama, lora, tokens
from tests.reference.per_example import contributions


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batches(k, n=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 5, generator=generator, dtype=torch.float64) for _ in range(k)]


def loss_of(model, x, call=None):
    return (call or model)(x).square().sum(-1).mean()


def truth(model, x):
    """(m, q) over what trains now, one backward pass per example."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses = [lambda i=i: loss_of(model, x[i : i + 1]) / len(x) for i in range(len(x))]
    c = [torch.cat([g.flatten() for g in row.values()]) for row in contributions(named, losses)]
    c = torch.stack(c)
    return len(x) * c.square().sum().item(), c.sum(0).square().sum().item()


def agree(step, expected):
    assert step.reason is None
    assert (step.mean_sq_norm, step.sq_norm_of_mean) == pytest.approx(expected, rel=1e-10)


def go(model, optimizer, x, call=None):
    optimizer.zero_grad()
    loss_of(model, x, call).backward()
    optimizer.step()


def test_a_layer_frozen_in_the_middle_of_a_run_leaves_both_sums():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with GNSMonitor(model, on_error="raise") as monitor:
        for k, x in enumerate(batches(8)):
            if k == 5:
                model[2].requires_grad_(False)
            expected = truth(model, x)
            go(model, optimizer, x)
            agree(monitor.latest, expected)


def test_a_gradient_cleared_before_the_step_is_noticed():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    hook = model[2].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with (
        pytest.warns(GNSWarning, match="no gradient reached it"),
        GNSMonitor(model, on_error="raise") as monitor,
    ):
        go(model, optimizer, batches(1)[0])
        assert set(monitor.coverage().unmeasured) == {"2.weight"}
    hook.remove()


def test_what_becomes_trainable_after_attach_is_listed():
    model = mlp()
    model[2].requires_grad_(False)
    with GNSMonitor(model, on_error="raise") as monitor:
        assert monitor.coverage().share == 1
        model[2].requires_grad_(True)
        assert set(monitor.coverage().unmeasured) == {"2.weight", "2.bias"}
        assert "after `attach()`" in monitor.coverage().reasons["2.weight"]
        assert monitor.estimate().coverage < 1


class Methods(nn.Module):
    """A model whose loop calls its own method, with one layer used twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def logits(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.b(torch.tanh(self.a(x)))))))


def test_rows_that_differ_where_the_call_is_not_seen_are_refused():
    torch.manual_seed(0)
    model = Methods().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with (
        pytest.warns(GNSWarning, match="different numbers of rows"),
        GNSMonitor(model, on_error="raise") as monitor,
    ):
        go(model, optimizer, batches(1)[0], model.logits)
        assert monitor.latest.n_examples == 12 and not monitor.latest.usable


def test_rows_counted_at_the_layers_are_no_examples_in_the_unit():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.warns(GNSWarning, match="own call was not seen") as seen, GNSMonitor(model) as monitor:
        for x in batches(3):
            expected = truth(model, x)
            go(model, optimizer, x, lambda x: model[4](model[3](model[2](model[1](model[0](x))))))
            agree(monitor.latest, expected)
        assert not monitor.latest.call_seen
        assert "rows of the layers' input" in monitor.estimate().unit
    assert len(seen) == 1


@pytest.mark.parametrize("hidden", ["own method", "nested output", "dataclass-like"])
def test_a_gradient_never_zeroed_is_refused_however_the_model_is_called(hidden):
    model = mlp()
    if hidden == "nested output":

        class Nested(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = model

            def forward(self, x):
                return {"out": {"logits": self.net(x)}}

        outer = Nested()
        call = lambda x: outer(x)["out"]["logits"]  # noqa: E731
    elif hidden == "own method":
        outer, call = model, lambda x: model[4](model[3](model[2](model[1](model[0](x)))))
    else:

        class Output:
            def __init__(self, logits):
                self.logits = logits

        class Boxed(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = model

            def forward(self, x):
                return Output(self.net(x))

        outer = Boxed()
        call = lambda x: outer(x).logits  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.warns(GNSWarning), GNSMonitor(outer, on_error="raise") as monitor:
        for x in batches(3):
            loss_of(outer, x, call).backward()
            optimizer.step()  # and no zero_grad
        first, *rest = monitor.history
    assert first.usable
    assert all("before this step's first backward pass" in s.reason for s in rest)


def test_a_batch_norm_is_warned_about():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.warns(GNSWarning) as seen:
        GNSMonitor(model).attach().detach()
    assert any("batch norm" in str(w.message) for w in seen)


def test_an_optimizer_of_copies_is_noticed():
    model = mlp()
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.SGD(copies, lr=0.05)
    with (
        pytest.warns(GNSWarning, match="none owns a measured parameter") as seen,
        GNSMonitor(model) as monitor,
    ):
        for x in batches(12):
            model.zero_grad()
            loss_of(model, x).backward()
            for c, p in zip(copies, model.parameters(), strict=True):
                c.grad = p.grad.clone()
            optimizer.step()
    assert len(seen) == 1 and monitor.history == []


def test_a_bias_alone_keeps_no_input():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 5)
            self.a.weight.requires_grad_(False)

        def forward(self, x):
            x = x * 1.0
            h = self.a(x)
            x += h  # legal: the layer keeps no input for a bias
            return x

    torch.manual_seed(0)
    model = Residual().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with GNSMonitor(model, on_error="raise") as monitor:
        x = batches(1)[0]
        expected = truth(model, x)
        go(model, optimizer, x)
    agree(monitor.latest, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use
def test_function_transforms_and_traces_pass_through_a_watched_model():
    model = mlp()
    twin = copy.deepcopy(model)
    x = batches(1)[0]
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def f(net):
        return lambda p: torch.func.functional_call(net, p, (x,)).square().sum()

    expected = torch.func.grad(f(twin))(parameters)
    tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
    slope = torch.func.jvp(f(twin), (parameters,), (tangents,))[1]
    with GNSMonitor(model, on_error="raise") as monitor:
        found = torch.func.grad(f(model))(parameters)
        assert all(torch.equal(found[name], g) for name, g in expected.items())
        assert torch.equal(torch.func.jvp(f(model), (parameters,), (tangents,))[1], slope)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        truly = truth(model, x)
        go(model, optimizer, x)
    agree(monitor.latest, truly)


def test_a_model_saved_whole_while_watched_loads_without_this_package(tmp_path):
    model = mlp()
    with GNSMonitor(model):
        (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, torch; sys.modules['gns'] = None;"
        "m = pickle.load(open('model.pickle', 'rb'));"
        "m(torch.ones(2, 5, dtype=torch.float64)).sum().backward()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_error_it_stood_down_after_stands_in_the_coverage(monkeypatch):
    from gns import reducers

    def broken(*args):
        raise ArithmeticError("planted")

    model = mlp()
    monkeypatch.setattr(reducers, "sq_norms", broken)
    with pytest.warns(GNSWarning, match="stands down"), GNSMonitor(model) as monitor:
        go(model, torch.optim.SGD(model.parameters(), lr=0.05), batches(1)[0])
        assert "measuring stopped: ArithmeticError: planted" in str(monitor.coverage())


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # of peft, under transformers 5.23
@pytest.mark.parametrize("n", [6, SHAPE["hidden_size"]])
def test_dora_is_measured_though_its_factors_are_called_on_an_identity(n):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_dora=True)
    model = peft.get_peft_model(_llama(), config).double()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    batch = tokens(n, t=5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    counts = batch["labels"][:, 1:].ne(-100).sum(1)
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}

    def one(i):
        logits = model(**{k: v[i : i + 1] for k, v in batch.items() if k != "labels"}).logits[0, :-1]
        return nn.functional.cross_entropy(logits, batch["labels"][i, 1:], reduction="sum", ignore_index=-100)

    c = contributions(named, [lambda i=i: one(i) / counts.sum() for i in range(n)])
    m = n * sum(g.square().sum().item() for row in c for g in row.values())
    joining = pytest.warns(GNSWarning, match="joined") if n == 32 else contextlib.nullcontext()
    with joining, GNSMonitor(model, on_error="raise") as monitor:
        for _ in range(2):  # where a factor's input is as wide as the batch, its first step is one of joining
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        step, coverage = monitor.latest, monitor.coverage()
    assert coverage.share == 1 and any("magnitude" in name for name in coverage.measured)
    assert step.reason is None and step.n_examples == n
    assert step.mean_sq_norm == pytest.approx(m, rel=1e-6)


def test_a_negative_trace_by_chance_gives_a_set_that_begins_at_zero():
    from gns.sums import StepSums

    steps = [StepSums(k, 4, 1.0, 2.0 + 0.01 * (k % 3), sum_sq_weights=0.3) for k in range(30)]
    assert steps[0].trace_sigma < 0 < steps[0].grad_sq_norm
    found = estimate(steps)
    assert found.low == 0 and found.high < 1 and found.status == "measured"


def test_lora_with_a_frozen_factor():
    model = lora("llama", torch.float64)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    sums = []
    with GNSMonitor(model, on_error="raise") as monitor:
        for k in range(2):
            if k:
                for name, p in model.named_parameters():
                    if "lora_A" in name:
                        p.requires_grad_(False)
            optimizer.zero_grad()
            model(**tokens(5)).loss.backward()
            optimizer.step()
            sums.append(monitor.latest)
    assert sums[1].reason is None
    assert sums[1].mean_sq_norm == pytest.approx(sums[0].groups["B"].mean_sq_norm, rel=1e-6)
    assert sums[1].groups["A"].mean_sq_norm == sums[1].groups["A"].sq_norm_of_mean == 0


@pytest.mark.parametrize("closure", [False, True])
def test_a_backward_that_was_not_seen_is_refused_with_and_without_a_closure(closure):
    model, optimizer = mlp(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = batches(1)[0]

    def unseen():
        optimizer.zero_grad()
        loss = loss_of(model, x)
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.grad = g
        return loss

    with GNSMonitor(model, on_error="raise") as monitor, pytest.warns(GNSWarning, match="was noticed"):
        for _ in range(2):
            if closure:
                optimizer.step(unseen)
            else:
                unseen()
                optimizer.step()
        assert len(monitor.history) == 2 and all("was noticed" in s.reason for s in monitor.history)
