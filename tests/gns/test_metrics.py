"""Both sums in the optimizer's own metric, against one backward pass per example and Adam's own recursion."""

from __future__ import annotations

import contextlib
import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from gns.estimate import estimate
from gns.geometry import by_module
from gns.metrics import METRICS, _inverse_roots, adam_roots, of_blocks, of_gradients
from gns.monitor import GNSMonitor, GNSWarning
from gns.notices import PATIENCE
from gns.reasons import COMPILED_METRIC, NO_STATE
from gns.segments import stacked
from tests.gns.capture.test_spread import Pictures, rows
from tests.gns.matrix_engines import compiler_noise
from tests.gns.small_models import FAMILIES, lora, tokens
from tests.gns.test_monitor import Functional, Reuser, Tied, mlp
from tests.gns.test_segments import LENGTHS, alone, pack, sequences
from tests.reference.per_example import contributions, trainable
from tests.reference.preconditioned import SecondMoment, norms, sums
from tests.reference.tolerances import close

OPTIMIZERS = {
    "Adam": (lambda p: torch.optim.Adam(p, lr=1e-2), {}),
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.9), eps=1e-3),
              {"beta": 0.9, "eps": 1e-3}),
    "amsgrad": (lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.9, 0.5), amsgrad=True),
                {"beta": 0.5, "amsgrad": True}),
    "foreach": (lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True), {}),
    "fused": (lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True), {}),
    "NAdam": (lambda p: torch.optim.NAdam(p, lr=1e-2), {}),
    "two groups": (lambda p: torch.optim.Adam([{"params": p[:1]}, {"params": p[1:]}], lr=1e-2), {}),
}  # fmt: skip


