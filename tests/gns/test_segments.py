"""Examples that are not rows: packed rows and preference pairs, against training on each example alone."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gns.capture.placement import Placement, Segments
from gns.examples import row_map
from gns.monitor import GNSMonitor, GNSWarning
from gns.reasons import NO_LABELS
from gns.rules import LINEAR
from gns.segments import packed, stacked
from tests.gns import tiny
from tests.gns.small_models import FAMILIES, lora
from tests.reference.per_example import contributions, joint, trainable
from tests.reference.tolerances import close

CPU = torch.device("cpu")
LENGTHS = [5, 2, 9, 1, 4]


def sequences(lengths, seed=0, high=61):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, high, (length,), generator=generator) for length in lengths]


def pack(rows: list[torch.Tensor], width: int | None = None):
    """One row [1, T] as TRL and `DataCollatorWithFlattening` make it: labels of first tokens masked."""
    ids = torch.cat(rows)[None]
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    labels = ids.masked_fill(places == 0, -100)
    return {"input_ids": ids, "position_ids": places, "labels": labels, "use_cache": False}


def lengths_of(rows):
    bounds = torch.tensor([0, *np.cumsum([len(row) for row in rows])], dtype=torch.int32)
    longest = max(map(len, rows))
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def index_of(rows):
    return {"seq_idx": torch.cat([torch.full((len(r),), i) for i, r in enumerate(rows)]).int()[None]}


def alone(model, rows, total):
    """One backward pass per example, each in a call of its own, for a token-mean loss over all of them."""

    def loss(row):
        logits = model(input_ids=row[None]).logits[0, :-1]
        logits = logits if logits.dtype is torch.float64 else logits.float()
        return nn.functional.cross_entropy(logits, row[1:], reduction="sum") / total

    return contributions(trainable(model), [lambda row=row: loss(row) for row in rows])


def measured(model, *calls, **options):
    with GNSMonitor(model, on_error="raise", **options) as monitor:
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
        for call in calls:
            (model(**call).loss / len(calls)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return monitor.latest, monitor.coverage()


def full(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["LoRA", "full"])
def test_packed_examples_are_measured_as_if_each_had_its_own_row(family, adapter):
    model = lora(family, torch.float64) if adapter == "LoRA" else full(family)
    rows = sequences(LENGTHS)
    total = sum(LENGTHS) - len(LENGTHS)
    twin = alone(model, rows, total)
    step, coverage = measured(model, pack(rows))
    close([step.mean_sq_norm, step.sq_norm_of_mean], joint(twin), rtol=1e-6, what="(m, q)")
    assert step.n_examples == len(LENGTHS) and step.n_tokens == total and step.reason is None
    weights = (torch.tensor(LENGTHS) - 1).double() / total
    close(step.sum_sq_weights, weights.square().sum(), rtol=1e-6)
    assert coverage.share == 1 and coverage.verified == frozenset(coverage.measured)


@pytest.mark.parametrize("sign", [lengths_of, index_of], ids=["cu_seq_lens_q", "seq_idx"])
def test_the_other_signs_of_packing(sign):
    model, rows = lora("llama", torch.float64), sequences(LENGTHS)
    plain, _ = measured(model, pack(rows))
    call = {**pack(rows), **sign(rows)}
    # beside a mask, position ids say nothing: only the sign does
    call["attention_mask"] = torch.ones_like(call["input_ids"])
    del call["position_ids"]
    with pytest.warns(GNSWarning, match="attention does not keep their examples apart"):
        step, _ = measured(model, call)
    assert step.n_examples == plain.n_examples == len(LENGTHS)
    close(step.sum_sq_weights, plain.sum_sq_weights)
    # the attention is not told, so the numbers are those of one long row, cut where the examples end
    positions = torch.cat([torch.full((len(row),), i) for i, row in enumerate(rows)])
    by_hand, _ = measured(
        model, {k: v for k, v in call.items() if k != "seq_idx" and "_q" not in k and "_k" not in k},
        segments=lambda args, kwargs: positions[None],
    )  # fmt: skip
    close([step.mean_sq_norm, step.sq_norm_of_mean], [by_hand.mean_sq_norm, by_hand.sq_norm_of_mean])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_packing_under_accumulation_and_checkpointing():
    rows = [sequences([5, 2, 9], seed=1), sequences([4, 4], seed=2)]
    total = sum(len(row) - 1 for part in rows for row in part)
    calls = [pack(part) | {"num_items_in_batch": torch.tensor(total / 2)} for part in rows]
    model = lora("llama", torch.float64)
    twin = alone(model, [row for part in rows for row in part], total)
    plain, _ = measured(model, *calls)
    close([plain.mean_sq_norm, plain.sq_norm_of_mean], joint(twin), rtol=1e-6)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.get_base_model().enable_input_require_grads()
    model.train()
    again, coverage = measured(model, *calls)
    assert again.n_examples == 5 and coverage.share == 1
    close([again.mean_sq_norm, again.sq_norm_of_mean], joint(twin), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_reentrant_recomputation_of_one_packed_call_is_exact_and_of_two_at_once_is_refused():
    model = lora("llama", torch.float64)
    parts = [sequences([5, 2, 9], seed=1), sequences([4, 12], seed=2)]
    twin = alone(model, parts[0], 13)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    model.get_base_model().enable_input_require_grads()
    model.train()
    step, _ = measured(model, pack(parts[0]))
    close([step.mean_sq_norm, step.sq_norm_of_mean], joint(twin), rtol=1e-6)
    with GNSMonitor(model, on_error="raise") as monitor:
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
        with pytest.warns(GNSWarning, match="whose rows a recomputation runs through"):
            sum(model(**pack(part)).loss for part in parts).backward()
            optimizer.step()
            assert "recomputation" in monitor.latest.reason
        assert monitor.coverage().share == 1


@pytest.mark.parametrize("known", [True, False], ids=["lengths", "positions alone"])
def test_padding_behind_packed_rows_belongs_to_no_example(known):
    model, rows = lora("llama", torch.float64), sequences([5, 2, 9])
    sign = lengths_of(rows) if known else {}
    call = pack(rows)
    plain, _ = measured(model, call)
    del call["use_cache"]
    padded = {
        name: nn.functional.pad(value, (0, 4), value=-100 if name == "labels" else 0)
        for name, value in call.items()
    }
    step, _ = measured(model, {**padded, **sign, "use_cache": False})
    assert step.n_examples == 3
    close([step.mean_sq_norm, step.sq_norm_of_mean], [plain.mean_sq_norm, plain.sq_norm_of_mean], rtol=1e-6)


# several rows an example


def pairs(n, t=6, seed=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (2 * n, t), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def preference_loss(model, call, n):
    """DPO without its reference: −log σ(log p(chosen) − log p(rejected)), one a pair."""
    ids = call["input_ids"]
    logits = model(**call).logits[:, :-1]
    logits = logits if logits.dtype is torch.float64 else logits.float()
    scores = -nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1)
    return -nn.functional.logsigmoid(scores[:n] - scores[n:])


@pytest.mark.parametrize("adapter", ["LoRA", "full"])
@pytest.mark.parametrize("n", [1, 4])
def test_a_preference_pair_is_one_example_cross_terms_included(adapter, n):
    model = lora("llama", torch.float64) if adapter == "LoRA" else full("gpt2")
    call = pairs(n)

    def one(i):
        return preference_loss(model, {k: v[[i, n + i]] for k, v in call.items()}, 1).sum() / n

    twin = contributions(trainable(model), [lambda i=i: one(i) for i in range(n)])
    with GNSMonitor(model, on_error="raise", segments=stacked(2)) as monitor:
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
        preference_loss(model, call, n).mean().backward()
        one = pytest.warns(GNSWarning, match="at least 2 are needed") if n == 1 else contextlib.nullcontext()
        with one:
            optimizer.step()
        step = monitor.latest
        assert step.n_examples == n and monitor.coverage().share == 1
    close([step.mean_sq_norm, step.sq_norm_of_mean], joint(twin), rtol=1e-6)


class Net(nn.Module):
    """Convolution, channel norm, embedding of one id a row, a head: layers that do not add over positions."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4)
        self.kind, self.head = nn.Embedding(3, 4), nn.Linear(4, 2)

    def forward(self, x, kind):
        h = self.norm(self.conv(x)).tanh().mean(-1)
        return self.head(h + self.kind(kind))


