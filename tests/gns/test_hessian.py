"""B_noise against the dense Hessian, closed forms and its own laws."""

import itertools
import math
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn

from gns.curvature.assemble import concluded
from gns.curvature.contractions import contract
from gns.curvature.gathering import gather
from gns.curvature.parts import Point
from gns.hessian import CurvatureError, b_noise
from gns.probing.still import still
from tests.gns.small_models import lora, tokens
from tests.reference import dense_curvature as dense
from tests.reference.tolerances import close

MSE = nn.functional.mse_loss


def all_signs(n):
    return np.array(list(itertools.product((-1.0, 1.0), repeat=n)))


def enumerated(model, for_g, for_h, loss=None, *, operator="hessian", method="exact", n, names=None):
    """(tr(HΣ), GᵀHG, contributions) over all sign vectors of n examples."""
    signs = all_signs(n)
    with still(model, dropout=False):
        sums = gather(model, for_g, loss, probes=len(signs), seed=0, signs=signs)
        if names is not None:
            sums = sums.of([name for name in sums.names if name in names])
        every = dict(model.named_parameters())
        point = Point(model, {name: every[name] for name in sums.names}, loss)
        found = contract(point, for_h, sums, operator=operator, method=method)
    return concluded(sums, found, level=0.95, operator=operator, seed=0)