def check(step, found, metric, rtol=1e-10):
    """A record against the twin."""
    expected = sums(found, metric)
    assert step.metric == "adam" and step.usable, step.reason
    names = list(step.layout.names)
    rows = step.rows if step.rows.dtype == "float64" else step.rows.astype("float64")
    close(rows, [expected[name] for name in names], rtol=rtol, what=f"(m, q) of {names}")
    close(
        [step.mean_sq_norm, step.sq_norm_of_mean],
        [sum(e[i] for e in expected.values()) for i in (0, 1)],
        rtol=rtol,
    )
    each = sorted(norms(found, metric), reverse=True)
    wanted = [sum(x * x for x in each) / len(each), *each[: -(-len(each) // 10)]]
    close([step.mean_fourth, *step.top_sq_norms], wanted, rtol=rtol, what="Σ(gᵀDg)²/n and the largest gᵀDg")


def train(model, loss_of, batches, make=OPTIMIZERS["Adam"][0], twin=None, **options):
    """Train on lists of calls; yield each record with the contributions and the second moment before it."""
    moment = SecondMoment(**(twin or {}))
    with GNSMonitor(model, metric="adam", on_error="raise", **options) as monitor:
        optimizer = make(list(trainable(model).values()))
        for calls, each in batches:
            found = contributions(trainable(model), each())
            for call in calls:
                loss_of(call).backward()
            before = copy.deepcopy(moment)
            moment.step({name: sum(c[name] for c in found) for name in found[0]})
            optimizer.step()
            optimizer.zero_grad()
            yield monitor.latest, found, before


def plain(model, *sizes, k=4):
    """Batches of a model whose loss is the mean over rows of Σ out²; a call a size."""
    for i in range(k):
        calls = [rows(n, seed=10 * i + j) for j, n in enumerate(sizes)]
        yield (
            calls,
            lambda calls=calls: [
                lambda r=r, x=x: model(r[None]).square().sum() / len(x) / len(calls) for x in calls for r in x
            ],
        )


def mean_of(model, calls=1):
    return lambda x: model(x).square().sum(-1).mean() / calls


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sums_are_those_of_the_metric_before_the_step(name):
    model, (make, twin) = mlp(), OPTIMIZERS[name]
    first, *later = train(model, mean_of(model), plain(model, 12), make, twin)
    assert first[0].reason == NO_STATE and first[0].metric == "adam"
    assert first[0].rows is None and first[0].mean_fourth is None and not first[0].finite
    assert len(later) == 3
    for step, found, moment in later:
        check(step, found, moment)


def test_the_metric_of_the_step_itself_would_be_biased():
    """The control: with this step's gradient in v̂ the sums are others."""
    model = mlp()
    _, (step, found, moment), *_ = train(model, mean_of(model), plain(model, 12))
    moment.step({name: sum(c[name] for c in found) for name in found[0]})
    with pytest.raises(AssertionError, match="ratio"):
        check(step, found, moment, rtol=1e-3)


@pytest.mark.parametrize("kind", [Tied, Pictures])
@pytest.mark.parametrize("limit", [1, 4000, 2**28])
def test_tied_layers_convolutions_accumulation_and_chunks(kind, limit):
    if kind is Tied and limit < 2**28:
        pytest.skip("joined uses need all examples' blocks at once")
    torch.manual_seed(0)
    model = kind().double()
    for step, found, moment in itertools.islice(
        train(model, mean_of(model, 2), plain(model, 5, 8), max_bytes=limit), 1, None
    ):
        check(step, found, moment)


def test_a_layer_called_twice():
    torch.manual_seed(0)
    model = Reuser().double()
    with pytest.warns(GNSWarning, match="more than once per example"):
        _, *later = train(model, mean_of(model), plain(model, 6))
    for step, found, moment in later:
        check(step, found, moment)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["LoRA", "full"])
def test_packed_rows_of_real_families(family, adapter):
    torch.manual_seed(0)
    model = lora(family, torch.float64) if adapter == "LoRA" else FAMILIES[family]().double().eval()
    total = sum(LENGTHS) - len(LENGTHS)
    parts = [sequences(LENGTHS, seed=i) for i in range(3)]
    # families compute in float32 inside: a small ε would magnify what rounding leaves of vanishing gradients
    moment = SecondMoment(eps=1e-2)
    with GNSMonitor(model, metric="adam", on_error="raise") as monitor:
        optimizer = torch.optim.Adam(trainable(model).values(), lr=1e-4, eps=1e-2)
        for part in parts:
            found = alone(model, part, total)
            model(**pack(part)).loss.backward()
            before = copy.deepcopy(moment)
            moment.step({name: sum(c[name] for c in found) for name in found[0]})
            optimizer.step()
            optimizer.zero_grad()
            if before.t:
                check(monitor.latest, found, before, rtol=1e-5)
        assert monitor.coverage().share == 1


def test_pairs_in_layers_that_do_not_add_over_positions():
    torch.manual_seed(0)
    model = Pictures().double()
    calls = [rows(14, seed=i) for i in range(3)]
    pairs = [
        ([x], lambda x=x: [
            lambda i=i: sum(model(x[j][None]).square().sum() for j in (i, i + 7)) / 14 for i in range(7)
        ])
        for x in calls
    ]  # fmt: skip

    def segments(args, kwargs):  # the twin calls the model on single rows
        return stacked(2)(args, kwargs) if len(args[0]) > 1 else np.zeros(1, dtype=int)

    _, *later = train(model, mean_of(model), pairs, segments=segments)
    for step, found, moment in later:
        check(step, found, moment)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant):
    def run(model):
        with GNSMonitor(model, metric="adam", on_error="raise") as monitor:
            optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
            for i in range(3):
                model(**tokens(5, seed=i)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            return [[s.mean_sq_norm, s.sq_norm_of_mean, s.mean_fourth] for s in monitor.history[1:]]

    watched = lora("llama", torch.float64)
    watched.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    watched.enable_input_require_grads()
    close(run(watched.train()), run(lora("llama", torch.float64)), rtol=1e-8)


# what it leaves alone, and what it says


@pytest.mark.parametrize("name", ["AdamW", "amsgrad", "fused"])
def test_weights_and_optimizer_state_stay_bit_identical(name):
    def run(watched):
        model, make = mlp(torch.float32), OPTIMIZERS[name][0]
        optimizer = make(list(model.parameters()))
        monitor = GNSMonitor(model, metric="adam", on_error="raise")
        if watched:
            monitor.attach()
        for i in range(5):
            mean_of(model)(rows(6, seed=i, dtype=torch.float32)).backward()
            optimizer.step()
            optimizer.zero_grad()
        monitor.detach()
        state = [t for s in optimizer.state.values() for t in s.values()]
        return [*model.parameters(), *state]

    assert all(map(torch.equal, run(True), run(False)))


def test_entries_without_a_second_moment_do_not_count():
    """LoRA's factor A has no gradient at initialisation, and so no scale yet at the second step."""
    model = lora("llama", torch.float64, warm=False)
    with GNSMonitor(model, metric="adam", on_error="raise") as monitor:
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
        for i in range(3):
            model(**tokens(5, seed=i)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        _, second, third = monitor.history
    assert second.usable and second.groups["A"].mean_sq_norm == second.groups["A"].sq_norm_of_mean == 0
    assert second.groups["B"].mean_sq_norm > 0
    assert third.groups["A"].mean_sq_norm > third.groups["A"].sq_norm_of_mean > 0
    assert monitor.coverage().share == 1


def test_the_loss_scale_is_undone_in_the_metric_too():
    model, x = mlp(torch.float32), rows(12, dtype=torch.float32)
    scaler, moment = torch.amp.GradScaler("cpu", init_scale=2.0**16), SecondMoment()
    with GNSMonitor(model, metric="adam", scaler=scaler, on_error="raise") as monitor:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
        for _ in range(2):
            scaler.scale(mean_of(model)(x)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        step = monitor.latest
    found = contributions(trainable(model), [lambda r=r: model(r[None]).square().sum() / 12 for r in x])
    moment.step({name: sum(c[name] for c in found) for name in found[0]})
    check(step, found, moment, rtol=1e-4)


def test_an_optimizer_without_second_moments_is_named():
    model = mlp()
    with pytest.warns(GNSWarning, match="SGD keeps no second moment.*take Adam or AdamW"):
        with GNSMonitor(model, metric="adam", on_error="raise") as monitor:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            for calls, _ in plain(model, 6):
                mean_of(model)(calls[0]).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert [s.usable for s in monitor.history] == [False] * 4


def test_waiting_for_state_is_said_only_when_it_lasts():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # keeps nothing at all
    with GNSMonitor(model, metric="adam", on_error="raise") as monitor:
        for i in range(PATIENCE + 1):
            mean_of(model)(rows(6)).backward()
            lasts = pytest.warns(GNSWarning, match="no second moments yet")
            with lasts if i == PATIENCE else contextlib.nullcontext():
                optimizer.step()
                assert monitor.latest.reason == NO_STATE
            optimizer.zero_grad()


def test_a_parameter_that_no_example_reaches_needs_no_state():
    model = mlp()
    model.add_module("idle", nn.Linear(2, 2).double())
    model.forward = lambda x: model[2](model[1](model[0](x)))
    _, *later = train(model, mean_of(model), plain(model, 6))
    for step, found, moment in later:
        moment.v |= {name: torch.zeros_like(c) for name, c in found[0].items() if "idle" in name}
        check(step, found, moment)


def test_an_excluded_parameter_leaves_the_others_exact():
    torch.manual_seed(0)
    model = Functional().double()
    with pytest.warns(GNSWarning, match="self-check failed"):
        first, *later = train(model, mean_of(model), plain(model, 9))
    names = ["honest.weight", "honest.bias", "sly.bias"]
    for step, found, moment in later:
        assert list(step.layout.names) == names
        check(step, [{k: c[k] for k in names} for c in found], moment)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_layers_are_refused(whole):
    model = mlp()
    torch._dynamo.reset()
    call = model
    if whole:
        call = torch.compile(model, backend="aot_eager")
    with compiler_noise(), pytest.warns(GNSWarning, match="compile nothing|no second moments|call was not"):
        with GNSMonitor(model, metric="adam", on_error="raise") as monitor:
            if not whole:
                model[0].compile(backend="aot_eager")
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
            for i in range(5):
                mean_of(call)(rows(6, seed=i)).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert {s.reason for s in monitor.history} == {COMPILED_METRIC}
            assert monitor.coverage().share == 1


def test_steps_between_measured_ones_move_the_metric():
    model = mlp()
    found = [t for t in train(model, mean_of(model), plain(model, 6, k=7), every=3)]
    steps = [found[i] for i in (3, 6)]
    for step, each, moment in steps:
        check(step, each, moment)


def test_other_optimizers_have_no_say():
    model, other = mlp(), nn.Linear(2, 2).double()
    foreign = torch.optim.Adam(other.parameters(), lr=0.1)

    def make(parameters):
        foreign.zero_grad()
        other(torch.ones(1, 2).double()).sum().backward()
        foreign.step()
        return torch.optim.Adam(parameters, lr=1e-2)

    _, *later = train(model, mean_of(model), plain(model, 6), make)
    for step, found, moment in later:
        check(step, found, moment)


@pytest.mark.parametrize("others", range(6))
def test_the_optimizer_that_stepped_last_has_the_say(others):
    """One optimizer trains, then another one, and both stay alive, among some that never step."""
    model, moment = mlp(), SecondMoment(beta=0.5)
    made = [torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.5)) for _ in range(2 + others)]
    with GNSMonitor(model, metric="adam", on_error="raise") as monitor:
        for optimizer, k in ((made[-1], 3), (made[0], 3)):
            moment = SecondMoment(beta=0.5)
            for calls, each in plain(model, 6, k=k):
                found = contributions(trainable(model), each())
                mean_of(model)(calls[0]).backward()
                before = copy.deepcopy(moment)
                moment.step({name: sum(c[name] for c in found) for name in found[0]})
                optimizer.step()
                optimizer.zero_grad()
        check(monitor.latest, found, before)


def test_what_was_read_between_two_optimizers_is_read_again():
    """A forward pass after the first one's step sees only half of the new state."""
    model = mlp()
    first, second = (torch.optim.Adam(list(part.parameters()), lr=1e-2) for part in (model[0], model[2]))
    with GNSMonitor(model, metric="adam", on_error="raise") as monitor:
        for i in range(3):
            mean_of(model)(rows(6, seed=i)).backward()
            first.step()
            model(rows(2))
            second.step()
            second.zero_grad()
            first.zero_grad()
        model(rows(2))
        expected = adam_roots([first, second], dict(model.named_parameters()))
        assert torch.equal(monitor._collector.weights.roots["2.weight"], expected.there["2.weight"])


def test_roots_are_where_the_parameter_is():
    """State that was moved away between steps; the device without memory stands for another one."""
    p, away = (nn.Parameter(torch.zeros(3, 2, device=device)) for device in ("cpu", "meta"))
    p.grad = torch.ones(3, 2)
    optimizer = torch.optim.Adam([p])
    optimizer.step()
    optimizer.param_groups[0]["params"], optimizer.state[away] = [away], optimizer.state.pop(p)
    assert adam_roots([optimizer], {"p": away}).there["p"].device.type == "meta"


def test_mixing_metrics_is_refused():
    model = mlp()
    steps = [t[0] for t in train(model, mean_of(model), plain(model, 6))]
    with GNSMonitor(model, on_error="raise") as monitor:
        mean_of(model)(rows(6)).backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        steps.append(monitor.latest)
    with pytest.raises(ValueError, match="adam, euclidean: their sums do not add"):
        estimate(steps)
    with pytest.raises(ValueError, match="adam, euclidean: their sums do not add"):
        by_module(steps)


# the pieces


def test_the_registry_names_what_is_recorded():
    assert list(METRICS) == ["euclidean", "adam"]
    assert all(name == metric.name for name, metric in METRICS.items())


def test_blocks_and_gradients_are_weighed_alike():
    generator = torch.Generator().manual_seed(0)
    for shape in ((), (3,), (3, 4), (2, 3, 4)):
        blocks = torch.randn(5, *shape, generator=generator, dtype=torch.float64)
        root = torch.rand(shape, generator=generator, dtype=torch.float64)
        squares = blocks.square().reshape(5, -1)
        close(of_blocks(blocks), squares.sum(1))
        weighed = (blocks * root).square().reshape(5, -1).sum(1)
        close(of_blocks(blocks, root), torch.stack([squares.sum(1), weighed], 1))
        close(of_gradients([blocks[0], None], [root, root])[0], weighed[0])
    assert of_gradients([None, torch.ones(2)], [torch.ones(2), None]) == [None, None]


def test_reading_the_state_makes_none():
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([p])
    assert adam_roots([optimizer], {"p": p}).missing == {"p": NO_STATE}
    assert adam_roots([], {"p": p}).missing == {"p": NO_STATE}
    assert not optimizer.state


def test_a_step_count_of_zero_is_no_state():
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([p])
    optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg_sq": torch.zeros(3)}
    assert adam_roots([optimizer], {"p": p}).missing == {"p": NO_STATE}


STRANGE = {
    "flat": {"step": 1.0, "exp_avg_sq": torch.ones(1)},
    "factored": {"step": 1.0, "exp_avg_sq_row": torch.ones(3)},
    "without a step": {"exp_avg_sq": torch.ones(3)},
}


@pytest.mark.parametrize("state", STRANGE.values(), ids=STRANGE)
def test_a_state_that_is_not_understood_is_named(state):
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([p])
    optimizer.state[p] = state
    assert "Adam keeps no second moment" in adam_roots([optimizer], {"p": p}).missing["p"]


def test_a_step_count_on_a_device_gives_the_same_roots():
    v = torch.tensor([0.0, 1e-6, 4.0], dtype=torch.float64)
    correction = (1 - 0.9 ** torch.tensor(3.0, dtype=torch.float64)).sqrt()
    (on_host,), (on_device,) = (_inverse_roots([(v, c, 1e-3)]) for c in (float(correction), correction))
    close(on_device, on_host)
    close(on_host, [0.0, *(1 / ((v[1:] / correction**2).sqrt() + 1e-3)).sqrt().tolist()])
