"""Small things that each kept a planted mistake alive: dtypes, guards, bounds that no other test turns on."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from gns import reducers
from gns.capture import localstats, pooling, projections
from gns.capture.calls import Call, Calls, outputs
from gns.capture.owners import Owners, learning_rate
from gns.capture.placement import Segments, Shape, place
from gns.capture.plan import plan
from gns.capture.pooling import Own, Pool
from gns.capture.projections import K, factor
from gns.capture.readings import Readings
from gns.capture.selfcheck import SelfCheck, tolerance
from gns.examples import row_map
from gns.monitor import GNSMonitor
from gns.reasons import APART
from gns.rules import CONV, DORA, EMBEDDING, LINEAR, rule_for
from gns.rules.base import first_tensor
from gns.rules.probing import MOST, own_parameters
from gns.segments import packed, separated
from tests.gns.small_models import FAMILIES
from tests.reference.per_example import contributions, joint, trainable
from tests.reference.tolerances import close

HALF = {"dtype": torch.float16}


def lora_embedding(table, **options):
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False, **options)
    return peft.get_peft_model(nn.Sequential(table), config).base_model.model[0]


# products of 16-bit numbers: 300 · 300 is infinite in fp16


def test_dora_multiplies_in_float32():
    z = torch.full((1, 1, 1), 300.0, **HALF)
    assert float(reducers.blocks(DORA, nn.RMSNorm(1), z, z, "weight")) == 90_000


def test_lora_on_an_embedding_multiplies_in_float32():
    layer = lora_embedding(nn.Embedding(4, 1)).half()
    nn.init.constant_(layer.lora_embedding_B["default"], 300.0)
    ids, dy = torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1, 1), 300.0, **HALF)
    blocks = reducers.blocks(rule_for(layer), layer, ids, dy, "lora_embedding_A.default")
    assert blocks[0, :, 0].tolist() == [90_000] * 2


def test_a_rule_is_scaled_in_float32():
    x, dy = torch.ones(1, 1, **HALF), torch.full((1, 1), 300.0, **HALF)
    rule = replace(LINEAR, scale=300.0)
    assert float(reducers.blocks(rule, nn.Linear(1, 1), x, dy, "bias")) == 90_000


@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.Conv1d(3, 3, 1), nn.LayerNorm(3)], ids=str)
def test_sums_of_sixteen_bit_blocks_are_float32(layer):
    x = torch.ones(2, 3, 3, dtype=torch.bfloat16)
    for name, _ in layer.named_parameters():
        assert reducers.sum_of_blocks(rule_for(layer), layer, x, x, name).dtype is torch.float32


# calls that cannot be read


def test_a_convolution_called_without_a_batch_dimension_is_not_read():
    layer, x = nn.Conv1d(2, 3, 2), torch.randn(2, 5)
    assert CONV.capture(layer, (x,), {}, layer(x)) is None
    assert CONV.capture(layer, (x[None],), {}, layer(x[None])) is not None


def test_one_of_two_keywords_is_not_guessed():
    x = torch.ones(2, 3)
    assert first_tensor(nn.Identity(), (), {"x": x, "flag": True}, x) is x
    assert first_tensor(nn.Identity(), (), {"x": x, "y": x}, x) is None


def test_a_dora_layer_called_by_keyword_is_not_read():
    x = torch.ones(2, 3)
    assert DORA.capture(nn.RMSNorm(3), (), {"x": x, "base_layer": nn.Linear(3, 3)}, x) is None


# what probing keeps its hands off


def test_probing_leaves_running_statistics_alone():
    layer = nn.BatchNorm1d(4)
    assert rule_for(layer) is None
    assert not layer.running_mean.any() and int(layer.num_batches_tracked) == 0


class Gate(nn.Module):
    """Scales what a layer inside it makes of x."""

    def __init__(self):
        super().__init__()
        self.inner, self.weight = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.inner(x) * self.weight


def test_a_layer_around_another_layer_has_no_rule():
    assert rule_for(Gate()) is None


def test_large_parameters_are_not_probed():
    layer = nn.Linear(2, MOST // 2, bias=False, device="meta")
    assert own_parameters(layer) is not None
    layer.weight = nn.Parameter(torch.empty(2, MOST // 2 + 1, device="meta"))
    assert own_parameters(layer) is None


@pytest.mark.parametrize(
    ("table", "options"),
    [({"sparse": True}, {}), ({"scale_grad_by_freq": True}, {}), ({}, {"use_dora": True})],
    ids=["sparse", "by frequency", "DoRA"],
)
def test_lora_on_an_embedding_that_does_something_else_has_no_rule(table, options):
    assert rule_for(lora_embedding(nn.Embedding(9, 4, **table), **options)) is None


# memory


def test_floats_besides_the_blocks_count_towards_the_limit():
    sizes, layer, x = [], nn.Linear(16, 12), torch.ones(7, 3, 12)
    rule = replace(
        LINEAR,
        sq_norms=None,
        floats=lambda x, dy: 24,
        blocks=lambda m, a, b, p: sizes.append(len(a)) or LINEAR.blocks(m, a, b, p),
    )
    reducers.sq_norms(rule, layer, x, x, "bias", 4 * 2 * (12 + 24))
    assert sizes == [2, 2, 2, 1]


def test_a_norm_counts_its_product_and_the_two_outputs_that_it_makes():
    x = torch.ones(2, 5, 6)
    assert rule_for(nn.LayerNorm(6)).floats(x, x) == 3 * 5 * 6


# an embedding tied to its head


class Tied(nn.Module):
    """Embedding and head on one table; `head` is when the head is called."""

    def __init__(self, table, head="after"):
        super().__init__()
        self.table, self.when = table, head
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = table.weight

    def forward(self, ids):
        if self.when == "before":
            ahead = self.head(self.head.weight.new_ones(len(ids), 1, 4))
            return ahead.sum(-1) + self.table(ids).sum((-2, -1))[:, None]
        h = torch.tanh(self.table(ids))
        return self.head(h) + (self.head(h.square()) if self.when == "twice after" else 0)


@pytest.mark.filterwarnings("ignore:.*joined from the next step on")
@pytest.mark.parametrize(
    "make",
    [
        lambda: Tied(Gemma3TextScaledWordEmbedding(9, 4, 0, embed_scale=2.0)),
        lambda: Tied(nn.Embedding(9, 4), "before"),
        lambda: Tied(nn.Embedding(9, 4), "twice after"),
    ],
    ids=["scaled", "head before embedding", "head twice"],
)
def test_an_unusual_embedding_tied_to_its_head(seed, make):
    model, ids = make().double(), torch.randint(0, 9, (3, 5))
    twin = contributions(trainable(model), [lambda i=i: model(ids[[i]]).pow(3).sum() for i in range(3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GNSMonitor(model, on_error="raise") as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            model(ids).pow(3).sum().backward()
            optimizer.step()
        step, coverage = monitor.latest, monitor.coverage()
    assert coverage.share == 1
    close([step.mean_sq_norm, step.sq_norm_of_mean], joint(twin), rtol=1e-9)


# examples in segments


def step_in_segments(model, x, ids, loss):
    with GNSMonitor(model, on_error="raise", segments=lambda args, kwargs: ids) as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loss(model(x)).backward()
        optimizer.step()
        assert monitor.coverage().share == 1
        return [monitor.latest.mean_sq_norm, monitor.latest.sq_norm_of_mean]


def test_a_tied_embedding_of_packed_examples_of_unlike_lengths_in_one_group(seed):
    model, ids = Tied(nn.Embedding(9, 4)).double(), torch.randint(0, 9, (1, 12))
    parts = (slice(0, 5), slice(5, 12))
    twin = contributions(trainable(model), [lambda at=at: model(ids[:, at]).pow(3).sum() for at in parts])
    found = step_in_segments(model, ids, torch.tensor([[0] * 5 + [1] * 7]), lambda out: out.pow(3).sum())
    close(found, joint(twin), rtol=1e-9)


def test_a_convolution_used_twice_on_examples_of_several_rows(seed):
    conv = nn.Conv1d(2, 2, 1)
    model, x = nn.Sequential(conv, nn.Tanh(), nn.Conv1d(2, 2, 1)).double(), torch.randn(6, 2, 3).double()
    model[2].weight = conv.weight
    twin = contributions(trainable(model), [lambda i=i: model(x[i : i + 3]).pow(3).sum() for i in (0, 3)])
    found = step_in_segments(model, x, torch.tensor([0, 0, 0, 1, 1, 1]), lambda out: out.pow(3).sum())
    close(found, joint(twin), rtol=1e-9)


def test_all_numbers_below_zero_are_no_example_and_carry_no_tokens():
    segments = Segments(np.array([-100, 4, -1, 7, 4]), torch.device("cpu"))
    assert segments.n == 2
    assert segments.per_example(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])).tolist() == [18.0, 8.0]


# how rows of an activation map onto examples

PACKED_ROWS = Segments(np.array([[0, 0, 1, 1], [2, 2, 2, 3]]), torch.device("cpu"))


@pytest.mark.parametrize(
    ("rule", "x", "shape", "segments", "fits"),
    [
        (LINEAR, torch.ones(5, 3), Shape(5, 5), None, True),  # pooled, as many examples as positions
        (EMBEDDING, torch.ones(5, dtype=torch.long), Shape(5, 5), None, False),
        (EMBEDDING, torch.ones(1, 5, dtype=torch.long), Shape(3, 5), None, True),
        (EMBEDDING, torch.ones(5, dtype=torch.long), Shape(3, 5), None, False),
        (LINEAR, torch.ones(6, 8), Shape(3, 2), None, True),
        (CONV, torch.ones(6, 8, 7), Shape(3, 2), None, False),
        (LINEAR, torch.ones(2, 3, 4, 8), Shape(2, 4), PACKED_ROWS, True),
        (LINEAR, torch.ones(2, 4, 4, 8), Shape(2, 4), PACKED_ROWS, False),  # as many heads as positions
    ],
)
def test_rows_are_placed_only_where_there_is_one_way(rule, x, shape, segments, fits):
    found = place(rule, x, shape, shape.rows, segments, shareable=True)
    assert (found.misfit is None) is fits


def test_of_rows_with_numbers_of_their_own_one_below_zero_is_no_example():
    call = {"input_ids": torch.ones(4, 5, dtype=torch.long)}
    assert row_map(nn.Identity(), (), call, segments=lambda args, kwargs: [5, -1, 3, 0]).n == 3


# signs of packing


@pytest.mark.parametrize(
    ("sign", "value", "expected"),
    [
        ("seq_idx", [[0, 0, 1, 1, 1], [0, 1, 1, -1, -1]], [[0, 0, 1, 1, 1], [2, 3, 3, -1, -1]]),
        ("position_ids", [[0, 0, 0, 0, 0], [0, 1, 2, 3, 4]], [[0, -1, -1, -1, -1], [1, 1, 1, 1, 1]]),
        ("cu_seq_lens_q", [0, 2, 3], [[0, 0, -1, -1, -1], [-1] * 5]),  # one position before the padding
        ("cu_seq_lens_q", [2, 4, 7], [[-1, -1, 0, 0, 1], [1, 1, -1, -1, -1]]),
        ("cu_seq_lens_q", [0, 10], [[0] * 5, [0] * 5]),  # one example in two rows
    ],
)
def test_signs_of_packing_in_two_rows(sign, value, expected):
    found = packed({sign: torch.tensor(value)}, 2, 5)
    labels = np.unique(found[found >= 0])
    assert np.where(found < 0, -1, np.searchsorted(labels, found)).tolist() == expected


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_checkpointing_forbids_the_cache_in_training_only():
    model = FAMILIES["llama"]()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    call = {"position_ids": torch.tensor([[0, 1, 0, 1]]), "use_cache": True}
    assert separated(model.train(), call)
    assert not separated(model.eval(), call)


# which call a layer is in

CPU = torch.device("cpu")


@pytest.fixture
def tap():
    return plan(nn.Linear(3, 2)).taps[0]


def calls_of(*groups):
    """Rows of one call each on four rows, with the examples given."""
    calls = Calls(nn.Identity(), "auto", lambda args, kwargs: kwargs["group"])
    return calls, [calls.begin((), {"x": torch.ones(4, 3), "group": torch.tensor(g)}) for g in groups]


@pytest.mark.parametrize(
    ("groups", "ambiguous"),
    [([[0, 1, 2, 3]] * 2, False), ([[0, 1, 2, 3], [0, 0, 1, 1]], True), ([[0, 0, 1, 1]] * 2, True)],
    ids=["rows", "one of segments", "both of segments"],
)
def test_two_calls_run_backward_at_once_are_told_apart_only_by_rows(tap, groups, ambiguous):
    calls, rows = calls_of(*groups)
    calls.end()
    running = [Call(each) for each in rows]
    where = calls.place(tap, torch.ones(4, 3), CPU, running, in_backward=True)
    assert where.ambiguous is ambiguous and where.each is None
    alone = calls.place(tap, torch.ones(4, 3), CPU, running[:1], in_backward=True)
    assert alone.each is running[0].each(CPU, torch.float32) and not alone.ambiguous


def test_a_recomputation_of_unknown_origin_belongs_to_the_latest_call(tap):
    calls, _ = calls_of([0, 1, 2, 3], [0, 0, 1, 1])
    calls.end()
    assert calls.place(tap, torch.ones(4, 3), CPU, [], in_backward=True).n == 2
    assert calls.place(tap, torch.ones(4, 3), CPU, [], in_backward=False) is None


def test_the_second_use_of_a_layer_in_a_call_is_told(tap):
    calls, _ = calls_of([0, 1, 2, 3])
    assert [calls.used_again(tap) for _ in range(3)] == [False, True, True]


def test_outputs_without_a_gradient_are_no_outputs():
    weight, aside = torch.ones(1, requires_grad=True), torch.ones(1)
    loss = 2 * weight
    assert [id(t) for t in outputs((loss, aside, weight))] == [id(loss)]  # nor is a parameter


# the self-check


@pytest.fixture
def two(seed):
    """Two layers of one shape; the third shares the weight of the first."""
    model = nn.Sequential(
        nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    )
    model[2].weight = model[0].weight
    found = plan(model.double())
    return model, found, SelfCheck(found.entries)


def test_all_uses_of_a_parameter_add_to_one_check_sum_wherever_it_moves(two):
    _, found, check = two
    check.begin(0)
    (first, _), (last, _) = found.entries[0].sites
    assert first.checks["weight"] is last.checks["weight"]
    check.follow(first, torch.device("meta"))
    assert first.checks["weight"] is last.checks["weight"] and first.checks["weight"].is_meta


def test_a_parameter_taken_apart_after_attach_is_not_compared(two):
    model, _, check = two
    model[1].weight.data = torch.empty(0, dtype=torch.float64)
    check.begin(0)
    assert check.open_names() == ("0.weight",)


def test_everything_is_opened_on_demand(two):
    _, _, check = two
    names = ("0.weight", "1.weight")
    check.begin(0)
    check.end()
    check.conclude(names, names, usable=True)
    check.begin(1)
    assert check.open_names() == ()
    check.begin(1, everything=True)
    assert check.open_names() == names


def test_each_parameter_is_projected_by_signs_of_its_own(two):
    _, _, check = two
    check.begin(0)
    one, other = check.compare([torch.ones(3, 3, dtype=torch.float64)] * 2, seed=5)
    assert not torch.equal(one[1].abs(), other[1].abs())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_below_the_rounding_of_the_whole_gradient_is_tolerated(dtype):
    assert 0 < tolerance(dtype, 0.0, 0.0, whole=1.0) < 100 * torch.finfo(dtype).eps


# what ranks make of a step


class FakeRanks:
    def __init__(self, what):
        self.size = 2


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(pooling, "Ranks", FakeRanks)
    return Pool(plan(nn.Linear(3, 2).double()).entries, "")


def own(s, q, n, totals=(5.0, 1.0, 0.5), **more):
    return Own(0, Readings(np.array(s), np.array(q), np.full(2, float(n)), n, totals=totals, **more))


def pooled(pool, *owns):
    return pool.conclude(sum(pool._vector(each) for each in owns), owns[0])


def test_tokens_and_weights_that_one_rank_does_not_know_are_unknown(pool):
    known, unknown = own([1.0, 2.0], [4.0, 9.0], 3), own([1.0, 2.0], [4.0, 9.0], 3, (math.nan,) * 3)
    assert pooled(pool, known, known).totals == (10.0, 2.0, 1.0)
    assert all(math.isnan(each) for each in pooled(pool, known, unknown).totals)


def test_local_statistics_of_two_ranks_give_the_step_that_stands_for_both(pool):
    owns = [own([1.0, 2.0], [4.0, 9.0], 3, local=True), own([3.0, 1.0], [5.0, 2.0], 5, local=True)]
    each = [localstats.parts(o.readings) for o in owns]
    fields = [getattr(each[0], name) + getattr(each[1], name) for name in ("pairs", "free", "grad", "trace")]
    n, s, q = localstats.step(localstats.Parts(*fields))
    found = pooled(pool, *owns)
    assert found.reason is None and found.local and found.n == n
    close([*found.s, *found.q], [*s, *q])


def test_local_statistics_on_one_rank_only_are_no_step(pool):
    here, there = own([1.0, 2.0], [4.0, 9.0], 3, local=True), own([3.0, 1.0], [400.0, 900.0], 3)
    assert pooled(pool, here, there).reason == APART


def test_a_factor_is_rounded_within_its_own_relative_tolerance():
    a = np.ones(K)
    assert factor({"a": (a, 0.25 * (1 + 5e-4) * a)}, 4, rtol=1e-3) == 0.25
    assert factor({"a": (a, 0.25 * (1 + 2e-3) * a)}, 4, rtol=1e-3) == pytest.approx(0.25 * (1 + 2e-3))


def test_entries_are_held_as_often_as_the_mesh_replicates_them(monkeypatch):
    monkeypatch.setattr(projections, "is_sharded", lambda tensor: True)
    mesh, axes = SimpleNamespace(shape=(2, 3)), (Replicate(), Shard(0))
    assert projections.copies(SimpleNamespace(device_mesh=mesh, placements=axes), 6) == 2
    assert projections.copies(SimpleNamespace(device_mesh=mesh, placements=axes[1:] * 2), 6) == 1


def test_one_example_with_all_the_weight_is_no_batch():
    assert localstats.parts(own([1.0, 2.0], [4.0, 9.0], 3, (5.0, 1.0, 1.0)).readings).pairs == 0


def test_rows_and_tokens_are_scaled_to_one_step():
    assert localstats.rounded(np.array([49.0]), 49, 1).tolist() == [1.0]  # 49 · (1/49) is below 1
    assert localstats.scaled_tokens(100.0, 8, 4) == 50


# optimizers


def test_each_late_parameter_is_named_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    optimizer, owners = torch.optim.SGD(model.parameters()), Owners(model, (), ())
    model[1].requires_grad_(False)
    said = []
    for layer in model:
        layer.weight.requires_grad_().grad = torch.ones(2, 2)
        said.append(owners.late(optimizer))
    assert said == [["0.weight"], ["1.weight"]]


def test_the_learning_rate_is_the_largest_of_the_groups():
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.1, 0.3, 0.2)]
    assert learning_rate(torch.optim.SGD(groups)) == 0.3
