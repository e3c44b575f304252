"""Which rows of a call are examples, and how each weighs in the loss."""

from __future__ import annotations

from collections import OrderedDict, UserDict

import pytest
import torch
import transformers
from torch import nn

from gns.examples import IGNORED, row_map, shifts_labels


class Plain(nn.Module):
    pass


class TinyForCausalLM(nn.Module):
    pass


class TinyForTokenClassification(nn.Module):
    pass


class TinySeq2SeqForConditionalGeneration(nn.Module):
    class config:
        is_encoder_decoder = True


class Wrapper(nn.Module):
    """As `peft` wraps a model."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def get_base_model(self):
        return self.base


LABELS = torch.tensor([[IGNORED, 5, 6, 7], [1, IGNORED, 3, IGNORED], [IGNORED] * 4])
IDS = torch.arange(12).view(3, 4)


@pytest.mark.parametrize(
    ("args", "kwargs", "n"),
    [
        ((torch.ones(5, 2),), {}, 5),
        ((), {"x": torch.ones(5, 2)}, 5),
        ((torch.tensor(0.5), torch.ones(4, 2)), {}, 4),
        (([torch.ones(6), torch.ones(6)],), {}, 6),
        (({"a": {"b": torch.ones(7, 1)}},), {}, 7),
        ((UserDict(a=torch.ones(8, 1)),), {}, 8),
        ((), {"attention_mask": torch.ones(1, 1, 4, 4), "input_ids": torch.ones(3, 4, dtype=torch.long)}, 3),
        ((), {"past": torch.ones(2, 3), "inputs_embeds": torch.ones(9, 4, 8)}, 9),
        ((torch.ones(1, 5, 2),), {}, 1),
    ],
    ids=str,
)
def test_how_many_examples(args, kwargs, n):
    found = row_map(Plain(), args, kwargs)
    assert found is not None
    assert found.n == n


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((3, "text"), {"flag": True}), ((torch.tensor(1.0),), {})]
)
def test_a_call_without_a_batch_has_no_map(args, kwargs):
    assert row_map(Plain(), args, kwargs) is None


def weights(model, **kwargs):
    found = row_map(model, (), {"input_ids": IDS, **kwargs})
    assert found is not None
    w = None if found.weight_sum is None else (float(found.weight_sum), float(found.weight_sq_sum))
    return None if found.n_tokens is None else float(found.n_tokens), w


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper], ids=["plain", "peft"])
def test_a_causal_model_never_uses_the_first_label(wrap):
    # counts after the shift: 3, 1, 0
    tokens, w = weights(wrap(TinyForCausalLM()), labels=LABELS)
    assert tokens == 4
    assert w == (1.0, pytest.approx((3 / 4) ** 2 + (1 / 4) ** 2))


@pytest.mark.parametrize(
    "model", [TinyForTokenClassification(), TinySeq2SeqForConditionalGeneration(), Wrapper(Plain())], ids=str
)
def test_other_models_use_every_label(model):
    tokens, w = weights(model, labels=LABELS)
    assert tokens == 5
    assert w == (pytest.approx(1.0), pytest.approx((3 / 5) ** 2 + (2 / 5) ** 2))


# What the configurations of the classes below know of this they take; the others are for other names of it.
SMALL = dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim"), 16)
SMALL |= dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 1)
SMALL |= dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 2)
SMALL |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
SMALL |= dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 24)
SMALL |= dict.fromkeys(("max_position_embeddings", "n_positions"), 64)
SMALL |= {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True}
DECODERS = (
    *("BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM", "BlenderbotSmallForCausalLM"),
    *("CpmAntForCausalLM", "FlaubertWithLMHeadModel", "MBartForCausalLM", "MarianForCausalLM"),
    *("MvpForCausalLM", "PLBartForCausalLM", "PegasusForCausalLM", "TrOCRForCausalLM"),
    *("WhisperForCausalLM", "XLMWithLMHeadModel"),
)
SHIFTING = (
    *("BertLMHeadModel", "GPT2LMHeadModel", "GPT2DoubleHeadsModel", "LlamaForCausalLM", "OPTForCausalLM"),
    "XGLMForCausalLM",
)


def of_transformers(name):
    cls = getattr(transformers, name)
    return cls(cls.config_class(**SMALL)).eval()


def joined():
    """A join of two models that are no decoders of encoder–decoder families by name."""
    encoder = transformers.BertModel(transformers.BertConfig(**{**SMALL, "is_decoder": False}))
    shape = {**SMALL, "add_cross_attention": True}
    decoder = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.pad_token_id, model.config.decoder_start_token_id = 0, 1
    return model.eval()


def loss_of_first_labels(model):
    """The model's own loss where only the first token of each row has a label; None if it is in no loss."""
    ids = torch.randint(3, 30, (2, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, IGNORED)
    labels[:, 0] = ids[:, 0]
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=labels).loss)
    return loss if loss > 0 else None  # a mean of nothing is NaN


