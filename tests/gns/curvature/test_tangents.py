"""Products along a tape: those of the double backward, and left where a loss cannot be followed."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from gns.curvature import factors, operations
from gns.curvature.assemble import concluded
from gns.curvature.contractions import Contractions
from gns.curvature.gathering import gather
from gns.curvature.parts import Point
from gns.curvature.products import Exact
from gns.curvature.tangents import Tangents
from gns.curvature.tape import NoTape
from gns.curvature.vectors import along, dots, norm
from gns.hessian import CurvatureError, b_noise
from gns.probing.still import still
from tests.gns.small_models import FAMILIES, lora, tokens
from tests.gns.test_hessian import half_squares, regression, small_tokens, tiny_gpt2, token_mean
from tests.reference.tolerances import close

WIDE = torch.float64


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=WIDE, generator=torch.Generator().manual_seed(seed))


def point_of(model, loss=None):
    return Point(model, {n: p for n, p in model.named_parameters() if p.requires_grad}, loss)


def compare(point, batch, *, rtol, dropout=False):
    """The products of two vectors by both ways, and the two ways of vᵀHv."""
    with still(point.model, dropout=dropout):
        slow, fast = Exact(point, batch), Tangents(point, batch)
        assert fast.mass == slow.mass
        for seed in range(2):
            vector = {n: draw(*p.shape, seed=seed).to(p) for n, p in point.parameters.items()}
            expected, found = slow.product(vector), fast.product(vector)
            assert norm(expected) > 0
            for name, e in expected.items():
                off = float((found[name] - e).norm())
                assert off <= rtol * (float(e.norm()) + 1e-3 * norm(expected)), (name, off, float(e.norm()))
            size = norm(vector) * norm(expected)
            close(1 + fast.quadratic(vector) / size, 1 + dots(vector, expected).sum() / size, rtol=rtol)
            for name, g in slow.here().items():
                assert float((fast.here()[name] - g).norm()) <= rtol * norm(slow.here()), name
    return fast


# models


def test_products_of_a_lora_model_are_the_double_backwards():
    compare(point_of(tiny_gpt2(), token_mean), small_tokens(5, 3), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_padding_and_rows_without_labels(family, dtype):
    compare(point_of(lora(family, dtype)), tokens(5), rtol=1e-4)  # norms and losses are in float32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_full_fine_tuning_with_tied_embeddings(family, attention):
    torch.manual_seed(0)
    options = {"tie_word_embeddings": True, "attn_implementation": attention}
    compare(point_of(FAMILIES[family](**options).double()), tokens(4), rtol=1e-4)


def test_parameters_that_are_not_asked_for_stand_still():
    model = tiny_gpt2()
    every = point_of(model, token_mean)
    some = {n: p for n, p in every.parameters.items() if "lora_B" in n}
    compare(Point(model, some, token_mean), small_tokens(4, 3), rtol=1e-10)


class Loss(nn.Module):
    """A loss that is some function of a few parameters."""

    def __init__(self, function, shapes):
        super().__init__()
        self.function = function
        self.inputs = nn.ParameterList(draw(*shape, seed=k) for k, shape in enumerate(shapes))

    def forward(self, _):
        found = self.function(*self.inputs)
        weights = draw(*found.shape, seed=9)
        return (weights * found).sum() + (found.sum() / found.numel()) ** 3


def product_of(function, *shapes):
    return compare(point_of(Loss(function, shapes), lambda m, b: m(b)), None, rtol=1e-9)


AT = torch.tensor([[1, 0, 2], [2, 2, 1]])
KNOWN = [
    (lambda x, y: x + y, [(3, 4), (4,)]),
    (lambda x, y: torch.add(x * x, y, alpha=0.3) - 2 * y, [(3, 4), (3, 1)]),
    (lambda x, y: (1 - x) * torch.sub(y, x * y, alpha=2), [(3, 4), (3, 4)]),
    (lambda x, y: x * y * x, [(2, 3, 4), (3, 1)]),
    (lambda x, y: (x @ y) / 3, [(2, 3, 4), (4, 5)]),
    (lambda x, y: x @ y, [(2, 3, 4), (2, 4, 5)]),
    (lambda x, y: x @ y, [(3, 4), (2, 4, 5)]),
    (lambda x, y: torch.bmm(x, y.transpose(1, 2)), [(2, 3, 4), (2, 5, 4)]),
    (lambda x, w, b: functional.linear(x, w, b), [(2, 3, 4), (5, 4), (5,)]),
    (lambda x, w: functional.linear(x.transpose(0, 1), w.t()), [(2, 3, 4), (4, 5)]),
    (lambda b, x, w: torch.addmm(b, x, w, alpha=2, beta=0.5), [(5,), (3, 4), (4, 5)]),
    (lambda b, x, w: torch.baddbmm(b, x, w, alpha=2, beta=3), [(2, 1, 5), (2, 3, 4), (2, 4, 5)]),
    (lambda x: torch.softmax(x * x, 1), [(3, 4, 2)]),
    (lambda x: functional.softmax(x, dim=-1, dtype=WIDE) ** 3, [(3, 4)]),
    (lambda x: functional.silu(x) + torch.tanh(x) * x.sigmoid() - functional.relu(x), [(3, 4)]),
    (lambda x: functional.gelu(x, approximate="tanh") + x.exp() + torch.rsqrt(x.pow(2) + 1), [(3, 4)]),
    (lambda w: functional.embedding(AT, w, 1) ** 2, [(4, 5)]),
    (lambda w: functional.embedding(AT, w) * w[1], [(4, 5)]),
    (lambda x, y: torch.cat([x, -y.t()], 1).square().view(2, 6).chunk(2, 1)[1], [(3, 2), (2, 3)]),
    (lambda x: torch.cat([draw(2, 4), x * x]) * torch.stack([draw(5, 4), draw(5, 4, seed=1)]), [(3, 4)]),
    (lambda x, y: torch.stack([x, y.detach(), x]) ** 2, [(3, 4), (3, 4)]),
    # no slope shows what stands still here
    (lambda x: (torch.cat([x, draw(2, 4)]) - torch.cat([0 * draw(3, 4), draw(2, 4)])) ** 2, [(3, 4)]),
    (
        lambda x: (torch.cat([x, AT[:, :1].expand(2, 4)]) - torch.cat([0 * x, AT[:, :1] + 0 * x[:2]])) ** 2,
        [(3, 4)],
    ),
    (lambda x: torch.stack(torch.unbind(x * x, 0)[:2]).flatten().unsqueeze(0).expand(3, -1), [(3, 4)]),
    (lambda x: x.repeat_interleave(2, 1).permute(1, 0).mT[..., 1:].contiguous() ** 2, [(3, 4)]),
    (lambda x: functional.dropout(x, 0.5, training=False) ** 2, [(3, 4)]),
]
ANY = [
    (lambda x, w: functional.layer_norm(x, (4,), w), [(3, 4), (4,)]),
    (lambda x, w: functional.rms_norm(x, (4,), w), [(3, 4), (4,)]),
    (lambda x, y: torch.einsum("bi,bj->ij", x, y), [(3, 4), (3, 5)]),
    (lambda x, y: x / (y * y + 1), [(3, 4), (3, 4)]),
    (lambda x, y: (x * x + 1) ** y, [(3, 4), (3, 4)]),
    (lambda x, w: functional.conv1d(x[None], w, padding=1), [(2, 6), (3, 2, 3)]),
    (lambda x: torch.logsumexp(x, 1) * torch.linalg.vector_norm(x, dim=1), [(3, 4)]),
    (lambda x: x.max(1)[0] * torch.var_mean(x, 1)[0], [(3, 4)]),
    (lambda x: functional.cross_entropy(x, AT[0], reduction="none"), [(3, 4)]),
    (lambda x: functional.cross_entropy(x, AT[0], label_smoothing=0.1), [(3, 4)]),
    (lambda x, y: functional.mse_loss(x, y * y), [(3, 4), (3, 4)]),
    (lambda x, y: torch.where(x > 0, x * y, y), [(3, 4), (3, 4)]),
    (lambda x: x.masked_fill(x > 0, 2.0) ** 2, [(3, 4)]),
    (lambda q, k, v: functional.scaled_dot_product_attention(q, k, v), [(2, 5, 4)] * 3),
]


@pytest.mark.parametrize(("function", "shapes"), KNOWN)
def test_operations_with_a_rule_of_their_own(function, shapes):
    found = product_of(function, *shapes)
    assert not any(type(o) is operations.Other for o in found.operations)


@pytest.mark.parametrize(("function", "shapes"), ANY)
def test_any_operation_is_differentiated_by_itself(function, shapes):
    found = product_of(function, *shapes)
    assert any(type(o) is operations.Other for o in found.operations)


@pytest.mark.parametrize("how", [{}, {"is_causal": True}, {"enable_gqa": True}, {"attn_mask": draw(5, 5)}])
def test_attention_is_followed_inside(how):
    heads = 4 if how.get("enable_gqa") else 2
    attend = lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, **how)  # noqa: E731
    found = product_of(attend, (2, heads, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4))
    assert any(type(o) is operations.Softmax for o in found.operations) != bool(how.get("enable_gqa"))


def test_cross_entropy_of_ignored_and_forbidden_classes():
    labels, far = torch.tensor([1, -100, 3]), torch.tensor([0.0, 0.0, -torch.inf, 0.0], dtype=WIDE)
    found = product_of(lambda x: functional.cross_entropy(x * x + far, labels), (3, 4))
    assert any(type(o) is operations.Entropy for o in found.operations)


def reported(x, y):
    """What is no part of the loss has no second derivative, or no finite one, or is another each time."""
    (x - x.detach()).norm(dim=1)
    torch.cdist(x, x)
    functional.dropout(x * x, 0.5)
    return x * y * y


def test_what_a_model_only_reports_is_not_followed():
    product_of(reported, (3, 4), (3, 4))


def test_what_has_no_tangent_does_not_bend():
    product_of(lambda x, y: torch.hypot(x.sign(), y) + torch.atan2(x.floor(), x), (3, 4), (3, 4))


# what cannot be followed


class _Cube(torch.autograd.Function):
    """An operation that no mode sees."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, dy):
        return 3 * ctx.saved_tensors[0] ** 2 * dy


