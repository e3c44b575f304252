"""Stacked layers against `peft`'s own, forward and backward; the stack; the rows that the head sees."""

import warnings

import peft
import pytest
import torch
from torch import nn

from experiments.configs import RunError
from experiments.packed.layers import LearnedRows, PackedLinear, Stack, pack, state_of, token_losses
from tests.gns import tiny

SLOTS, ROWS, TOKENS = 3, 2, 5


class Net(nn.Module):
    """Two linear layers, one with a bias; `peft` needs a config."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def _peft(seed, dtype=torch.float64, **options):
    torch.manual_seed(99)
    net = Net().to(dtype)
    torch.manual_seed(seed)
    lora = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["first", "last"], **options)
    model = peft.get_peft_model(net, lora, autocast_adapter_dtype=dtype is torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_each_slot_computes_what_its_own_model_does(kind):
    own = [_peft(seed, **KINDS[kind]) for seed in range(SLOTS)]
    model = _peft(0, **KINDS[kind])
    stack = pack(model, [state_of(m) for m in own], "cpu")
    x = torch.randn(SLOTS * ROWS, TOKENS, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(SLOTS * ROWS, TOKENS, 4, dtype=torch.float64)
    out = model(x)
    stack.backward((out * weights).sum(), first=True)
    (dx,) = torch.autograd.grad((model(x) * weights).sum(), x)
    for slot, twin in enumerate(own):
        rows = slice(slot * ROWS, (slot + 1) * ROWS)
        part = x.detach()[rows].requires_grad_()
        expected = twin(part)
        (expected * weights[rows]).sum().backward()
        torch.testing.assert_close(out[rows], expected)
        torch.testing.assert_close(dx[rows], part.grad)
        gradients = [p.grad.flatten() for p in twin.parameters() if p.requires_grad]
        mine = {name: stack._view(stack.gradient, name)[slot] for name in stack.parameters}
        assert sum(map(torch.numel, gradients)) == sum(map(torch.numel, mine.values()))
        theirs = {n: p.grad for n, p in twin.named_parameters() if p.requires_grad}
        for name, gradient in mine.items():
            layer, factor = name.rsplit(".", 1)
            (match,) = [g for n, g in theirs.items() if n.startswith(f"{layer}.{factor}.")]
            torch.testing.assert_close(gradient, match)


def test_under_autocast_a_layer_computes_as_peft_does():
    own = _peft(1, torch.bfloat16)
    model = _peft(1, torch.bfloat16)
    stack = pack(model, [state_of(own)], "cpu")
    assert stack.values.dtype is torch.float32
    x = torch.randn(ROWS, TOKENS, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = model(x), own(x)
    assert out.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2**-6, atol=2**-6)


def test_gradients_of_forward_passes_add():
    model = _peft(0)
    stack = pack(model, [state_of(model)] * 2, "cpu")
    x = torch.randn(4, TOKENS, 6, dtype=torch.float64)
    stack.backward(model(x).square().sum(), first=True)
    once = stack.gradient.clone()
    stack.backward(model(x).square().sum(), first=False)
    torch.testing.assert_close(stack.gradient, 2 * once)
    stack.backward(model(x).square().sum(), first=True)
    torch.testing.assert_close(stack.gradient, once)


def test_layers_use_the_slots_that_are_held():
    states = [state_of(_peft(seed)) for seed in range(3)]
    model = _peft(0)
    stack = pack(model, states, "cpu")
    x = torch.randn(1, TOKENS, 6, dtype=torch.float64)
    before = model(x.repeat(3, 1, 1))
    rows = stack.rows()
    stack.hold([rows[2], rows[0]])
    torch.testing.assert_close(model(x.repeat(2, 1, 1)), before[[2, 0]])
    stack.values.zero_()  # and what is written into the stack is what they see
    torch.testing.assert_close(model(x.repeat(2, 1, 1)), model(x.repeat(2, 1, 1))[[1, 0]])


def test_slots_of_other_shapes_are_refused():
    with pytest.raises(RunError, match="adapters of the same shapes"):
        Stack([{"a": torch.zeros(2)}, {"a": torch.zeros(3)}], "cpu")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"target_modules": "all-linear", "modules_to_save": ["lm_head"]}, "is trained and no factor"),
        ({"target_modules": ["embed_tokens"]}, r"`.*embed_tokens` \(Embedding\) cannot be packed"),
    ],
)
def test_what_cannot_be_stacked_is_named(options, said):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    with pytest.raises(RunError, match=said):
        state_of(model)


def test_the_head_sees_the_rows_asked_for_and_then_all_again():
    model = tiny.llama().eval()
    head = LearnedRows(model)
    ids = torch.randint(2, 300, (3, 7))
    wanted = torch.tensor([2, 8, 19])
    full = model(input_ids=ids).logits
    torch.testing.assert_close(head.logits(model, ids, wanted), full.flatten(0, 1)[wanted])
    torch.testing.assert_close(model(input_ids=ids).logits, full)
    head.remove()
    assert not model.lm_head._forward_pre_hooks


def test_losses_are_in_float32_at_the_least():
    logits = torch.randn(4, 9, dtype=torch.bfloat16)
    assert token_losses(logits, torch.tensor([0, 1, 2, 3])).dtype is torch.float32


def test_a_packed_layer_takes_any_leading_shape():
    base = nn.Linear(6, 8).requires_grad_(False)
    a, b = (nn.Parameter(torch.randn(2, *shape)) for shape in ((3, 6), (8, 3)))
    layer = PackedLinear(base, a, b, 0.5)
    x = torch.randn(4, 2, 5, 6)
    torch.testing.assert_close(layer(x), layer(x.flatten(0, 2)).view(4, 2, 5, 8))
