"""What a hostile reader found, each with the set-up it was found in: numbers, training, or words that were
wrong."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from gns.capture.placement import Placement, Segments
from gns.examples import row_map
from gns.monitor import GNSMonitor, GNSWarning
from gns.rules import rule_for
from gns.segments import packed
from gns.taps import Tap
from tests.gns.small_models import SHAPE
from tests.reference.tolerances import close


def both(make, loss_of, *, after=lambda model: None, steps=2, autocast=None):
    """Train with and without a monitor, compare all states, and give the monitor and its warnings."""
    states = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = make()
        torch.manual_seed(1)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            monitor = GNSMonitor(model, on_error="raise")
            with monitor if watched else contextlib.nullcontext():
                after(model)
                optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
                for step in range(steps):
                    with torch.autocast("cpu", autocast, enabled=autocast is not None):
                        loss = loss_of(model, torch.Generator().manual_seed(step))
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                if watched:
                    monitor.flush()
        states.append({**copy.deepcopy(model.state_dict()), "rng": torch.get_rng_state()})
    plain, seen = states
    assert plain.keys() == seen.keys()
    changed = [name for name in plain if not torch.equal(plain[name], seen[name])]
    assert not changed, changed
    return monitor, [str(w.message) for w in said if issubclass(w.category, GNSWarning)]


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator)


def on(*shape):
    return lambda model, generator: model(draw(generator, *shape)).square().mean()


# modes


def test_batch_norm_that_is_switched_to_training_after_attach_is_named_and_left_alone():
    def make():
        return nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(4 * 5, 2)).eval()

    monitor, said = both(make, on(6, 2, 7), after=lambda model: model.train())
    assert set(monitor.coverage().unmeasured) == {"1.weight", "1.bias"}
    assert "another mode" in monitor.coverage().reasons["1.weight"]
    assert any("is a batch norm" in text for text in said)


@pytest.mark.parametrize("switched", ["1", "2"])
def test_of_two_layers_alike_only_the_one_in_another_mode_is_left_alone(switched):
    """How rows of one map onto examples is not how those of the other do."""

    def make():
        norms = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        return nn.Sequential(nn.Conv1d(2, 4, 3), *norms, nn.Flatten(), nn.Linear(4 * 5, 2)).eval()

    monitor, _ = both(make, on(6, 2, 7), after=lambda model: model.get_submodule(switched).train())
    reasons = monitor.coverage().reasons
    assert set(reasons) == {f"{switched}.weight", f"{switched}.bias"}
    assert "another mode" in reasons[f"{switched}.weight"]


@pytest.mark.parametrize("training", [False, True])
def test_running_statistics_do_not_move_when_the_norm_is_run_again(training):
    def make():
        norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        return nn.Sequential(nn.Conv1d(2, 4, 3), norm).train(training)

    monitor, said = both(make, on(6, 2, 7))
    assert monitor.coverage().share == 1 and not said


class NoisyNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return nn.functional.dropout(nn.functional.rms_norm(x, (5,)) * self.weight, 0.5, self.training)


def test_a_norm_that_draws_numbers_in_training_draws_none_for_us():
    def make():
        return nn.Sequential(nn.Linear(5, 5), NoisyNorm()).eval()

    monitor, _ = both(make, on(6, 3, 5), after=lambda model: model.train())
    assert set(monitor.coverage().unmeasured) == {"1.weight"}


# shapes that the model sees must not change


def test_position_embeddings_of_another_batch_than_the_calls_are_left_alone():
    config = transformers.BertConfig(**{**SHAPE, "num_key_value_heads": None, "num_hidden_layers": 1})

    def loss_of(model, generator):
        ids = torch.randint(3, 60, (3, 4, 4), generator=generator)  # [examples, choices, tokens]
        return model(input_ids=ids, labels=torch.tensor([0, 1, 2])).loss

    monitor, _ = both(lambda: transformers.BertForMultipleChoice(config).eval(), loss_of)
    assert monitor.history[-1].reason is not None or monitor.coverage().unmeasured  # rows are choices


class Residual(nn.Module):
    """A residual that is added in place after a norm which keeps its own copy of its input."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.last = LlamaRMSNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = self.first(x)
        h += torch.tanh(self.norm(h))
        return self.last(h)


def test_an_input_that_is_changed_in_place_after_the_call_is_named():
    def loss_of(model, generator):
        return model(draw(generator, 4, 3, 6).bfloat16()).float().square().mean()

    monitor, _ = both(lambda: Residual().bfloat16(), loss_of)
    assert set(monitor.coverage().unmeasured) == {"norm.weight"}
    assert "in place after the call" in monitor.coverage().reasons["norm.weight"]