@pytest.mark.parametrize("order", ["stacked", "adjacent", "uneven"])
def test_rows_of_an_example_are_joined_in_every_kind_of_layer(order):
    torch.manual_seed(0)
    model = Net().double()
    x, kind = torch.randn(6, 2, 7, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 1])
    ids = {"stacked": [0, 1, 2, 0, 1, 2], "adjacent": [4, 4, 7, 7, 9, 9], "uneven": [1, 0, 1, 1, -1, 0]}[
        order
    ]
    ids = torch.tensor(ids)
    weight = (ids >= 0).double()

    def loss_of(rows):
        return (model(x[rows], kind[rows]).square().sum(1) * weight[rows]).sum()

    groups = [torch.nonzero(ids == i).flatten() for i in ids.unique() if i >= 0]
    twin = contributions(trainable(model), [lambda rows=rows: loss_of(rows) for rows in groups])
    with GNSMonitor(model, on_error="raise", segments=lambda args, kwargs: ids) as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loss_of(torch.arange(6)).backward()
        optimizer.step()
        step = monitor.latest
        assert step.n_examples == len(groups) and monitor.coverage().share == 1
    close([step.mean_sq_norm, step.sq_norm_of_mean], joint(twin))


def test_packing_that_the_attention_does_not_see_is_said():
    model, rows = lora("llama", torch.float64), sequences(LENGTHS)
    for change in ({"use_cache": True}, {"attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.long)}):
        call = {**pack(rows), **lengths_of(rows), **change}
        with pytest.warns(GNSWarning, match="attention does not keep their examples apart"):
            step, coverage = measured(model, call)
        assert step.n_examples == len(LENGTHS) and coverage.share == 1


# the compiler instantiates autograd functions while it traces them
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_layers_that_are_compiled_cannot_tell_packed_rows_apart():
    model, rows = lora("llama", torch.float64), sequences(LENGTHS)
    torch._dynamo.reset()
    layers = model.get_base_model().model.layers
    with GNSMonitor(model, on_error="raise") as monitor:
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
        layers[0].compile(backend="aot_eager")
        with pytest.warns(GNSWarning, match="compiled cannot tell which rows are whose"):
            model(**pack(rows)).loss.backward()
            optimizer.step()
        coverage = monitor.coverage()
    assert all("layers.0." in name for name in coverage.unmeasured)
    assert all("layers.1." in name for name in coverage.measured) and coverage.measured


def test_a_loss_outside_the_model_is_said():
    call = {"input_ids": torch.ones(4, 5, dtype=torch.long), "num_items_in_batch": torch.tensor(20)}
    assert "no labels" in row_map(nn.Identity(), (), call).notice
    assert row_map(nn.Identity(), (), call, weights="equal").notice is None


def test_a_padded_call_of_a_language_model_without_labels_is_said():
    """Its loss is made outside, and may be a mean over tokens."""
    ids = torch.randint(2, 90, (4, 5))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = tiny.llama()
    assert row_map(model, (), call).notice == NO_LABELS
    assert row_map(nn.Identity(), (), call).notice is None  # no head over tokens: a classifier, an encoder
    assert row_map(model, (), call, weights="equal").notice is None
    assert row_map(model, (), {"input_ids": ids}).notice is None  # nothing is padded
    assert row_map(model, (), call | {"labels": ids}).notice is None
    with pytest.warns(GNSWarning, match="without labels: the loss is made outside") as seen:
        monitor = GNSMonitor(model, on_error="raise").attach()
        for _ in range(3):
            logits = model(**call).logits[:, :-1]
            nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    monitor.detach()
    assert len(seen) == 1


# what is found in a call


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"position_ids": [[0, 1, 2, 0, 1]]}, [[0, 0, 0, 1, 1]]),
        ({"position_ids": [[0, 1, 2, 3, 4]]}, None),
        ({"position_ids": [[0, 1, 2, 0, 0]]}, [[0, 0, 0, -1, -1]]),
        ({"position_ids": [[2, 3, 4, 5, 6]]}, None),
        ({"position_ids": [[0, 0, 0, 1, 2]]}, [[0, 1, 2, 2, 2]]),
        ({"position_ids": [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]}, [[0, 0, 1, 1, 1], [2, 2, 2, 2, 2]]),
        ({"position_ids": [[0, 1, 0, 1, 0]], "attention_mask": [[1, 1, 1, 1, 1]]}, None),
        ({"seq_idx": [[0, 0, 1, 1, 1], [0, 1, 1, 2, -1]]}, [[0, 0, 1, 1, 1], [3, 4, 4, -1, -1]]),
        ({"cu_seq_lens_q": [0, 2, 5]}, [[0, 0, 1, 1, 1]]),
        ({"cu_seq_lens_q": [0, 2, 4]}, [[0, 0, 1, 1, -1]]),
        ({"cu_seq_lens_q": [0, 5]}, None),
        ({"cu_seq_lens_q": [0, 2, 9]}, None),
        ({}, None),
    ],
    ids=str,
)  # fmt: skip
def test_signs_of_packing(kwargs, expected):
    call = {name: torch.tensor(value) for name, value in kwargs.items()}
    rows = max([len(value) for name, value in call.items() if value.ndim == 2], default=1)
    found = packed(call, rows, 5)
    assert (found is None) is (expected is None)
    if expected is not None:
        same = np.equal.outer(found.ravel(), found.ravel())
        wanted = np.equal.outer(np.ravel(expected), np.ravel(expected))
        assert (same == wanted).all() and ((found < 0) == (np.array(expected) < 0)).all()


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (lambda args, kwargs: [0, 1, 2], r"segments has shape \[3\]; \[4\] or \[4, 5\] is needed"),
        (lambda args, kwargs: [0.5] * 4, "segments has dtype float64; integers are needed"),
        ("groups", "segments='groups', but the call has no such keyword argument: .*input_ids"),
        (stacked(3), "the call has 4 rows, which are not 3 for each example"),
    ],
    ids=["shape", "dtype", "name", "stacked"],
)
def test_segments_that_do_not_fit(segments, message):
    with pytest.raises(ValueError, match=message):
        row_map(nn.Identity(), (), {"input_ids": torch.ones(4, 5, dtype=torch.long)}, segments=segments)