def inside(x):
    y = x * 2
    y.mul_(y.detach())
    return y


OUTSIDE = draw(3, 4).requires_grad_() * 2


def hooked(x):
    y = x * x
    y.register_hook(lambda g: 2 * g)
    return y


def checkpointed(x):
    return torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (_Cube.apply, "no call was seen"),
        (lambda x: x * OUTSIDE, "no call was seen"),
        (inside, "written to"),
        (lambda x: functional.relu(x * x, inplace=True), "written to"),
        (lambda x: functional.dropout(x, 0.5), "dropout"),
        (hooked, "hook"),
        (checkpointed, "checkpoint"),
        (lambda x: x.bfloat16() ** 2, "other precision"),
        (lambda x: torch.vmap(torch.sin)(x), "transform|no call was seen"),
    ],
)
def test_a_loss_that_cannot_be_followed_is_left(function, text):
    point = point_of(Loss(function, [(3, 4)]), lambda m, b: m(b))
    with still(point.model, dropout=True), pytest.raises(NoTape, match=text):
        Tangents(point, None)


class Through(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.function = nn.Linear(5, 1).double(), function

    def forward(self, x):
        return self.function(self.linear(x))


@pytest.mark.parametrize("function", [_Cube.apply, lambda x: functional.relu(x, inplace=True)])
def test_what_is_left_is_differentiated_twice(function):
    batches = [regression(12, seed=k) for k in range(9)]
    found = b_noise(Through(function), batches, loss=half_squares, contributions=False)
    assert (found.method, found.derivatives, found.warnings) == ("exact", "double backward", ())
    seen = (lambda x: x**3) if function == _Cube.apply else functional.relu
    plain = b_noise(Through(seen), batches, loss=half_squares, contributions=False)
    assert (plain.method, plain.derivatives) == ("exact", "tangents")
    close([found.trace_h_sigma, found.g_h_g], [plain.trace_h_sigma, plain.g_h_g], rtol=1e-10)


def test_a_part_without_a_label_is_passed_over():
    batch = tokens(4, seed=3)
    batch["labels"][:2] = -100  # the first of two parts
    how = {"hessian_batches": [batch], "parts": 2, "contributions": False}
    found = b_noise(lora("llama"), [tokens(8, seed=k) for k in range(2)], **how)
    assert (found.derivatives, found.n_hessian) == ("tangents", 1)


# rules that are wrong on purpose


def lose_the_cross_term(self, bent, b, slope, da):
    pass


def halve(self, bent, a, slope, db):
    bent.add_product(a, 0.5 * slope, db)


def miss_a_branch(self, moved, bent):
    self._set(moved, 0.9 * moved[id(self.call.live[0])])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("kind", "name", "wrong"),
    [
        (factors.Rows, "in_b", lose_the_cross_term),
        (factors.Rows, "in_a", halve),
        (operations.Linear, "push", miss_a_branch),
    ],
)
def test_a_wrong_rule_is_found_out(monkeypatch, kind, name, wrong, dtype):
    model, batches = lora("llama", dtype), [tokens(8, seed=k) for k in range(3)]
    right = b_noise(model, batches, contributions=False)
    assert right.derivatives == "tangents"
    monkeypatch.setattr(kind, name, wrong)
    found = b_noise(model, batches, contributions=False)
    assert (found.method, found.derivatives) == ("exact", "double backward")
    close([found.trace_h_sigma, found.g_h_g], [right.trace_h_sigma, right.g_h_g], rtol=1e-4)


