"""Whole models beyond the four families: each parameter exact against one backward pass per example, or
named."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

from gns.capture.plan import plan
from gns.monitor import GNSMonitor, GNSWarning
from tests.reference.per_example import contributions, joint, sums, trainable
from tests.reference.tolerances import close

V, T, N = 61, 7, 4
SHAPE = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
IMAGE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8,
             patch_size=4, num_labels=3)  # fmt: skip
T5 = dict(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
          dropout_rate=0.0)  # fmt: skip
CONVNET = dict(hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)


def ids(generator):
    return torch.randint(3, V, (N, T), generator=generator)


def text(generator):
    found = ids(generator)
    return {"input_ids": found, "attention_mask": torch.ones_like(found), "labels": found.clone()}


def classes(generator):
    return {**text(generator), "labels": torch.randint(0, 2, (N,), generator=generator)}


def images(size, generator):
    labels = torch.randint(0, 3, (N,), generator=generator)
    return {"pixel_values": torch.randn(N, 3, size, size, generator=generator), "labels": labels}


def of(auto, kind, **config):
    return lambda: getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(kind, **config))


causal = functools.partial(of, "AutoModelForCausalLM")
pictures = functools.partial(of, "AutoModelForImageClassification")
# name → model, batch, what is not measured: parameters (a pattern) and the reason
ZOO = {
    "mistral": (causal("mistral", **SHAPE, num_key_value_heads=2), text, None, None),
    "phi3": (causal("phi3", **SHAPE, num_key_value_heads=2), text, None, None),
    "cohere": (causal("cohere", **SHAPE, num_key_value_heads=2), text, None, None),
    "nemotron": (causal("nemotron", **SHAPE, num_key_value_heads=2), text, None, None),
    "gpt-neox": (causal("gpt_neox", **SHAPE), text, None, None),
    "mixtral": (
        causal("mixtral", **SHAPE, num_key_value_heads=2, num_local_experts=4),
        text, r"mlp\.(gate\.weight|experts\..*)", "no per-example rule",
    ),
    "mamba": (
        causal("mamba", vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4),
        lambda g: {k: v for k, v in text(g).items() if k != "attention_mask"},
        r"mixer\.(A_log|D|conv1d\..*|dt_proj\..*|x_proj\..*|out_proj\..*|in_proj\..*)",
        "no per-example rule|never fired",
    ),
    "bert": (of("AutoModelForSequenceClassification", "bert", **SHAPE), classes, None, None),
    "t5": (of("AutoModelForSeq2SeqLM", "t5", **T5), text, "relative_attention_bias", "has 7 rows where"),
    "vit": (
        pictures("vit", **IMAGE),
        functools.partial(images, 8), "cls_token|position_emb", "no per-example rule",
    ),
    "resnet": (pictures("resnet", embedding_size=8, **CONVNET), functools.partial(images, 32), None, None),
    "convnext": (
        pictures("convnext", num_stages=2, **CONVNET),
        functools.partial(images, 32), "layer_scale_parameter", "no per-example rule",
    ),
}  # fmt: skip


def step_of(model, loss, **options):
    """Sums and coverage of the second of two steps: the first may have found out what meets."""
    with GNSMonitor(model, on_error="raise", **options) as monitor:
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return monitor.latest, monitor.coverage()


def check(step, twin, rtol):
    exact = sums(twin)
    scale = sum(m for m, _ in exact.values())
    for name, found in step.parameters():
        m, q = exact[name]
        if m < 1e-12 * scale:  # a gradient that is zero but for rounding, as a key's bias
            assert found.mean_sq_norm < 1e-11 * scale, name
            continue
        close([found.mean_sq_norm, found.sq_norm_of_mean], [m, q], rtol=rtol, what=name)


@pytest.mark.filterwarnings("ignore:.*are not measured:gns.monitor.GNSWarning")
@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_is_exact_or_named(name):
    make, data, left_out, reason = ZOO[name]
    torch.manual_seed(0)
    dtype = torch.float32 if name == "mixtral" else torch.float64  # its grouped product takes no float64
    model = make().to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    batch = data(torch.Generator().manual_seed(1))
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    one = [lambda i=i: model(**{k: v[i : i + 1] for k, v in batch.items()}).loss / N for i in range(N)]
    twin = contributions(trainable(model), one)
    step, coverage = step_of(model, lambda: model(**batch).loss)
    check(step, twin, 2e-6 if dtype is torch.float64 else 1e-4)
    assert step.n_examples == N and step.reason is None
    named = coverage.reasons
    right = [left_out and re.search(left_out, p) and re.search(reason, why) for p, why in named.items()]
    assert all(right), named
    assert bool(named) is bool(left_out)
    assert coverage.measured.keys() | named.keys() == trainable(model).keys()


# adapters


class Block(nn.Module):
    """A residual block of a small diffusion model: convolutions, group norm, the time added channel by
    channel."""

    def __init__(self, i, o, time):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, i), nn.Conv2d(i, o, 3, padding=1)
        self.time = nn.Linear(time, o)
        self.norm2, self.conv2 = nn.GroupNorm(2, o), nn.Conv2d(o, o, 3, padding=1)
        self.skip = nn.Conv2d(i, o, 1)

    def forward(self, x, t):
        h = self.conv1(nn.functional.silu(self.norm1(x))) + self.time(t)[:, :, None, None]
        return self.conv2(nn.functional.silu(self.norm2(h))) + self.skip(x)


class UNet(nn.Module):
    """Down, attention over pixels, up with a skip connection."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.first, self.down = nn.Conv2d(1, 4, 3, padding=1), Block(4, 8, 8)
        self.shrink = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.up, self.last = Block(16, 4, 8), nn.Conv2d(4, 1, 1)

    def forward(self, x, t):
        t = torch.tanh(self.embed(t[:, None]))
        h = self.down(self.first(x), t)
        low = self.shrink(h)
        pixels = low.flatten(2).mT
        mixed = nn.functional.scaled_dot_product_attention(self.q(pixels), self.k(pixels), self.v(pixels))
        low = low + mixed.mT.reshape(low.shape)
        wide = nn.functional.interpolate(low, scale_factor=2)
        return self.last(self.up(torch.cat([h, wide], 1), t))


