"""The signed sums that come out of one tapped backward pass a batch."""

import warnings

import pytest
import torch

from gns.capture.placement import Shape
from gns.curvature.gathering import gather
from gns.curvature.signs import Weights
from gns.examples import RowMap
from gns.probing.still import still
from gns.segments import stacked
from tests.gns.small_models import FAMILIES, lora, tokens
from tests.reference.tolerances import close


def gathered(model, batches, **how):
    with still(model, dropout=False):
        return gather(model, batches, None, probes=4, seed=0, **how)


def gradient(model, batch):
    model.eval()
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    found = torch.autograd.grad(model(**batch).loss, parameters)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probes_parts_add_up_to_the_gradient_and_signs_only_flip_them(family):
    model, batches = lora(family), [tokens(8, seed=1), tokens(6, seed=2)]
    found = gathered(model, batches)
    mass = [float((b["labels"][:, 1:] != -100).sum()) for b in batches]
    each = [gradient(model, b) for b in batches]
    for name in found.names:
        expected = sum(m * g[name] for m, g in zip(mass, each, strict=True)) / sum(mass)
        close(found.mean[name], expected, torch.float32, rtol=1e-4, what=name)
    assert found.n == 14 and abs(found.share.sum() - 1) < 1e-12
    # examples of one probe each: signs flip whole parts
    alone = gathered(model, [tokens(4, seed=1)])
    for name in alone.names:
        close(alone.signed[name].abs(), alone.parts[name].abs(), torch.float32, rtol=1e-5, what=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_give_the_same_sums(reentrant):
    plain, model = lora("llama"), lora("llama").train()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable`", category=FutureWarning)
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    runs = []
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(None))
    a, b = gathered(plain, [tokens(8)]), gathered(model, [tokens(8)])
    assert len(runs) == 2, "each layer runs again in backward"
    for name in a.names:
        close(b.signed[name], a.signed[name], torch.float32, rtol=1e-4, what=name)


def test_rows_that_are_one_example_share_a_sign():
    model = lora("llama")
    pairs = gathered(model, [tokens(8, seed=1)], segments=stacked(2), weights="equal")
    assert pairs.n == 4
    for name in pairs.names:
        close(pairs.signed[name].abs(), pairs.parts[name].abs(), torch.float32, rtol=1e-5, what=name)


def test_batches_belong_to_one_probe_where_there_are_enough():
    weigh = Weights(probes=2, batches=4, seed=0)
    for _ in range(4):
        rows = weigh(RowMap(3, Shape(3)))
        weigh.next_batch()
        assert rows.shape == (5, 3) and (rows[2:4].sum(0) == 3).all()
    assert [set(m) for m in weigh.members] == [{0}, {1}, {0}, {1}]
    split = Weights(probes=2, batches=1, seed=0)
    split(RowMap(3, Shape(3)))
    assert split.members[0].tolist() == [0, 1, 0]