NUMBERS = ("trace_h_sigma", "g_h_g", "low", "trace_h", "largest_eigenvalue")


def refuse(self, point, batch):
    raise NoTape("told to")


def test_a_reading_is_the_double_backwards(monkeypatch):
    model, batches = lora("qwen3", WIDE), [tokens(8, seed=k) for k in range(3)]
    how = {"blocks": True, "spectrum": 4}
    found = b_noise(model, batches, contributions=False, **how)
    monkeypatch.setattr(Tangents, "__init__", refuse)
    slow = b_noise(model, batches, contributions=False, **how)
    assert (found.derivatives, slow.derivatives) == ("tangents", "double backward")
    for name in NUMBERS:
        close(getattr(found, name), getattr(slow, name), rtol=1e-4, what=name)
    assert found.blocks.keys() == slow.blocks.keys() == {"A", "B"}
    for factor, block in found.blocks.items():
        other = slow.blocks[factor]
        close([block.trace_h_sigma, block.g_h_g], [other.trace_h_sigma, other.g_h_g], rtol=1e-4)


def test_contributions_are_those_of_every_probes_own_product():
    model, batches = lora("qwen3", WIDE), [tokens(8, seed=k) for k in range(3)]
    found = b_noise(model, batches, parts=1)
    bare = b_noise(model, batches, parts=1, contributions=False)
    assert (found.derivatives, bare.derivatives) == ("double backward", "tangents")
    assert found.groups.keys() == {"A", "B"} and bare.groups is bare.modules is None
    close([bare.trace_h_sigma, bare.g_h_g], [found.trace_h_sigma, found.g_h_g], rtol=1e-4)
    with still(model, dropout=False):  # the tape's own products say the same by factor
        sums = gather(model, batches[:-1], None, probes=8, seed=0)
        part = Tangents(point_of(model), batches[-1])
        probes = np.stack([dots(u, part.product(u)) for u in map(sums.probe, range(8))])
        curved = part.product(sums.mean)
    taped = Contractions(
        probes[None],
        along(sums.parts, curved)[None],
        dots(sums.weighted, curved)[None],
        np.ones(1),
        "exact",
        9,
    )
    said = concluded(sums, taped, level=0.95, operator="hessian", seed=0)
    for parts, others in ((found.groups, said.groups), (found.modules, said.modules)):
        assert parts.keys() == others.keys()
        for name, c in parts.items():
            scale = abs(found.trace_h_sigma)
            assert abs(c.trace_h_sigma - others[name].trace_h_sigma) < 1e-5 * scale, name
            assert abs(c.g_h_g - others[name].g_h_g) < 1e-5 * scale, name