@pytest.mark.parametrize("name", [*DECODERS, *SHIFTING])
def test_labels_are_shifted_where_the_models_own_loss_shifts_them(name):
    model = of_transformers(name)
    shifted = name in SHIFTING
    assert (loss_of_first_labels(model) is None) is shifted, "transformers does it otherwise now"
    assert shifts_labels(model) is shifted
    assert shifts_labels(Wrapper(model)) is shifted


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
def test_a_join_of_encoder_and_decoder_does_not_shift_though_its_decoder_alone_would():
    model = joined()
    assert loss_of_first_labels(model) is not None
    assert shifts_labels(model.decoder) and not shifts_labels(model) and not shifts_labels(Wrapper(model))


def test_shift_labels_are_shifted_already_and_win():
    tokens, w = weights(TinyForCausalLM(), labels=LABELS, shift_labels=LABELS)
    assert tokens == 5
    assert w is not None


def test_a_loss_divided_by_the_whole_steps_tokens_weighs_by_count():
    _, w = weights(TinyForCausalLM(), labels=LABELS, num_items_in_batch=torch.tensor(40))
    assert w == (4.0, 9.0 + 1.0)


def test_micro_batches_of_unequal_tokens_join_to_the_steps_weights():
    """Σa² over two calls: by tokens of the step, or by halves, as the loss is divided."""
    long, short = torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)
    for items, expected in [(11, (8 / 11) ** 2 + (3 / 11) ** 2), (None, 0.5)]:
        kwargs = {} if items is None else {"num_items_in_batch": items}
        parts = [
            row_map(TinyForCausalLM(), (), {"input_ids": x, "labels": x, **kwargs}) for x in (long, short)
        ]
        total = sum(float(p.weight_sum) for p in parts)
        assert sum(float(p.weight_sq_sum) for p in parts) / total**2 == pytest.approx(expected)


def test_equal_weights_still_count_tokens():
    found = row_map(TinyForCausalLM(), (), {"input_ids": IDS, "labels": LABELS}, "equal")
    assert found is not None
    assert found.weight_sum is None
    assert float(found.n_tokens) == 4


@pytest.mark.parametrize(
    "labels",
    [None, torch.tensor([1, 0, 2]), torch.ones(3, 4), torch.zeros(2, 4, dtype=torch.long)],
    ids=["none", "classes", "float", "other batch"],
)
def test_labels_that_are_no_token_labels_mean_equal_weights(labels):
    tokens, w = weights(TinyForCausalLM(), labels=labels)
    assert w is None
    assert tokens == 12


def test_an_attention_mask_counts_the_tokens_of_the_input():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert weights(Plain(), attention_mask=mask) == (9, None)
    assert weights(Plain(), attention_mask=torch.ones(3, 1, 4, 4)) == (12, None)
    found = row_map(Plain(), (torch.ones(3, 4),), {})
    assert found is not None
    assert found.n_tokens is None


def test_tokens_without_labels_are_refused():
    with pytest.raises(
        ValueError, match='weights="tokens", but the call has no .* pass them to the model as'
    ):
        row_map(Plain(), (), {"input_ids": IDS}, "tokens")


def test_a_call_whose_labels_are_all_masked_has_no_weight_and_no_nan():
    tokens, w = weights(TinyForCausalLM(), labels=torch.full((3, 4), IGNORED))
    assert tokens == 0
    assert w == (0, 0)


def test_a_model_output_is_no_argument_problem():
    found = row_map(Plain(), (OrderedDict(logits=torch.ones(2, 3)),), {})
    assert found is not None
    assert found.n == 2