def tiny_gpt2(seed=0, warm=True):
    """A LoRA model of some 200 trainable parameters that computes in float64 throughout, unlike a Llama."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=13, n_embd=8, n_inner=8, n_layer=1, n_head=2, n_positions=16)
    silent = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **silent))
    made = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        model = peft.get_peft_model(base, made)
    if warm:
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.3)
    return model.double()


def small_tokens(n, seed, t=6, equal=False):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 13, (n, t), generator=generator)
    labels = ids.clone()
    labels[0, 3 if not equal else t :] = -100  # examples of unequal weight
    return {"input_ids": ids, "labels": labels}


def token_mean(model, batch):
    """The loss that the model gives itself, without its rounding to float32."""
    logits, labels = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
    return nn.functional.cross_entropy(logits.reshape(-1, 13), labels.reshape(-1), ignore_index=-100)


def batch_loss(batch):
    return lambda model: token_mean(model, batch)


def contributions(model, names, batches):
    """c̃ᵢ [N, d] and ãᵢ [N] of all batches joined by their tokens."""
    mass = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    rows, weights, total = [], [], sum(mass)
    for b in batches:
        counts = (b["labels"][:, 1:] != -100).sum(1).double()
        losses = [
            lambda model, i=i, b=b, share=counts[i] / total: (
                token_mean(model, {k: v[i : i + 1] for k, v in b.items()}) * share
            )
            for i in range(len(b["input_ids"]))
        ]
        rows.append(dense.gradients(model, names, losses))
        weights.append(counts / sum(mass))
    return torch.cat(rows), torch.cat(weights)


def trainable(model):
    return [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("factor", [None, "A", "B"])
def test_all_signs_give_the_dense_hessians_numbers(factor):
    model = tiny_gpt2().eval()
    names = [n for n in trainable(model) if factor is None or f"lora_{factor}" in n]
    batches, for_h = [small_tokens(4, 1), small_tokens(3, 2, t=5)], small_tokens(5, 3)
    c, a = contributions(model, names, batches)
    h = dense.hessian(model, names, batch_loss(for_h))
    x, y = dense.ratio(c, a, h)
    found = enumerated(model, batches, [for_h], token_mean, n=7, names=names)
    close([found.trace_h_sigma, found.g_h_g], [x, y], rtol=1e-8)
    x1, y1 = dense.ratio(c, a, torch.eye(len(h)))
    close([found.trace_sigma, found.grad_sq_norm], [x1, y1], rtol=1e-8)


def test_the_parts_of_h_add_up_to_it():
    model = tiny_gpt2().eval()
    for_h = small_tokens(5, 3)
    whole = enumerated(model, [small_tokens(4, 1)], [for_h], token_mean, n=4)
    from gns.curvature.parts import split

    cut = split(for_h, 3)
    assert [len(p["input_ids"]) for p in cut] == [2, 1, 2]
    found = enumerated(model, [small_tokens(4, 1)], cut, token_mean, n=4)
    close([found.trace_h_sigma, found.g_h_g], [whole.trace_h_sigma, whole.g_h_g], rtol=1e-10)


@pytest.mark.parametrize(
    ("rows", "parts", "sizes"),
    [
        ([16], None, [4, 4, 4, 4]),
        ([8], None, [4, 4]),
        ([5], None, [2, 3]),
        ([8], 4, [2, 2, 2, 2]),
        ([8, 8], None, [4, 4, 4, 4]),
        ([4, 4, 4], None, [4, 4, 4]),
        ([1], None, [1]),
    ],
)
def test_parts_of_h_are_of_four_rows_where_two_are_left(rows, parts, sizes):
    from gns.curvature.parts import pieces

    assert [len(p) for p in pieces([torch.zeros(n, 2) for n in rows], parts)] == sizes


def test_contributions_of_factors_and_modules_add_up_and_are_the_dense_ones():
    model = tiny_gpt2().eval()
    names = trainable(model)
    batches, for_h = [small_tokens(6, 1, equal=True)], small_tokens(5, 3)
    c, a = contributions(model, names, batches)
    h = dense.hessian(model, names, batch_loss(for_h))
    found = enumerated(model, batches, [for_h], token_mean, n=6)
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    in_a = torch.cat([torch.full((sizes[n],), float("lora_A" in n)) for n in names]).double()
    masked = 0.5 * (in_a[:, None] * h + h * in_a[None, :])  # half of the cross terms to each side
    x, y = dense.ratio(c, a, masked)
    close([found.groups["A"].trace_h_sigma, found.groups["A"].g_h_g], [x, y], rtol=1e-8)
    for parts in (found.groups, found.modules):
        close(sum(p.trace_h_sigma for p in parts.values()), found.trace_h_sigma, rtol=1e-10)
        close(sum(p.g_h_g for p in parts.values()), found.g_h_g, rtol=1e-10)
    assert "transformer.h.0.attn.c_attn" in found.modules  # as `gns.geometry.by_module` names it


@pytest.mark.parametrize("kind", ["cross-entropy", "squares"])
def test_the_gauss_newton_operator_is_the_dense_one(kind):
    if kind == "cross-entropy":
        model, for_h = tiny_gpt2().eval(), small_tokens(3, 3)
        batches, loss = [small_tokens(5, 1)], token_mean
        target = for_h["labels"][:, 1:].reshape(-1)
        outputs = lambda m: m(input_ids=for_h["input_ids"]).logits[:, :-1].reshape(-1, 13)  # noqa: E731
        of_outputs = lambda z: nn.functional.cross_entropy(z, target, ignore_index=-100)  # noqa: E731
        names = trainable(model)
        c, a = contributions(model, names, batches)
    else:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        batches, for_h = (
            [(torch.randn(5, 3).double(), torch.randn(5, 2).double())],
            (
                torch.randn(4, 3).double(),
                torch.randn(4, 2).double(),
            ),
        )
        loss = lambda m, b: MSE(m(b[0]), b[1])  # noqa: E731
        outputs, of_outputs = (lambda m: m(for_h[0])), (lambda z: MSE(z, for_h[1]))
        names = trainable(model)
        x, t = batches[0]
        losses = [lambda m, i=i: MSE(m(x[i : i + 1]), t[i : i + 1]) / 5 for i in range(5)]
        c, a = dense.gradients(model, names, losses), torch.full((5,), 0.2, dtype=torch.float64)
    g = dense.gauss_newton(model, names, outputs, of_outputs)
    assert torch.linalg.eigvalsh(g).min() > -1e-12
    expected = dense.ratio(c, a, g)
    found = enumerated(model, batches, [for_h], loss, operator="ggn", n=5)
    close([found.trace_h_sigma, found.g_h_g], expected, rtol=1e-8)
    assert found.operator == "ggn"


# laws


def half_squares(model, batch):
    x, y = batch
    return 0.5 * (model(x) - y).square().sum(-1).mean()


def linear(d=5, seed=0, bias=False):
    torch.manual_seed(seed)
    return nn.Linear(d, 1, bias=bias).double()


def regression(n, d=5, seed=0, scale=None, weight=None, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    x = x if scale is None else x * scale
    clean = 0 if weight is None else x @ weight[:, None]
    return x, clean + noise * torch.randn(n, 1, generator=generator, dtype=torch.float64)


def same_numbers(a, b, rtol=1e-10):
    assert (a.status, a.b_simple_status) == (b.status, b.b_simple_status)
    for name in ("b_noise", "low", "high", "b_simple", "b_simple_low", "b_simple_high"):
        x, y = getattr(a, name), getattr(b, name)
        if not (math.isinf(x) and x == y):
            close(x, y, rtol=rtol, what=name)


@pytest.mark.parametrize("n_batches", [1, 3, 9])
def test_a_multiple_of_the_identity_gives_b_simple_exactly(n_batches):
    d = 5
    eye = (math.sqrt(3 * d) * torch.eye(d, dtype=torch.float64), torch.zeros(d, 1, dtype=torch.float64))
    batches = [regression(12, seed=k) for k in range(n_batches)]  # H of `eye` is 3 times the identity
    found = b_noise(linear(), batches, loss=half_squares, hessian_batches=[eye], parts=1)
    close(found.trace_h_sigma, 3 * found.trace_sigma, rtol=1e-12)
    close(found.g_h_g, 3 * found.grad_sq_norm, rtol=1e-12)
    if found.b_noise > 0:
        close([found.b_noise, found.low], [found.b_simple, found.b_simple_low], rtol=1e-9)
    assert found.status == found.b_simple_status


def test_b_simple_is_that_of_the_monitors_step():
    from gns import GNSMonitor

    model, batch = linear(), regression(12)
    found = b_noise(model, [batch], loss=half_squares, hessian_batches=[regression(6, seed=1)])
    with GNSMonitor(model) as monitor:
        half_squares(model, batch).backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    close([found.trace_sigma, found.grad_sq_norm], [monitor.latest.trace_sigma, monitor.latest.grad_sq_norm])


def test_a_factor_on_the_loss_and_a_rotation_of_the_parameters_change_nothing():
    model = linear()
    batches = [regression(12, seed=k) for k in range(9)]
    found = b_noise(model, batches, loss=half_squares)
    scaled = b_noise(model, batches, loss=lambda m, b: 7 * half_squares(m, b))
    close(scaled.trace_h_sigma, 7**3 * found.trace_h_sigma, rtol=1e-10)
    same_numbers(scaled, found)
    q = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double())[0]
    turned = linear()
    with torch.no_grad():
        turned.weight.copy_(model.weight @ q.T)
    same_numbers(b_noise(turned, [(x @ q.T, y) for x, y in batches], loss=half_squares), found)
    with torch.no_grad():
        turned.weight.mul_(1.1)  # broken on purpose
    other = b_noise(turned, [(x @ q.T, y) for x, y in batches], loss=half_squares)
    assert abs(other.b_noise / found.b_noise - 1) > 1e-3


def test_a_regression_has_the_noise_scale_of_its_closed_form():
    # G = Dδ, H = D, Σ = (δᵀDδ + σ²) D + DδδᵀD  ⇒  B = 1 + (δᵀDδ + σ²) tr D² / δᵀD³δ
    scale = torch.tensor([2.0, 1.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    target = torch.tensor([0.3, -0.5, 0.8, 1.0, -1.0], dtype=torch.float64)
    model = linear()
    delta, d = model.weight.detach()[0] - target, scale**2
    e = float(delta @ (d * delta)) + 1.0
    x, y = e * float((d**2).sum()), float(delta @ (d**3 * delta))
    batches = [regression(400, seed=k, scale=scale, weight=target) for k in range(64)]
    found = b_noise(model, batches, loss=half_squares, probes=32, hessian_batches=8, parts=8)
    assert found.status == "measured" and found.low < 1 + x / y < found.high
    assert found.high / found.low < 2  # or the line above says little
    close([found.trace_h_sigma, found.g_h_g], [x + y, y], rtol=0.2)


def test_random_signs_agree_with_all_of_them_within_their_error():
    model = tiny_gpt2()
    batches, for_h = [small_tokens(8, 1)], small_tokens(6, 3)
    truth = enumerated(model, batches, [for_h], token_mean, n=8)
    every = [
        b_noise(model, batches, loss=token_mean, hessian_batches=[for_h], probes=4, seed=s, parts=1)
        for s in range(60)
    ]
    x, y = np.array([(e.trace_h_sigma, e.g_h_g) for e in every]).T
    for values, expected in ((x, truth.trace_h_sigma), (y, truth.g_h_g)):
        assert abs(values.mean() - expected) < 4 * values.std(ddof=1) / math.sqrt(60)
        assert values.std(ddof=1) > 0


class _Drawn:
    """Stands for the generator of the signs."""

    def __init__(self, signs):
        self.signs = list(signs)

    def choice(self, values, n):
        taken, self.signs = self.signs[:n], self.signs[n:]
        return np.array(taken)


@pytest.mark.parametrize(
    ("sizes", "tokens_of", "rtol"),
    [
        ([4], lambda n, seed: small_tokens(n, seed, equal=True), 1e-9),
        ([2, 2], lambda n, seed: small_tokens(n, seed, t=5 + seed, equal=True), 1e-9),
        ([4], small_tokens, 0.01),  # T of a probe is not exact there; before, 0.11
    ],
    ids=["equal", "equal in a probe", "unequal"],
)
def test_random_signs_of_two_probes_have_no_bias(monkeypatch, sizes, tokens_of, rtol):
    model, for_h = tiny_gpt2(), [small_tokens(5, 3)]
    batches = [tokens_of(n, 1 + k) for k, n in enumerate(sizes)]
    truth = enumerated(model, batches, for_h, token_mean, n=sum(sizes))
    found = []
    for signs in all_signs(sum(sizes)):
        monkeypatch.setattr(np.random, "default_rng", lambda seed, signs=signs: _Drawn(signs))
        e = b_noise(model, batches, loss=token_mean, hessian_batches=for_h, probes=2, parts=1)
        found.append((e.trace_h_sigma, e.g_h_g))
    x, y = np.array(found).T
    for values, expected in ((x, truth.trace_h_sigma), (y, truth.g_h_g)):
        assert values.std() > 0.05 * abs(expected)  # signs do matter
        assert abs(values.mean() - expected) < rtol * max(abs(expected), values.std())


def test_over_all_batches_of_a_small_population_both_sums_are_without_bias():
    model, population, for_h = linear(3), regression(3, d=3), regression(5, d=3, seed=1)
    names = trainable(model)
    x, y = population
    losses = [lambda m, i=i: half_squares(m, (x[i : i + 1], y[i : i + 1])) for i in range(3)]
    g = dense.gradients(model, names, losses)
    h = dense.hessian(model, names, lambda m: half_squares(m, for_h))
    centred = g - g.mean(0)
    expected = [float((centred @ h * centred).sum()) / 3, float(g.mean(0) @ h @ g.mean(0))]
    found = []
    for drawn in itertools.product(range(3), repeat=3):
        e = enumerated(model, [(x[list(drawn)], y[list(drawn)])], [for_h], half_squares, n=3)
        found.append([e.trace_h_sigma, e.g_h_g])
    close(np.mean(found, 0), expected, rtol=1e-10)


# methods


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_products_agree_within_a_percent(dtype):
    model = lora("llama", dtype)  # which computes its norms in float32 either way
    batches = [tokens(8, seed=1), tokens(8, seed=2)]
    found = {
        m: b_noise(model, batches, method=m, parts=2) for m in ("auto", "exact", "difference", "forward")
    }
    assert found["auto"].method == "exact"
    for method in ("difference", "forward"):
        assert found[method].method == method
        for name in ("trace_h_sigma", "g_h_g"):
            close(getattr(found[method], name), getattr(found["exact"], name), rtol=1e-2, what=name)
    assert set(found["difference"].groups) == {"A", "B"} and not found["forward"].groups


def test_autocast_is_seen_and_allowed_for():
    def wide_loss(model, batch):
        return MSE(model(batch[0]).float(), batch[1])

    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return wide_loss(model, batch)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
    batches = [tuple(t.float() for t in regression(64, seed=k)) for k in range(3)]
    wide = b_noise(model, batches, loss=wide_loss, method="exact")
    found = {m: b_noise(model, batches, loss=loss, method=m) for m in ("auto", "difference", "forward")}
    assert found["auto"].method == "exact"
    for result in found.values():
        close(result.trace_h_sigma, wide.trace_h_sigma, rtol=0.3)


@pytest.mark.parametrize("method", ["exact", "difference", "forward"])
def test_an_autocast_around_it_does_not_hide_shifts_of_the_weights(method):
    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    model, batches = lora("llama"), [tokens(8, seed=k) for k in range(3)]
    inside = b_noise(model, batches, loss=loss, method=method, parts=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = b_noise(model, batches, loss=lambda m, b: m(**b).loss, method=method, parts=1)
    # backward, too, runs under the one around it
    close(found.trace_h_sigma, inside.trace_h_sigma, rtol={"exact": 1e-2}.get(method, 0.1))


def test_a_loss_without_curvature_has_none_in_exact_products():
    batches = [torch.randn(8, 3, generator=torch.Generator().manual_seed(k)).double() for k in range(3)]
    found = b_noise(linear(3), batches, loss=lambda m, x: m(x).mean(), method="exact")
    assert found.trace_h_sigma == found.g_h_g == 0 and found.status == "lower bound"
    assert found.low == 0 and math.isinf(found.high)


def test_h_on_the_examples_of_g_is_refused():
    batch, other = regression(12), regression(12, seed=1)
    turned = tuple(t.flip(0) for t in batch)
    for again in (batch, turned):
        with pytest.raises(CurvatureError, match="batch 1 for H has the same examples"):
            b_noise(linear(), [batch], loss=half_squares, hessian_batches=[other, again])
    b_noise(linear(), [batch], loss=half_squares, hessian_batches=[other])
    with pytest.raises(CurvatureError, match="two batches for g have the same examples"):
        b_noise(linear(), [batch, turned], loss=half_squares, hessian_batches=[other])


def test_sixteen_bit_weights_are_differenced():
    model = lora("llama", torch.bfloat16)
    wide = lora("llama", torch.bfloat16).float()
    batches = [tokens(16, seed=k) for k in range(5)]
    found, exact = b_noise(model, batches), b_noise(wide, batches)
    assert found.method == "difference" and exact.method == "exact"
    close(found.trace_h_sigma, exact.trace_h_sigma, rtol=0.3)


class _Once(torch.autograd.Function):
    """An operation without a second derivative, which says so."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return 2 * ctx.saved_tensors[0] * dy