@pytest.mark.parametrize("adapter", ["LoRA", "DoRA", "full"])
def test_a_small_diffusion_model(adapter):
    torch.manual_seed(0)
    model = UNet()
    if adapter != "full":
        targets = ["conv1", "conv2", "skip", "shrink", "first", "q", "v", "time"]
        dora = adapter == "DoRA"
        config = peft.LoraConfig(r=2, target_modules=targets, use_dora=dora, modules_to_save=["norm1"])
        model = peft.get_peft_model(model, config)
    model = model.double()
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(0.1 * torch.randn_like(p))
    x, t, noise = (torch.randn(s, dtype=torch.float64) for s in ((N, 1, 8, 8), (N,), (N, 1, 8, 8)))

    def loss(rows):
        return (model(x[rows], t[rows]) - noise[rows]).square().sum() / N

    twin = contributions(trainable(model), [lambda i=i: loss([i]) for i in range(N)])
    step, coverage = step_of(model, lambda: loss(range(N)))
    assert coverage.share == 1 and step.n_examples == N
    check(step, twin, 1e-9)


class Quantised(nn.Linear):
    """A base layer of integers and a scale, as the 8-bit ones are; its adapter stays `nn.Linear`."""

    def __init__(self, i, o):
        super().__init__(i, o, bias=False)
        scale = self.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((self.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


def test_adapters_on_a_quantised_base():
    torch.manual_seed(0)
    base = nn.Sequential(Quantised(6, 5), nn.Tanh(), Quantised(5, 3))
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    )
    x = torch.randn(N, 3, 6)
    twin = contributions(trainable(model), [lambda i=i: model(x[[i]]).square().sum() for i in range(N)])
    step, coverage = step_of(model, lambda: model(x).square().sum())
    assert coverage.share == 1 and len(coverage.verified) == 4
    check(step, twin, 1e-5)


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "pissa_niter_2", "olora", "orthogonal"])
@pytest.mark.parametrize("rslora", [False, True])
def test_initialisations_of_peft(init, rslora):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=init, use_rslora=rslora)
    model = peft.get_peft_model(base, config)
    x = torch.randn(N, 8)
    twin = contributions(trainable(model), [lambda i=i: model(x[[i]]).square().sum() for i in range(N)])
    step, coverage = step_of(model, lambda: model(x).square().sum())
    assert coverage.share == 1
    check(step, twin, 1e-5)
    assert set(step.groups) == {"A", "B"}