class Places(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(10, 8))

    def forward(self, x):
        return x + self.table[: x.shape[-2]]


def test_a_table_of_positions_is_no_norm():
    assert rule_for(Places()) is None
    assert rule_for(nn.LayerNorm((10, 8))).kind == "Elementwise"
    monitor, _ = both(lambda: nn.Sequential(nn.Linear(8, 8), Places(), nn.Linear(8, 2)), on(4, 7, 8))
    assert set(monitor.coverage().unmeasured) == {"1.table"}


# what is known of the loss


def stub(name, base=nn.Module, **config):
    kind = type(name, (base,), {})
    model = kind()
    if config:
        model.config = type("Config", (), {"is_encoder_decoder": False, **config})()
    return model


LABELS = torch.tensor([[5, 6, -100, -100], [5, 6, 7, 8]])
CALL = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": LABELS}


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("LlamaForCausalLM", 4),
        ("GPT2DoubleHeadsModel", 4),
        ("GPT2LMHeadModel", 4),
        ("BartForCausalLM", 6),
        ("TrOCRForCausalLM", 6),
        ("XLNetLMHeadModel", 6),
        ("BertForMaskedLM", 6),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_which_models_shift_their_labels(name, tokens, wrapped):
    model = stub(name, hidden_size=8)
    if wrapped:
        around = nn.Module()
        around.inner = model
        model = around
    assert int(row_map(model, (), CALL).n_tokens) == tokens


def test_virtual_tokens_predict_the_first_label():
    from types import SimpleNamespace

    model = stub("LlamaForCausalLM", hidden_size=8)
    for kind, tokens in (("PROMPT_TUNING", 6), ("PREFIX_TUNING", 4)):
        model.active_peft_config = SimpleNamespace(is_prompt_learning=True, peft_type=kind)
        assert int(row_map(model, (), CALL).n_tokens) == tokens


def test_a_ctc_loss_weighs_examples_alike():
    call = {"input_values": torch.ones(2, 9), "labels": LABELS}
    assert row_map(stub("Wav2Vec2ForCTC"), (), call).weight_sum is None
    assert row_map(stub("BertForTokenClassification"), (), call).weight_sum is not None


def test_the_text_positions_of_four_rows_of_position_ids_show_packing():
    places = torch.tensor([[0, 1, 2, 0, 1]])
    call = {"position_ids": torch.stack([places, *[torch.arange(5)[None]] * 3])}
    found = packed(call, 1, 5)
    assert found is not None and len(np.unique(found)) == 2


# autocast