class _Silent(_Once):
    """The same, which says nothing."""

    @staticmethod
    def backward(ctx, dy):
        return (2 * ctx.saved_tensors[0] * dy).detach()


class Squared(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(5, 1).double(), function

    def forward(self, x):
        return self.function.apply(self.linear(x)) if self.function else self.linear(x) ** 2


@pytest.mark.parametrize("function", [_Once, _Silent])
def test_without_a_second_derivative_gradients_are_differenced(function):
    torch.manual_seed(0)
    model, batches = Squared(function), [regression(12, seed=k) for k in range(9)]
    found = b_noise(model, batches, loss=half_squares)
    assert found.method == "difference" and "second derivative" in found.warnings[0]
    model.function = None
    same_numbers(found, b_noise(model, batches, loss=half_squares), rtol=1e-3)
    if function is _Once:
        model.function = function
        with pytest.raises(CurvatureError, match="take method='difference'"):
            b_noise(model, batches, loss=half_squares, method="exact")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_checkpointed_layers_give_the_same_numbers():
    model, batches = lora("llama"), [tokens(8, seed=1), tokens(8, seed=2)]
    plain = b_noise(model, batches)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    calls, runs = [], []
    model.register_forward_pre_hook(lambda *_: calls.append(None))
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(None))
    for method in ("auto", "difference"):
        found = b_noise(model, batches, method=method)
        close(found.trace_h_sigma, plain.trace_h_sigma, rtol=2e-2)
    assert len(runs) > 1.5 * len(calls), "each layer runs again in backward"


