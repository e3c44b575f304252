"""On a CUDA device: exact against one pass per example, weights bit-identical, no wait inside a step."""

import contextlib
import copy
import gc
import os
import warnings

import pytest
import torch

from gns import metrics, probe
from gns.monitor import GNSMonitor
from gns.rules.linear import wide_bmm
from tests.gns.small_models import FAMILIES, lora, tokens
from tests.gns.test_families import TOLERANCE, per_example
from tests.gns.test_untouched import build
from tests.reference.per_example import contributions, trainable
from tests.reference.preconditioned import SecondMoment, sums
from tests.reference.tolerances import close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # where torch has no deterministic kernel; the bitwise tests check that the engine repeats itself
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),
]


@pytest.fixture(autouse=True)
def repeatable(monkeypatch):
    """Kernels that give the same bits twice, and float32 products in float32."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"))
    torch.use_deterministic_algorithms(True, warn_only=True)
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.use_deterministic_algorithms(False)


def here(batch):
    return {name: value.cuda() for name, value in batch.items()}


def plain_tokens(n, t=17, seed=0):
    """Without padding: transformers looks at a mask, and so waits for the device."""
    ids = torch.randint(3, 61, (n, t), generator=torch.Generator().manual_seed(seed)).cuda()
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_norms_equal_one_pass_per_example(adapter, family, dtype):
    torch.manual_seed(0)
    model = lora(family, dtype) if adapter == "lora" else FAMILIES[family]().to(dtype)
    model, batch = model.cuda(), here(tokens(5))
    rows, _, weights = per_example(model, batch)
    with GNSMonitor(model, on_error="raise") as monitor:
        model(**batch).loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        step, coverage = monitor.latest, monitor.coverage()
    rel = {"rel": TOLERANCE[dtype]}
    assert step.mean_sq_norm == pytest.approx(rows.square().sum(1).mean().item(), **rel)
    assert step.sq_norm_of_mean == pytest.approx(rows.mean(0).square().sum().item(), **rel)
    assert step.sum_sq_weights == pytest.approx(weights.square().sum().item(), rel=1e-6)
    assert coverage.share == 1 and coverage.verified == frozenset(coverage.measured)


SETUPS = {
    "float32": {},
    "dropout": {"dropout": 0.2},
    "bf16 autocast": {"autocast": torch.bfloat16},
    "bf16 weights": {"dtype": torch.bfloat16},
    "fp16 autocast with a scaler": {"autocast": torch.float16},
    "checkpointing": {"checkpoint": False, "autocast": torch.bfloat16, "dropout": 0.2},
    "reentrant checkpointing": {"checkpoint": True, "dropout": 0.2},
}


def train(setup, *, watched, steps=12, **monitor):
    model = build(**{k: v for k, v in setup.items() if k != "autocast"}).cuda()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    half = setup.get("autocast")
    scaler = torch.amp.GradScaler("cuda", enabled=half is torch.float16, init_scale=2.0**10)
    torch.manual_seed(7)
    torch.cuda.manual_seed(7)
    found = GNSMonitor(model, on_error="raise", scaler=scaler if scaler.is_enabled() else None, **monitor)
    with found if watched else contextlib.nullcontext():
        for step in range(steps):
            for micro in range(2):
                with torch.autocast("cuda", half) if half else contextlib.nullcontext():
                    loss = model(**here(tokens(3 + (step + micro) % 3, seed=100 * step + micro))).loss / 2
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, 0.05)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return [p.detach().clone() for p in trained], found.history if watched else []


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_weights_are_equal_bit_for_bit(setup):
    plain, _ = train(setup, watched=False)
    again, _ = train(setup, watched=False)
    assert all(map(torch.equal, plain, again)), "the engine itself is not deterministic here"
    watched, history = train(setup, watched=True)
    assert all(map(torch.equal, plain, watched))
    assert len(history) == 12 and not any(s.reason or s.loss_scaled for s in history)


def test_another_seed_gives_other_weights():
    model = build(dropout=0.2).cuda()
    first = model(**here(tokens(3))).loss
    assert not torch.equal(first, model(**here(tokens(3))).loss)


@pytest.mark.parametrize("name", ["bf16 autocast", "fp16 autocast with a scaler"])
def test_the_readings_of_low_precision_are_those_of_float32(name):
    _, full = train(SETUPS["float32"], watched=True, steps=1)
    _, half = train(SETUPS[name], watched=True, steps=1)
    assert half[0].mean_sq_norm == pytest.approx(full[0].mean_sq_norm, rel=0.03)
    assert half[0].sq_norm_of_mean == pytest.approx(full[0].sq_norm_of_mean, rel=0.03)


def waits(watched, autocast, metric="euclidean"):
    """Where a training waits for the device, after two steps that allocate and make lazy handles."""
    model = lora("llama").cuda()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    data = [plain_tokens(4, seed=i) for i in range(8)]
    monitor = GNSMonitor(model, metric=metric, on_error="raise")
    found = []
    with monitor if watched else contextlib.nullcontext():
        for i, batch in enumerate(data):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn" if i >= 2 else "default")
                try:
                    with torch.autocast("cuda", autocast) if autocast else contextlib.nullcontext():
                        loss = model(**batch).loss
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(trained, 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            called = [w for w in seen if "called a synchronizing" in str(w.message)]
            found += [(i, w.filename, w.lineno) for w in called]
        if watched:
            assert len(monitor.history) == len(data)
            assert [s.step for s in monitor.history if s.reason] == ([0] if metric == "adam" else [])
    return found


@pytest.mark.parametrize("metric", metrics.METRICS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_a_measured_step_waits_for_the_device_no_more_often_than_an_unwatched_one(autocast, metric):
    # the self-check still looks on in the third step
    assert waits(True, autocast, metric) == waits(False, autocast)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}, {"amsgrad": True}], ids=str)
def test_the_optimizers_metric_is_that_of_one_pass_per_example(options):
    model, data = lora("llama", torch.float64).cuda(), [here(tokens(5, seed=i)) for i in range(3)]
    beta, eps = 0.9, 1e-3
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3, betas=(0.9, beta), eps=eps, **options)
    moment = SecondMoment(beta, eps, amsgrad="amsgrad" in options)
    with GNSMonitor(model, metric="adam", on_error="raise") as monitor:
        for i, batch in enumerate(data):
            alone = [{k: v[j : j + 1] for k, v in batch.items()} for j in range(5)]
            share = batch["labels"][:, 1:].ne(-100).sum(1) / batch["labels"][:, 1:].ne(-100).sum()
            each = [
                lambda one=one, a=a: model(**one).loss * a for one, a in zip(alone, share, strict=True) if a
            ]
            found = contributions(trainable(model), each)
            found += [{k: torch.zeros_like(c) for k, c in found[0].items()}] * (5 - len(found))
            model(**batch).loss.backward()
            expected = sums(found, moment) if moment.t else None
            moment.step({name: sum(c[name] for c in found) for name in found[0]})
            optimizer.step()
            optimizer.zero_grad()
            if expected is not None:
                close(monitor.latest.rows, list(expected.values()), rtol=1e-4, what=f"step {i}")
                assert monitor.latest.mean_fourth > 0


def test_a_wait_would_be_seen():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("o, i", [(16, 4_096), (4_096, 16), (3, 8)])
def test_products_of_halves_are_summed_in_float32(dtype, o, i):
    made = torch.Generator("cuda").manual_seed(0)
    a = torch.randn(3, 8_192, o, device="cuda", generator=made).to(dtype)
    b = torch.randn(3, 8_192, i, device="cuda", generator=made).to(dtype)
    found = wide_bmm(a.mT, b)
    assert found.dtype is torch.float32
    exact = a.double().mT @ b.double()
    assert float((found - exact).norm() / exact.norm()) < 1e-5
    # control: what 16 bits would leave of the same sums
    assert float((torch.bmm(a.mT, b).double() - exact).norm() / exact.norm()) > 1e-4


def test_detaching_frees_everything():
    model = lora("llama").cuda()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)

    def steps(k):
        for i in range(k):
            model(**plain_tokens(4, seed=i)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    steps(3)
    before = steps(3)
    monitor = GNSMonitor(model, on_error="raise").attach()
    steps(100)  # the row maps of the last calls are remembered, up to a number
    assert steps(20) >= steps(150)
    monitor.detach()
    del monitor
    gc.collect()
    assert steps(3) == before


@pytest.mark.filterwarnings("ignore:the model's own call was not seen:gns.monitor.GNSWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_has_the_same_sums(backend):
    torch.manual_seed(0)
    torch._dynamo.reset()
    layers = torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    model = torch.nn.Sequential(*layers).cuda()
    twin, found = copy.deepcopy(model), []
    for net, wrap in ((twin, lambda f: f), (model, lambda f: torch.compile(f, backend=backend))):
        with GNSMonitor(net, on_error="raise") as monitor:
            call, optimizer = wrap(net), torch.optim.SGD(net.parameters(), lr=0.1)
            for seed in range(3):
                x = torch.randn(8, 7, 6, generator=torch.Generator().manual_seed(seed)).cuda()
                call(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append([[s.n_examples, s.mean_sq_norm, s.sq_norm_of_mean] for s in monitor.history])
    close(found[1], found[0], torch.float32)


def test_norms_on_the_device_are_pairwise_sums():
    made = torch.Generator("cuda").manual_seed(0)
    blocks = torch.randn(2, 1_500, 2_000, device="cuda", generator=made)
    close(metrics.of_blocks(blocks), blocks.double().square().sum((1, 2)), torch.float32)


def test_the_metric_of_adam_is_that_of_the_cpu():
    found = {}
    for device in ("cpu", "cuda"):
        model = lora("llama", torch.float64).to(device)  # Adam divides by tiny numbers
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        with GNSMonitor(model, on_error="raise", metric="adam") as monitor:
            for i in range(3):
                model(**{k: v.to(device) for k, v in plain_tokens(5, seed=i).items()}).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            found[device] = [(s.mean_sq_norm, s.sq_norm_of_mean, s.mean_fourth) for s in monitor.history[1:]]
    close(found["cuda"], found["cpu"], rtol=1e-3, what="(m, q, fourth)")


def test_a_frozen_probe_is_that_of_the_cpu_and_leaves_nothing():
    found = {}
    for device in ("cpu", "cuda"):
        model = lora("llama", torch.float64).to(device)
        state = torch.cuda.get_rng_state()
        data = [{k: v.to(device) for k, v in plain_tokens(4, seed=i).items()} for i in range(6)]
        estimate = probe(model, data, progress=False)
        assert torch.equal(state, torch.cuda.get_rng_state())
        assert all(p.grad is None for p in model.parameters())
        found[device] = [estimate.trace_sigma, estimate.grad_sq_norm]
    close(found["cuda"], found["cpu"], rtol=1e-5)


def test_norms_of_single_examples_equal_one_pass_each():
    model, batch = lora("llama", torch.float64).cuda(), plain_tokens(12)
    rows, _, _ = per_example(model, batch)
    sq = rows.square().sum(1)
    with GNSMonitor(model, on_error="raise") as monitor:
        model(**batch).loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        step = monitor.latest
    assert step.mean_fourth == pytest.approx(sq.square().mean().item(), rel=1e-6)
    assert step.top_sq_norms == pytest.approx(sq.sort(descending=True).values[:2].tolist(), rel=1e-6)