def test_of_several_adapters_the_active_one_is_measured():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), config)
    model.add_adapter("second", config)
    model.set_adapter("second")
    x = torch.randn(N, 6)
    twin = contributions(trainable(model), [lambda i=i: model(x[[i]]).square().sum() for i in range(N)])
    step, coverage = step_of(model, lambda: model(x).square().sum())
    assert coverage.share == 1 and all("second" in name for name in coverage.measured)
    check(step, twin, 1e-5)


# activations without a batch dimension


class Experts(nn.Module):
    """A mixture of experts as it is often written: rows flattened, each expert called on those that chose
    it."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(6, 2)
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        flat = x.reshape(-1, 6)
        weight, choice = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = torch.nonzero(choice == i).flatten()
            out = out.index_add(0, rows, expert(flat[rows]) * weight[rows, None])
        return self.head(out.reshape(x.shape))


def test_flattened_rows_are_measured_and_rows_of_an_expert_are_named():
    torch.manual_seed(0)
    model = Experts().double()
    x = torch.randn(N, 5, 6, dtype=torch.float64)
    twin = contributions(trainable(model), [lambda i=i: model(x[[i]]).square().sum() for i in range(N)])
    with pytest.warns(GNSWarning, match=r"has \d+ rows where the model's call has 4 examples"):
        step, coverage = step_of(model, lambda: model(x).square().sum())
    assert set(coverage.measured) == {"router.weight", "router.bias", "head.weight", "head.bias"}
    check(step, twin, 1e-10)


class NanoGPT(nn.Module):
    """Position embeddings looked up once for all examples, from ids without a batch dimension."""

    def __init__(self, lead=()):
        super().__init__()
        self.wte, self.wpe, self.lead = nn.Embedding(V, 8), nn.Embedding(16, 8), lead
        self.head = nn.Linear(8, V, bias=False)

    def forward(self, ids):
        places = torch.arange(ids.shape[1]).expand(*self.lead, ids.shape[1])
        return self.head(torch.tanh(self.wte(ids) + self.wpe(places)))


@pytest.mark.parametrize("lead", [(), (1,)])
def test_an_output_that_all_examples_share_is_named_with_what_to_do(lead):
    torch.manual_seed(0)
    model, tokens = NanoGPT(lead).double(), torch.randint(0, V, (N, T))
    with pytest.warns(GNSWarning, match=r"all examples share one output; call it on ids of shape \[4, 7\]"):
        step, coverage = step_of(model, lambda: model(tokens).square().mean())
    assert set(coverage.unmeasured) == {"wpe.weight"}
    expanded = NanoGPT((N,)).double()
    expanded.load_state_dict(model.state_dict())
    twin = contributions(
        trainable(expanded),
        [lambda i=i: alone(expanded, tokens[[i]]).square().mean() / N for i in range(N)],
    )
    step, coverage = step_of(expanded, lambda: expanded(tokens).square().mean())
    assert coverage.share == 1
    check(step, twin, 1e-10)


def alone(model, tokens):
    model.lead, kept = (1,), model.lead
    try:
        return model(tokens)
    finally:
        model.lead = kept


def test_one_id_a_position_or_one_an_example_is_not_guessed():
    model, tokens = NanoGPT(()).double(), torch.randint(0, V, (T, T))
    with pytest.warns(GNSWarning, match="one id an example, or one a position"):
        _, coverage = step_of(model, lambda: model(tokens).square().mean())
    assert set(coverage.unmeasured) == {"wpe.weight"}


# tied weights


class Tied(nn.Module):
    def __init__(self, *, twice=False, padding=None, first="embedding"):
        super().__init__()
        self.table, self.mix = nn.Embedding(V, 8, padding_idx=padding), nn.Linear(8, 8)
        self.head, self.twice, self.first = nn.Linear(8, V, bias=False), twice, first
        self.head.weight = self.table.weight

    def forward(self, ids=None, inputs_embeds=None):
        ones = self.mix.weight.new_ones(1, 1, 8)
        first = self.head(ones.expand(len(ids), 1, 8)) if self.first == "head" else 0
        h = self.table(ids) if inputs_embeds is None else inputs_embeds
        if self.twice:
            h = h + self.table(ids.flip(1))
        return self.head(torch.tanh(self.mix(h))) + first


@pytest.mark.parametrize("options", [{}, {"padding": 3}, {"twice": True}, {"first": "head"}], ids=str)
def test_an_embedding_tied_to_its_head(options):
    torch.manual_seed(0)
    model, tokens = Tied(**options).double(), torch.randint(0, 9, (N, T))
    twin = contributions(trainable(model), [lambda i=i: model(tokens[[i]]).pow(3).sum() for i in range(N)])
    meeting = pytest.warns(GNSWarning, match="joined from the next step on")
    with meeting if options.get("twice") or "first" in options else contextlib.nullcontext():
        step, coverage = step_of(model, lambda: model(tokens).pow(3).sum())
    assert coverage.share == 1 and step.reason is None
    check(step, twin, 1e-9)
    close([step.mean_sq_norm, step.sq_norm_of_mean], joint(twin), rtol=1e-9)


def test_a_tied_head_alone_where_embeddings_are_given():
    torch.manual_seed(0)
    model, h = Tied().double(), torch.randn(N, T, 8, dtype=torch.float64)
    twin = contributions(
        trainable(model), [lambda i=i: model(inputs_embeds=h[[i]]).pow(3).sum() for i in range(N)]
    )
    step, _ = step_of(model, lambda: model(inputs_embeds=h).pow(3).sum())
    check(step, twin, 1e-9)


def test_uses_that_meet_in_blocks_are_refused_above_the_bound_on_memory():
    torch.manual_seed(0)
    model, tokens = Tied(twice=True).double(), torch.randint(0, 9, (N, T))
    with pytest.warns(GNSWarning) as seen:
        step, coverage = step_of(model, lambda: model(tokens).pow(3).sum(), max_bytes=10_000)
    assert any("raise `max_bytes`, or use fewer examples" in str(w.message) for w in seen)
    assert set(coverage.unmeasured) == {"table.weight"} and step.reason is None
    plain = Tied().double()
    step, coverage = step_of(plain, lambda: plain(tokens).pow(3).sum(), max_bytes=10_000)
    assert coverage.share == 1  # the T×T form needs no such table


def test_the_plan_of_a_model_with_every_kind_of_layer():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv1d(2, 2, 3),
            "norm": nn.GroupNorm(1, 2),
            "table": nn.Embedding(5, 2),
            "odd": nn.PReLU(),
        }
    )
    assert [tap.rule.kind for tap in plan(model).taps] == ["Conv", "Elementwise", "Embedding", "Elementwise"]


class Twice(nn.Module):
    """A layer that is called twice, inside a checkpointed part."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.shared, self.reentrant = nn.Linear(6, 6), nn.Linear(6, 6), reentrant

    def inner(self, h):
        return self.shared(torch.tanh(self.shared(h)))

    def forward(self, x):
        h = self.first(x)
        if self.reentrant is None:
            return self.inner(h)
        return torch.utils.checkpoint.checkpoint(self.inner, h, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
def test_a_layer_called_twice_is_joined_or_under_reentrant_checkpointing_named(reentrant):
    torch.manual_seed(0)
    model, x = Twice(None).double(), torch.randn(N, 3, 6, dtype=torch.float64)
    twin = contributions(trainable(model), [lambda i=i: model(x[[i]]).pow(3).sum() for i in range(N)])
    model.reentrant = reentrant
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step, coverage = step_of(model, lambda: model(x).pow(3).sum())
    assert said
    assert set(coverage.unmeasured) == ({"shared.weight", "shared.bias"} if reentrant else set())
    check(step, twin, 1e-10)