def same_sums(a, b, rtol):
    for name in ("trace_h_sigma", "g_h_g"):
        close(getattr(a, name), getattr(b, name), rtol=rtol, what=name)


def reentrant(*, head=False):
    """A LoRA model whose layers, but not whose head, are behind reentrant checkpoints; and one without."""
    plain, model = lora("llama"), lora("llama")
    for made in (plain, model):
        made.get_base_model().lm_head.weight.requires_grad_(head)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    return plain, model.train()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("how", [{}, {"contributions": False}, {"blocks": True}, {"spectrum": 3}], ids=str)
def test_what_is_behind_a_reentrant_checkpoint_is_differenced_not_read_as_zero(how, head):
    plain, model = reentrant(head=head)
    batches = [tokens(8, seed=1), tokens(8, seed=2)]
    expected, found = b_noise(plain, batches, **how), b_noise(model, batches, **how)
    assert (expected.method, found.method) == ("exact", "difference")
    same_sums(found, expected, rtol=2e-2)
    for name, block in expected.blocks.items():
        close(found.blocks[name].trace_h_sigma, block.trace_h_sigma, rtol=5e-2, what=name)
    if how.get("spectrum"):
        close(found.largest_eigenvalue, expected.largest_eigenvalue, rtol=2e-2)
    assert any("checkpoint" in said for said in found.warnings)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("head", [False, True])