def test_sixteen_bit_weights_go_the_other_way():
    model, batches = lora("llama", torch.bfloat16), [tokens(8, seed=k) for k in range(3)]
    found = b_noise(model, batches, method="exact", contributions=False)
    assert (found.method, found.derivatives) == ("exact", "double backward")
    assert b_noise(model, batches, contributions=False).derivatives is None


def test_without_memory_for_a_tape_there_is_the_other_way(monkeypatch):
    def full(self, moved):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(factors.Product, "bend", full)
    found = b_noise(lora("llama"), [tokens(8, seed=k) for k in range(2)], contributions=False)
    assert (found.method, found.derivatives) == ("exact", "double backward")


@pytest.mark.parametrize("method", ["exact", "difference", "forward"])
def test_contributions_that_are_not_asked_for_are_absent(method):
    model, batches = lora("llama", WIDE), [tokens(8, seed=k) for k in range(3)]
    found = b_noise(model, batches, method=method, contributions=False)
    assert found.groups is None and found.modules is None
    every = b_noise(model, batches, method=method)
    assert (every.groups is None) == (every.modules is None) == (method == "forward")
    close(found.trace_h_sigma, every.trace_h_sigma, rtol=1e-4)
    with pytest.raises(CurvatureError, match="contributions is 1; True or False"):
        b_noise(model, batches, contributions=1)
