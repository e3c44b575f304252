"""Norms of single examples: exact against one backward pass per example, or unknown, never another number."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from gns.capture.spread import Spread, kept
from gns.monitor import GNSMonitor, GNSWarning
from gns.segments import stacked
from tests.gns.hiding import Hiding
from tests.gns.matrix_engines import compiler_noise
from tests.gns.small_models import FAMILIES, lora, tokens
from tests.gns.test_monitor import Functional, Reuser, Tied, mlp
from tests.gns.test_segments import LENGTHS, alone, full, pack, sequences
from tests.reference.per_example import contributions, joint, spread, trainable
from tests.reference.tolerances import close

CHECKPOINTING = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")


def found(step):
    return [step.mean_fourth, *step.top_sq_norms]


def rows(n, seed=0, dtype=torch.float64):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def twin(model, calls, scale=1.0):
    """cᵢ of Σ over calls of the mean over its rows of Σ out²."""
    each = [
        lambda r=r, x=x: scale * model(r[None]).square().sum() / len(x) / len(calls) for x in calls for r in x
    ]
    return contributions(trainable(model), each)


def step_on(model, *calls, monitor=None, steps=1, **options):
    """Train on the calls of each step; the last record."""
    with monitor or GNSMonitor(model, on_error="raise", **options) as watched:
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
        for _ in range(steps):
            for x in calls:
                (model(x).square().sum(-1).mean() / len(calls)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return watched.latest


# what is kept


@pytest.mark.parametrize(("n", "few"), [(0, 0), (1, 1), (10, 1), (11, 2), (64, 7), (1000, 100)])
def test_one_example_in_ten_is_kept_rounded_up(n, few):
    assert kept(n) == few
    assert len(Spread.of(np.arange(n)).fields(n)["top_sq_norms"]) == few


def test_the_fields_are_those_of_g():
    fields = Spread.of(np.array([1.0, 3.0, 2.0])).scaled(0.5).fields(3)
    g = 9 * np.array([0.5, 1.5, 1.0])  # ‖gᵢ‖² = n² ‖cᵢ‖²
    close(fields["mean_fourth"], (g**2).mean())
    assert fields["top_sq_norms"] == (g.max(),)


def test_fourth_powers_are_taken_in_float64():
    tiny = np.full(4, 1e-25, dtype=np.float32)
    close(Spread.of(tiny).fourth, 4 * float(tiny[0]) ** 2, rtol=1e-12)
    assert tiny[0] * tiny[0] == 0, "the control: float32 has no such number"


@pytest.mark.parametrize(("total", "fits"), [(6.0, True), (6.0001, True), (6.1, False), (np.nan, False)])
def test_norms_that_do_not_add_up_are_noticed(total, fits):
    assert Spread.of(np.array([1.0, 3.0, 2.0])).fits(total, 1e-4) is fits


def test_norms_that_are_not_finite_never_fit():
    for bad in (np.nan, np.inf):
        assert not Spread.of(np.array([1.0, bad])).fits(bad, 1e-4)


# against the twin


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(6,), (23,), (3, 1, 7)], ids=str)
def test_calls_of_a_step_are_joined(dtype, sizes):
    model, calls = mlp(dtype), [rows(n, seed=n, dtype=dtype) for n in sizes]
    expected = twin(model, calls)
    step = step_on(model, *calls, steps=3)
    close(found(step), spread(expected), dtype)
    close([step.mean_sq_norm, step.sq_norm_of_mean], joint(expected), dtype)


@pytest.mark.parametrize("kind", [Tied, Reuser])
def test_uses_of_one_parameter_meet_before_they_are_squared(kind):
    torch.manual_seed(0)
    model, x = kind().double(), rows(12)
    expected = spread(twin(model, [x]))
    warned = pytest.warns(GNSWarning) if kind is Reuser else contextlib.nullcontext()
    with warned:
        close(found(step_on(model, x, steps=2)), expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_embeddings_and_heads(tied, packed):
    torch.manual_seed(0)
    model = FAMILIES["llama"](tie_word_embeddings=tied).double().eval()
    examples = sequences(LENGTHS if packed else [6] * 11)
    total = sum(len(e) - 1 for e in examples)
    call = pack(examples) if packed else {"input_ids": torch.stack(examples), "labels": torch.stack(examples)}
    step = of_calls(model, call)
    close(found(step), spread(alone(model, examples, total)), rtol=1e-6)


def of_calls(model, *calls, **options):
    with GNSMonitor(model, on_error="raise", **options) as monitor:
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
        for call in calls:
            (model(**call).loss / len(calls)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return monitor.latest


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["LoRA", "full"])
def test_packed_examples_over_two_calls(family, adapter):
    model = lora(family, torch.float64) if adapter == "LoRA" else full(family)
    parts = [sequences(LENGTHS, seed=1), sequences(LENGTHS[::-1], seed=2)]
    total = sum(LENGTHS) - len(LENGTHS)
    expected = [c for part in parts for c in alone(model, part, 2 * total)]
    close(found(of_calls(model, *map(pack, parts))), spread(expected), rtol=1e-6)


class Pictures(nn.Module):
    """A convolution, whose rule does not add over positions, and a layer that has none."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 3, 2), nn.Linear(12, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x.unsqueeze(1))).flatten(1))