def test_products_asked_for_by_name_refuse_a_reentrant_checkpoint(head):
    _, model = reentrant(head=head)
    batches = [tokens(8, seed=1), tokens(8, seed=2)]
    with pytest.raises(CurvatureError, match="Turn checkpointing off .* or take method='difference'"):
        b_noise(model, batches, method="exact")
    with pytest.raises(CurvatureError, match='checkpointing off .* or take operator="hessian" with method='):
        b_noise(model, batches, operator="ggn")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gauss_newton_is_the_same_under_a_checkpoint_that_keeps_the_graph():
    model, batches = lora("llama"), [tokens(8, seed=1), tokens(8, seed=2)]
    plain = b_noise(model, batches, operator="ggn")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    same_sums(b_noise(model.train(), batches, operator="ggn"), plain, rtol=1e-4)


# what is left behind


def everything(model, optimizer):
    parts = {n: p.detach().clone() for n, p in model.named_parameters()}
    parts |= {f"{n}.grad": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    parts |= {n: b.clone() for n, b in model.named_buffers()}
    for i, state in enumerate(optimizer.state.values()):
        parts |= {f"{i}.{k}": v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    return parts | {"rng": torch.get_rng_state()}


@pytest.mark.parametrize("method", ["exact", "difference", "forward"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed_bit_by_bit_also_by_an_exception(method, fails):
    model = lora("llama", dropout=0.1).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**tokens(4)).loss.backward()
    optimizer.step()
    before, modes = everything(model, optimizer), [m.training for m in model.modules()]
    grads = [p.grad for p in model.parameters()]
    calls = []

    def loss(model, batch):
        calls.append(None)
        if fails and len(calls) > {"exact": 3, "difference": 6, "forward": 8}[method]:
            raise KeyboardInterrupt
        return model(**batch).loss

    def read():
        return b_noise(
            model, [tokens(8, seed=1), tokens(4, seed=2), tokens(4, seed=3)], loss=loss, method=method
        )

    if fails:
        with pytest.raises(KeyboardInterrupt):
            read()
    else:
        read()
    after = everything(model, optimizer)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert modes == [m.training for m in model.modules()]
    assert all(a is b.grad for a, b in zip(grads, model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# what is said


def test_at_initialisation_the_b_block_is_reported():
    model = lora("llama", warm=False)
    found = b_noise(model, [tokens(8, seed=k) for k in range(9)])
    assert found.block == "B" and "of factor B" in str(found)
    forward = b_noise(model, [tokens(8, seed=k) for k in range(9)], method="forward")
    assert forward.block == "B" and "factor B's block" in forward.warnings[-1]
    assert found.groups["A"].trace_h_sigma == found.groups["A"].trace_sigma == 0
    warm = b_noise(lora("llama"), [tokens(8, seed=k) for k in range(9)], blocks=True)
    assert warm.block is None and set(warm.blocks) == {"A", "B"}


def test_the_block_of_a_factor_is_that_of_a_model_whose_other_factor_is_frozen():
    batches = [tokens(8, seed=k) for k in range(3)]
    found = b_noise(lora("llama", torch.float64), batches, blocks=True, parts=1).blocks["B"]
    frozen = lora("llama", torch.float64)
    for name, p in frozen.named_parameters():
        p.requires_grad_("lora_B" in name)
    alone = b_noise(frozen, batches, parts=1)
    # the same products; but which probe has how much of the block's trace is only known there
    close(found.trace_h_sigma, alone.trace_h_sigma, rtol=0.1)
    assert abs(found.g_h_g - alone.g_h_g) < 0.1 * alone.trace_h_sigma / alone.n_examples


def test_a_significantly_negative_curvature_is_said():
    torch.manual_seed(0)
    model = linear()
    batches = [regression(50, seed=k, weight=torch.ones(5, dtype=torch.float64)) for k in range(9)]
    found = b_noise(model, batches, loss=lambda m, b: -half_squares(m, b), parts=4)
    assert found.status == "indefinite" and math.isnan(found.b_noise) and found.g_h_g < 0
    assert "GᵀHG is below 0" in str(found)


def test_few_probes_are_not_trusted():
    found = b_noise(linear(), [regression(12), regression(12, seed=1)], loss=half_squares, probes=3)
    assert found.status == "collecting"


def test_the_spectrum_is_that_of_the_dense_hessian():
    model, batch = linear(bias=True), regression(40, scale=torch.tensor([3.0, 1, 1, 1, 1]).double())
    found = b_noise(model, [regression(12)], loss=half_squares, hessian_batches=[batch], spectrum=6)
    h = dense.hessian(model, trainable(model), lambda m: half_squares(m, batch))
    top = float(torch.linalg.eigvalsh(h)[-1])
    close(found.largest_eigenvalue, top, rtol=1e-6)
    close(found.max_learning_rate, 2 / top, rtol=1e-6)
    signs = torch.randint(2, (6,), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    close(found.trace_h, float(signs @ h @ signs), rtol=1e-8)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"probes": 1}, "probes is 1; a whole number, 2 or more"),
        ({"operator": "fisher"}, "known: 'hessian', 'ggn'"),
        ({"method": "guess"}, "known: 'auto', 'exact', 'difference', 'forward'"),
        ({"level": 1.0}, "a coverage in"),
        ({"hessian_batches": 0}, "H needs examples of its own"),
        ({"hessian_batches": 2}, "at least 3 are needed"),
        ({"hessian_batches": []}, "no batch for g, or none for H"),
        ({"probes": 13}, "12 examples in the batches for g, 13 probes"),
        ({"operator": "ggn", "method": "forward"}, "exact products only"),
        (
            {"operator": "ggn", "loss": lambda m, b: m(b[0]).abs().mean()},
            "cross-entropy and squared error only",
        ),
        (
            {"operator": "ggn", "loss": lambda m, b: (m.weight @ b[0].T).square().mean()},
            "reached|called|seen",
        ),
        ({"loss": lambda m, b: half_squares(m, b) * math.nan}, "not finite"),
    ],
)
def test_what_does_not_fit_is_said(options, text):
    batches = [regression(12), regression(12, seed=1)]
    with pytest.raises(CurvatureError, match=text):
        b_noise(linear(), batches, **{"loss": half_squares, **options})


def test_an_optimizer_inside_backward_is_refused():
    model = linear()
    model.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(CurvatureError, match=r"`weight` has a hook that runs when its gradient is complete"):
        b_noise(model, [regression(12), regression(12, seed=1)], loss=half_squares)


def test_one_example_is_too_few():
    with pytest.raises(CurvatureError, match="at least 2 are needed to see a spread"):
        b_noise(linear(), [regression(1)], loss=half_squares, hessian_batches=[regression(4)])


def test_a_product_that_overflows_is_said():
    calls = []

    def loss(model, batch):
        calls.append(None)
        return half_squares(model, batch) * (1.0 if len(calls) < 2 else math.inf)

    with pytest.raises(CurvatureError, match="not finite"):
        b_noise(linear(), [regression(12), regression(12, seed=1)], loss=loss, method="exact")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, which it uses
def test_the_products_are_those_of_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    model = tiny_gpt2().eval()
    for_h = small_tokens(5, 3)
    names = trainable(model)
    every = dict(model.named_parameters())
    from gns.curvature.ggn import GaussNewton
    from gns.curvature.products import Exact

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, ids):
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return self.inner(input_ids=ids).logits[:, :-1].flatten(0, 1)

    data = [(for_h["input_ids"], for_h["labels"][:, 1:].flatten())]
    point = Point(model, {n: every[n] for n in names}, token_mean)
    vector = {n: torch.randn_like(every[n]) for n in names}
    for ours, theirs in (
        (Exact(point, for_h), curvlinops.HessianLinearOperator),
        (GaussNewton(point, for_h), curvlinops.GGNLinearOperator),
    ):
        operator = theirs(
            Logits(),
            nn.CrossEntropyLoss(ignore_index=-100),
            list(point.parameters.values()),
            data,
            check_deterministic=False,
        )
        expected = operator @ [vector[n] for n in names]
        for name, e in zip(names, expected, strict=True):
            close(ours.product(vector)[name], e.detach(), rtol=1e-8, what=name)


def test_calls_that_a_transform_or_a_narrow_label_makes_are_differentiated_too():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 3).double(), torch.randn(9, 6, 4).double()
    y = torch.randint(0, 3, (9, 6))

    def narrow(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1].to(torch.uint8))

    def mapped(model, batch):
        one = torch.vmap(lambda z, y: torch.nn.functional.cross_entropy(z[None], y[None]))
        return one(model(batch[0]), batch[1]).mean()

    def plain(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    found = [b_noise(model, list(zip(x, y, strict=True)), loss=f) for f in (plain, narrow, mapped)]
    assert [f.method for f in found] == ["exact"] * 3
    for f in found[1:]:
        assert f.trace_h_sigma == pytest.approx(found[0].trace_h_sigma, rel=1e-9)


def classifier(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 40), torch.nn.Tanh(), torch.nn.Linear(40, 4))
    x, y = torch.randn(9, 32, 5), torch.randint(0, 4, (9, 32))
    return model, list(zip(x, y, strict=True))