class Float32Head(nn.Linear):
    """As heads and routers do that want more digits than autocast gives."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return nn.functional.linear(x.float(), self.weight, self.bias)


def test_a_layer_that_leaves_autocast_sees_its_own_input():
    def loss_of(model, generator):
        return (model(draw(generator, 4, 3, 5)) ** 2).mean()

    def make():
        return nn.Sequential(nn.LayerNorm(5), Float32Head(5, 3))

    monitor, _ = both(make, loss_of, autocast=torch.bfloat16)
    assert monitor.coverage().share == 1


def test_a_hook_of_the_user_sees_the_input_that_it_would_see():
    def make():
        model = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3))
        model.penalty = []
        keep = model.penalty.append
        model[1].register_forward_hook(lambda module, args, out: keep(args[0].square().mean()))
        return model

    def loss_of(model, generator):
        out = model(draw(generator, 4, 3, 5)).float().square().mean()
        return out + model.penalty.pop()

    both(make, loss_of, autocast=torch.bfloat16)


# probing


def test_probing_moves_neither_statistics_of_children_nor_other_random_states():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.norm = nn.Parameter(torch.ones(4)), nn.BatchNorm1d(4, affine=False)

        def forward(self, x):
            return self.norm(x.flatten(0, 1)).reshape(x.shape) * self.weight * random.random()

    class Lucky(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.weight * (random.random() + np.random.rand())

    odd, before = Odd(), None
    before = copy.deepcopy(odd.state_dict())
    python, legacy = random.getstate(), np.random.get_state()[1].tolist()
    assert rule_for(odd) is None and rule_for(Lucky()) is None
    assert all(torch.equal(value, odd.state_dict()[name]) for name, value in before.items())
    assert random.getstate() == python and np.random.get_state()[1].tolist() == legacy


def test_an_embedding_that_does_something_with_ids_is_none():
    class Clamped(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids.clamp(min=0))

    assert rule_for(Clamped(9, 4)) is None


def test_gpt2s_layer_is_known_however_large():
    layer = transformers.pytorch_utils.Conv1D(1, 1)
    layer.weight = nn.Parameter(torch.empty(4097, 4096, device="meta"))
    assert rule_for(layer).kind == "Conv1D"


@pytest.mark.parametrize("limit", [1, 500, 10**6])
def test_rows_of_an_example_are_joined_below_the_bound_on_memory(limit):
    torch.manual_seed(0)
    layer = nn.Conv1d(2, 3, 2).double()
    tap = Tap("conv", layer, rule_for(layer), ("weight", "bias"), limit=limit)
    x, dy = torch.randn(6, 2, 5, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64)
    ids = np.array([0, 1, 0, 2, 1, 0])
    blocks = tap.rule.blocks(layer, x, dy, "weight")
    wanted = torch.stack([blocks[ids == i].sum(0).square().sum() for i in range(3)])
    where = Placement(3, Segments(ids, torch.device("cpu")))
    close(tap.sq_norms(x, dy, "weight", where), wanted)


# engines


def loop():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def test_a_step_whose_last_backward_broke_off_is_refused_and_leaves_out_nothing():
    model = loop()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def broken(gradient):
        raise ArithmeticError("planted")

    with (
        GNSMonitor(model, on_error="raise") as monitor,
        pytest.warns(GNSWarning, match="raised an exception"),
    ):
        for step in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 5, dtype=torch.float64)).square().mean().backward()
            if step == 1:
                out = model[:2](torch.randn(4, 5, dtype=torch.float64))
                out.register_hook(broken)
                with contextlib.suppress(ArithmeticError):
                    model[2](out).square().mean().backward()
            optimizer.step()
        assert [s.reason is None for s in monitor.history] == [True, False, True]
        assert monitor.coverage().share == 1


@pytest.mark.parametrize("together", [True, False])
def test_a_gradient_penalty_between_self_checks_is_refused(together):
    model = loop()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with (
        GNSMonitor(model, on_error="raise") as monitor,
        pytest.warns(GNSWarning, match="graph of a gradient"),
    ):
        for step in range(8):
            optimizer.zero_grad()
            x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
            out = model(x)
            loss = out.square().mean()
            if step == 5:
                (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
                if together:
                    loss = loss + g.square().sum()
                else:
                    g.square().sum().backward(retain_graph=True)
            loss.backward()
            optimizer.step()
        assert [s.step for s in monitor.history if s.reason is not None] == [5]
        assert monitor.coverage().share == 1


def test_a_backward_that_makes_a_graph_but_uses_none_is_exact():
    model, x = loop(), torch.randn(4, 5, dtype=torch.float64)
    with GNSMonitor(model, on_error="raise") as monitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for make in (False, True):
            optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Using backward.. with create_graph")
                model(x).square().mean().backward(create_graph=make)
            optimizer.step()
        plain, graph = monitor.history
    assert graph.reason is None and graph.mean_sq_norm == plain.mean_sq_norm


# the compiler instantiates autograd functions while it traces them
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:the model's own call was not seen:gns.monitor.GNSWarning")
def test_a_compiler_with_dynamic_shapes_goes_through():
    torch._dynamo.reset()
    model = nn.Sequential(
        nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 6), nn.Linear(6, 3)
    ).double()
    with GNSMonitor(model, on_error="raise") as monitor:
        call = torch.compile(model, backend="aot_eager", dynamic=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for n in (8, 5, 7):
            optimizer.zero_grad()
            call(torch.randn(n, 5, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        assert [(s.n_examples, s.reason) for s in monitor.history] == [(8, None), (5, None), (7, None)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_autograd_is_left_alone_and_said():
    torch._dynamo.reset()
    model = loop()

    with torch._dynamo.config.patch(compiled_autograd=True):
        with pytest.warns(GNSWarning, match="compiled autograd is configured"):
            monitor = GNSMonitor(model, on_error="raise").attach()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def step(x):
            model(x).square().mean().backward()

        for _ in range(2):
            optimizer.zero_grad()
            torch.compile(step, backend="eager")(torch.randn(4, 5, dtype=torch.float64))
            optimizer.step()
    monitor.detach()
    assert not monitor.history


def test_a_checkpoint_with_the_monitors_state_is_read_back_with_no_class_of_ours(tmp_path):
    model = loop()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with GNSMonitor(model, on_error="raise") as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 5, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
    torch.save({"monitor": monitor.state_dict()}, tmp_path / "all.pt")
    later = GNSMonitor(model)
    later.load_state_dict(torch.load(tmp_path / "all.pt")["monitor"])
    assert later.history == monitor.history
    assert [list(s.parameters()) for s in later.history] == [list(s.parameters()) for s in monitor.history]
    with pytest.raises(ValueError, match="state has .'history'.; 'next_step', 'layouts' and 'steps'"):
        later.load_state_dict({"history": []})