class TiedPictures(Pictures):
    """Two convolutions of one kernel."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(1, 1, 3, padding=1), nn.Conv1d(1, 1, 3, padding=1)
        self.second.weight = self.first.weight

    def forward(self, x):
        return super().forward(self.second(torch.tanh(self.first(x.unsqueeze(1)))).squeeze(1))


@pytest.mark.parametrize(("kind", "limit"), [(Pictures, 1), (Pictures, 2**28), (TiedPictures, 2**28)])
def test_rows_of_an_example_are_added_before_they_are_squared(kind, limit):
    torch.manual_seed(0)
    model, x = kind().double(), rows(14)
    pairs = [lambda i=i: sum(model(x[j][None]).square().sum() for j in (i, i + 7)) / 14 for i in range(7)]
    expected = contributions(trainable(model), pairs)
    step = step_on(model, x, segments=stacked(2), max_bytes=limit)
    close(found(step), spread(expected))
    close([step.mean_sq_norm, step.sq_norm_of_mean], joint(expected))


@CHECKPOINTING
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_two_calls(reentrant):
    model = lora("llama", torch.float64)
    plain = of_calls(model, tokens(5), tokens(12, seed=1))
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    step = of_calls(model.train(), tokens(5), tokens(12, seed=1))
    close(found(step), found(plain))
    assert len(step.top_sq_norms) == 2


@CHECKPOINTING
@pytest.mark.parametrize("sizes", [(5, 5), (5, 6)], ids=["alike", "of two sizes"])
def test_two_calls_in_one_reentrant_backward_are_exact_or_unknown(sizes):
    model = lora("llama", torch.float64)
    calls = [tokens(n, seed=n + i) for i, n in enumerate(sizes)]
    with GNSMonitor(model, on_error="raise") as monitor:
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
        for reentrant in (False, True):
            if reentrant:
                model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
                model.enable_input_require_grads()
            sum(model(**call).loss for call in calls).backward()
            optimizer.step()
            optimizer.zero_grad()
        plain, step = monitor.history
    close(step.mean_sq_norm, plain.mean_sq_norm)
    if len(set(sizes)) == 1:  # whose rows a recomputation runs through is not known
        assert (step.mean_fourth, step.top_sq_norms) == (None, ())
    else:
        close(found(step), found(plain))


def test_the_loss_scale_is_undone():
    model, x = mlp(torch.float32), rows(12, dtype=torch.float32)
    expected, scaler = spread(twin(model, [x])), torch.amp.GradScaler("cpu", init_scale=2.0**20)
    with GNSMonitor(model, scaler=scaler, on_error="raise") as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler.scale(model(x).square().sum(-1).mean()).backward()
        scaler.step(optimizer)
        close(found(monitor.latest), expected, torch.float32)


# what is not known


def test_an_excluded_parameter_makes_the_norms_unknown_until_it_no_longer_counts():
    torch.manual_seed(0)
    model, x = Functional().double(), rows(9)
    names = ["honest.weight", "honest.bias", "sly.bias"]
    expected = spread(twin(model, [x]), names)
    with pytest.warns(GNSWarning, match="self-check failed"), GNSMonitor(model, on_error="raise") as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(3):
            model(x).square().sum(-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        first, *later = monitor.history
    assert (first.mean_fourth, first.top_sq_norms) == (None, ())
    assert list(first.layout.names) == names
    for step in later:
        close(found(step), expected)


def test_a_discarded_batch_leaves_nothing():
    model, x = mlp(), rows(9)
    expected = spread(twin(model, [x]))
    with GNSMonitor(model, on_error="raise") as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        model(rows(9, seed=5)).square().sum(-1).mean().backward()
        optimizer.zero_grad()
        model(rows(4, seed=6))  # and one that is never run backward
        model(x).square().sum(-1).mean().backward()
        optimizer.step()
        close(found(monitor.latest), expected)


def test_a_model_that_is_compiled_whole_has_none():
    model, x = mlp(), rows(9)
    torch._dynamo.reset()
    with pytest.warns(GNSWarning, match="call was not seen"), GNSMonitor(model, on_error="raise") as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        torch.compile(model, backend="aot_eager")(x).square().sum(-1).mean().backward()
        optimizer.step()
        step = monitor.latest
    assert step.usable and (step.mean_fourth, step.top_sq_norms) == (None, ())


def test_one_compiled_layer_among_others_makes_them_unknown():
    model, x = mlp(), rows(9)
    torch._dynamo.reset()
    model[0].compile(backend="aot_eager")
    with compiler_noise():
        step = step_on(model, x)
    assert step.call_seen and step.usable and (step.mean_fourth, step.top_sq_norms) == (None, ())


def test_local_statistics_have_none():
    model, x = mlp(), rows(9)
    engine = Hiding(model, lr=0.0)
    with pytest.warns(GNSWarning, match="local statistics"), GNSMonitor(model, on_error="raise") as monitor:
        for _ in range(8):
            model(x).square().sum(-1).mean().backward()
            engine.step()
        step = monitor.latest
    assert step.local and step.usable and (step.mean_fourth, step.top_sq_norms) == (None, ())


def test_only_measured_steps_make_a_leaf():
    model, x = mlp(), rows(3)
    with GNSMonitor(model, every=2, on_error="raise") as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(4):
            model(x).square().sum(-1).mean().backward()
            assert (monitor._collector.now.calls != []) is (monitor._collector.step % 2 == 0)
            optimizer.step()
            optimizer.zero_grad()
        assert [s.mean_fourth is None for s in monitor.history] == [False, False]