def test_a_keyword_argument_may_hold_the_segments():
    call = {"input_ids": torch.ones(4, 5, dtype=torch.long), "group": torch.tensor([3, 1, 3, 1])}
    assert row_map(nn.Identity(), (), call, segments="group").n == 2


def test_one_row_each_is_no_segmentation():
    call = {"input_ids": torch.ones(4, 5, dtype=torch.long)}
    assert row_map(nn.Identity(), (), call, segments=lambda a, k: [5, 3, 9, 0]).segments is None


def test_stacked_needs_rows():
    with pytest.raises(ValueError, match="rows_per_example is 0"):
        stacked(0)


@given(st.lists(st.integers(-1, 6), min_size=1, max_size=40), st.sampled_from([1, 2, 4]))
def test_parts_hold_every_position_once(ids, rows):
    ids = np.array(ids * rows).reshape(rows, -1)
    segments = Segments(ids, CPU)
    x = torch.arange(1.0, ids.size + 1).reshape(*ids.shape, 1)
    found = {}
    for a, dy, examples in Placement(segments.n, segments).parts(LINEAR, x, x):
        assert (a[dy != 0] == dy[dy != 0]).all()
        for each, number in zip(dy, examples.tolist(), strict=True):
            found[number] = sorted(each[each != 0].tolist())
    labels = [label for label in np.unique(ids) if label >= 0]
    assert segments.n == len(labels)
    assert found == {i: (np.flatnonzero(ids == label) + 1.0).tolist() for i, label in enumerate(labels)}


def test_groups_waste_less_than_half_of_their_places():
    lengths = np.random.default_rng(0).integers(1, 500, 60)
    segments = Segments(np.repeat(np.arange(60), lengths)[None], CPU)
    assert sum(there.numel() for _, _, there in segments.groups) < 2 * lengths.sum()