def lifted(by, scale=1.0):
    return lambda m, b: scale * torch.nn.functional.cross_entropy(m(b[0]), b[1]) + by


@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["curved", "nearly flat"])
@pytest.mark.parametrize("seed", range(4))
def test_rounding_of_a_large_loss_does_not_pass_for_curvature(seed, scale):
    model, batches = classifier(seed)
    exact = b_noise(model, batches, loss=lifted(0, scale), method="exact").trace_h_sigma
    for by in (0.0, 100.0, 1e3, 1e4, 1e5, 1e6):
        found = b_noise(model, batches, loss=lifted(by, scale), method="forward")
        said = any("rounding of the loss" in text for text in found.warnings)
        if by <= 1e3 * scale:
            assert not said, by
        if by >= 1e5 * scale:
            assert said or by == 1e5 * scale, by  # 1e5 itself is at the limit
        if not said:
            assert found.trace_h_sigma == pytest.approx(exact, rel=0.05), by
    assert said


def test_losses_without_curvature_are_no_reading():
    batches = [torch.randn(8, 3, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    with pytest.raises(CurvatureError, match="the Hessian looks like zero"):
        b_noise(linear(3).float(), batches, loss=lambda m, x: m(x).mean(), method="forward")


@pytest.mark.parametrize("seed", range(3))
def test_losses_of_a_normal_size_give_the_exact_numbers_without_a_word(seed):
    model, batches = classifier(seed)
    exact, found = (b_noise(model, batches, loss=lifted(0), method=m) for m in ("exact", "forward"))
    assert not found.warnings
    close([found.trace_h_sigma, found.g_h_g], [exact.trace_h_sigma, exact.g_h_g], rtol=0.01)
