"""Every kind of adapter starts as the base, from its seed alone, and trains what it should."""

import copy
import dataclasses

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

from experiments.adapters import adapted
from experiments.configs import ADAPTERS, RunConfig, RunError
from gns.finetuning.preparation import linear_layers
from tests.gns import small_models, tiny

RUN = RunConfig("tiny", "test", rank=3, alpha=6)
FRESH = [kind for kind in ADAPTERS if kind != "foundation"]
FACTORS = {"lora_A.default.weight", "lora_B.default.weight"}
TRAINS = {"full": {"weight"}, "dora": FACTORS | {"lora_magnitude_vector.default.weight"}}
RANDOM = ("lora", "rslora", "dora")
FAMILIES = ("llama", "gpt2", "gemma3")


def _base(family="llama", dtype=torch.float32):
    torch.manual_seed(5)
    return small_models.FAMILIES[family]().to(dtype).eval()


def _logits(model):
    with torch.no_grad():
        return model(**small_models.tokens(3)).logits


def _trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def foundation(tmp_path):
    model = adapted(_base(), dataclasses.replace(RUN, seed=7))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path)
    return model.eval(), dataclasses.replace(RUN, adapter="foundation", init=str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", FRESH)
def test_at_the_start_the_model_is_the_base(kind, family):
    base = _base(family)
    before = _logits(base)
    model = adapted(base, dataclasses.replace(RUN, adapter=kind))
    assert torch.allclose(_logits(model.eval()), before, rtol=1e-4, atol=1e-5)
    assert before.abs().max() > 0.01


@pytest.mark.parametrize("kind", FRESH)
def test_what_trains_is_the_layers_own_and_float32(kind):
    base = _base(dtype=torch.bfloat16)
    layers = [name for name in linear_layers(base)]
    model = adapted(base, dataclasses.replace(RUN, adapter=kind))
    trainable = _trainable(model)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    by_layer = {
        (layer, name.split(f"{layer}.")[1]) for name in trainable for layer in layers if layer in name
    }
    assert by_layer == {(layer, part) for layer in layers for part in TRAINS.get(kind, FACTORS)}
    assert len(layers) == 14 and not any("lm_head" in layer for layer in layers)
    others = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert others == {torch.bfloat16}


@pytest.mark.parametrize("kind", FRESH)
def test_fresh_adapters_are_a_function_of_the_seed(kind):
    config = dataclasses.replace(RUN, adapter=kind)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = _trainable(adapted(_base(), config))
    torch.manual_seed(1)
    base = _base()
    torch.set_rng_state(state)
    moved = dataclasses.replace(config, batch_size=3, lr=0.7, n_train=99, data_seed=4, optimizer="sgd")
    second = _trainable(adapted(base, moved))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = _trainable(adapted(_base(), dataclasses.replace(config, seed=1)))
    same = all(torch.equal(first[name], other[name]) for name in first)
    assert same == (kind not in RANDOM)


def test_alpha_defaults_to_the_rank_and_rslora_divides_by_its_root():
    def scale(**changed):
        model = adapted(_base(), dataclasses.replace(RUN, rank=4, **changed))
        return next(m for m in model.modules() if isinstance(m, LoraLayer)).scaling["default"]

    assert scale(alpha=None) == 1
    assert scale(alpha=8) == 2
    assert scale(alpha=8, adapter="rslora") == 4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind, part", [("milora", slice(-3, None)), ("pissa", slice(0, 3))])
def test_singular_directions_against_numpy(kind, part, family):
    base = _base(family)
    weights = {name: m.weight.detach().double().numpy().copy() for name, m in linear_layers(base).items()}
    model = adapted(base, dataclasses.replace(RUN, adapter=kind))
    for name, weight in weights.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        weight = weight.T if family == "gpt2" else weight
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        expected = (u[:, part] * s[part]) @ vt[part]
        a, b = (f["default"].weight.detach().double().numpy() for f in (layer.lora_A, layer.lora_B))
        product = 2.0 * b @ a  # alpha 6 over rank 3
        np.testing.assert_allclose(product, expected, atol=1e-5 * s[0])
        np.testing.assert_allclose((a**2).sum(axis=1), s[part] / 2, rtol=1e-2, atol=1e-6)  # balanced
        residual = layer.get_base_layer().weight.detach().double().numpy()
        residual = residual.T if family == "gpt2" else residual
        np.testing.assert_allclose(residual, weight - expected, atol=1e-5 * s[0])


def test_a_residual_that_does_not_add_up_is_named(monkeypatch):
    svd = torch.linalg.svd

    def wrong(weight, **options):
        u, s, vt = svd(weight, **options)
        return u, torch.full_like(s, 1e6), vt

    monkeypatch.setattr(torch.linalg, "svd", wrong)
    with pytest.raises(RunError, match=r"layers.0.self_attn.q_proj`: its singular directions do not give"):
        adapted(_base(), dataclasses.replace(RUN, adapter="milora"))


@pytest.mark.parametrize("kind", ["pissa", "milora"])
def test_a_bfloat16_base_is_given_back_to_its_own_rounding(kind):
    weights = {
        name: m.weight.detach().float() for name, m in linear_layers(_base(dtype=torch.bfloat16)).items()
    }
    model = adapted(_base(dtype=torch.bfloat16), dataclasses.replace(RUN, adapter=kind))
    for name, weight in weights.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        again = layer.get_base_layer().weight.float() + layer.get_delta_weight("default")
        assert (again - weight).abs().max() <= 2**-8 * weight.abs().max()


def test_a_wide_layer_is_decomposed_by_random_projections_from_the_seed(monkeypatch):
    monkeypatch.setattr("experiments.adapters.FAST_SVD", 8)
    config = dataclasses.replace(RUN, adapter="pissa")
    base = _base()
    before = _logits(base)
    model = adapted(base, config)
    assert model.peft_config["default"].init_lora_weights == "pissa_niter_16"
    assert torch.allclose(_logits(model.eval()), before, rtol=1e-4, atol=1e-5)
    again = _trainable(adapted(_base(), config))
    assert all(torch.equal(again[name], p) for name, p in _trainable(model).items())


def test_trained_adapters_are_taken_as_they_are(foundation):
    trained, config = foundation
    model = adapted(_base(), dataclasses.replace(config, seed=11))
    assert torch.equal(_logits(model.eval()), _logits(trained))
    assert not torch.allclose(_logits(model), _logits(_base()), atol=1e-3)
    assert len(_trainable(model)) == 28


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"rank": 4}, "trained with rank 3; this run has rank 4"),
        ({"alpha": 3}, "trained with alpha 6; this run has alpha 3"),
        ({"init": "nowhere"}, "init nowhere: no adapter_config.json; .* shipped one: foundation-200k"),
    ],
)
def test_adapters_that_do_not_fit_the_run_are_named(foundation, changed, said):
    with pytest.raises(RunError, match=said):
        adapted(_base(), dataclasses.replace(foundation[1], **changed))


def test_adapters_of_another_base_are_named(foundation):
    with pytest.raises(RunError, match="adapters of another base; 14 tensors differ, as `base_model"):
        adapted(small_models._llama(num_hidden_layers=1), foundation[1])


def test_a_rank_larger_than_a_layer_names_the_layer():
    with pytest.raises(RunError, match=r"rank 9 is larger than layer `model.*k_proj` \(8 × 16\); 8 is the"):
        adapted(tiny.llama(), dataclasses.replace(RUN, rank=9))
    adapted(tiny.llama(), dataclasses.replace(RUN, rank=9, adapter="full"))
    adapted(tiny.llama(), dataclasses.replace(RUN, rank=8, adapter="pissa"))


def test_dropout_is_the_configurations():
    model = adapted(_base(), dataclasses.replace(RUN, dropout=0.25))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} >= {0.25}
    assert isinstance(copy.deepcopy(model), peft.PeftModel)


def test_a_model_without_layers_is_named():
    base = _base()
    base.model.layers = torch.nn.ModuleList()
    with pytest.raises(RunError, match="LlamaForCausalLM has no linear layer but its head"):
        adapted(base, RUN)
