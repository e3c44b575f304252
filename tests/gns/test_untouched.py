"""Training is left bit-identical, in each set-up where the engine itself is deterministic."""

import copy
import warnings

import pytest
import torch

from gns.monitor import GNSMonitor
from tests.gns.small_models import FAMILIES, lora, tokens, train

SETUPS = {
    "plain": {},
    "dropout": {"dropout": 0.2},
    "bf16 autocast": {"autocast": torch.bfloat16},
    "bf16 weights": {"dtype": torch.bfloat16},
    "bf16 autocast and dropout": {"autocast": torch.bfloat16, "dropout": 0.2},
    "checkpointing": {"checkpoint": False},
    "reentrant checkpointing": {"checkpoint": True, "dropout": 0.2},
    "checkpointing under autocast": {"checkpoint": False, "autocast": torch.bfloat16, "dropout": 0.2},
    "SGD": {"make": torch.optim.SGD},
}


def build(family="llama", dtype=torch.float32, dropout=0.0, checkpoint=None):
    model = lora(family, dtype, dropout=dropout).train()
    if checkpoint is not None:
        base = model.get_base_model()
        with warnings.catch_warnings():  # renamed in transformers 5.23; 5.17 knows this name only
            warnings.filterwarnings(
                "ignore", message="`gradient_checkpointing_enable`", category=FutureWarning
            )
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpoint})
        base.enable_input_require_grads()
    return model


def both(setup, family="llama", **monitor_kwargs):
    """Train with and without a monitor from the same seed."""
    keys = {k: v for k, v in setup.items() if k in ("dtype", "dropout", "checkpoint")}
    loop = {k: v for k, v in setup.items() if k not in keys}
    results = []
    for watched in (False, True):
        model = build(family, **keys)
        torch.manual_seed(7)
        if watched:
            with GNSMonitor(model, on_error="raise", **monitor_kwargs) as monitor:
                results.append(train(model, **loop))
                return *results, monitor
        results.append(train(model, **loop))


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_weights_are_equal_bit_for_bit(setup):
    plain, watched, monitor = both(setup)
    assert all(torch.equal(p, q) for p, q in zip(plain, watched, strict=True))
    assert len(monitor.history) == 20 and not any(s.reason for s in monitor.history)
    assert [s.n_examples for s in monitor.history[:3]] == [7, 9, 8]
    assert monitor.coverage().share == 1
    assert monitor.coverage().verified == frozenset(monitor.coverage().measured)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_switching_on_and_off(family):
    plain, watched, monitor = both({"dropout": 0.1}, family, every=4)
    assert all(torch.equal(p, q) for p, q in zip(plain, watched, strict=True))
    assert [s.step for s in monitor.history] == [0, 4, 8, 12, 16]


def test_another_seed_gives_other_weights():
    model = build(dropout=0.2)
    torch.manual_seed(7)
    first = train(model, steps=2)
    model = build(dropout=0.2)
    torch.manual_seed(8)
    assert not all(torch.equal(p, q) for p, q in zip(first, train(model, steps=2), strict=True))


@pytest.mark.parametrize("name", ["checkpointing", "reentrant checkpointing", "bf16 autocast"])
def test_the_readings_do_not_depend_on_the_engine(name):
    setup = {k: v for k, v in SETUPS[name].items() if k != "dropout"}
    _, _, plain = both({})
    _, _, other = both(setup)
    # rounding to 8 bits moves the weights apart after the first step: Adam divides by the gradient's size
    tolerance, steps = (0.03, 1) if "autocast" in setup else (1e-5, 5)
    for p, q in zip(plain.history[:steps], other.history[:steps], strict=True):
        assert q.mean_sq_norm == pytest.approx(p.mean_sq_norm, rel=tolerance)
        assert q.sq_norm_of_mean == pytest.approx(p.sq_norm_of_mean, rel=tolerance)


def test_autocast_saves_no_further_tensor():
    saved = {}
    for watched in (False, True):
        model, seen = build(), {}
        monitor = GNSMonitor(model, on_error="raise").attach() if watched else None

        def pack(t, seen=seen):
            seen[t.untyped_storage().data_ptr()] = t  # kept alive, so that no address comes twice
            return t

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            torch.autocast("cpu", torch.bfloat16),
        ):
            loss = model(**tokens(4)).loss
        saved[watched] = sum(t.untyped_storage().nbytes() for t in seen.values())
        del loss
        if monitor:
            monitor.detach()
    assert saved[True] == saved[False]


@pytest.mark.parametrize("use", ["evaluate", "generate", "deepcopy", "save"])
def test_other_uses_in_between_change_nothing(use, tmp_path):
    model, twin = build(), build()
    expected = train(twin, steps=2)

    def interrupt():
        if use == "evaluate":
            with torch.no_grad():
                model(**tokens(4))
        elif use == "generate":
            model.generate(input_ids=tokens(2)["input_ids"], max_new_tokens=2, do_sample=False)
        elif use == "deepcopy":
            copy.deepcopy(model)(**tokens(4)).loss.backward()
        else:
            model.save_pretrained(tmp_path)

    with GNSMonitor(model, on_error="raise") as monitor:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(2):
            for micro in range(2):
                (model(**tokens(3 + (step + micro) % 3, seed=100 * step + micro)).loss / 2).backward()
                interrupt()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.05)
            optimizer.step()
            optimizer.zero_grad()
            interrupt()
        assert [s.n_examples for s in monitor.history] == [7, 9]
    assert all(
        torch.equal(p, q)
        for p, q in zip(expected, [p for p in model.parameters() if p.requires_grad], strict=True)
    )


@pytest.mark.filterwarnings("ignore:the model's own call was not seen:gns.monitor.GNSWarning")
# the compiler instantiates autograd functions while it traces them
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_plain_model_compiles_without_a_graph_break():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    found = []
    for net, wrap in (
        (twin, lambda f: f),
        (model, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")),
    ):
        with GNSMonitor(net, on_error="raise") as monitor:
            call = wrap(net)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            for n in (8, 8, 5):
                x = torch.randn(n, 7, 6, generator=torch.Generator().manual_seed(n))
                call(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append([(s.n_examples, s.mean_sq_norm, s.sq_norm_of_mean) for s in monitor.history])
    for eager, compiled in zip(*found, strict=True):
        assert compiled == pytest.approx(eager, rel=1e-5)


@pytest.mark.parametrize("checkpoint", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
@pytest.mark.parametrize("where", ["backward", "forward"])
@pytest.mark.parametrize("after", [10, 40])  # 28 taps: in the first forward pass, or in a recomputation
def test_standing_down_in_the_middle_of_a_step_leaves_the_training_alone(
    checkpoint, where, after, monkeypatch
):
    from gns import reducers
    from gns.monitor import GNSWarning
    from gns.taps import Tap

    plain = train(build(checkpoint=checkpoint), steps=4)
    model, calls = build(checkpoint=checkpoint), []

    def after_a_while(*args):
        calls.append(1)
        if len(calls) > after:
            raise ArithmeticError("planted")
        return original(*args)

    place, name = (reducers, "sq_norms") if where == "backward" else (Tap, "follow_device")
    original = getattr(place, name)
    monkeypatch.setattr(place, name, after_a_while)
    with pytest.warns(GNSWarning, match="stands down.*planted") as seen, GNSMonitor(model):
        watched = train(model, steps=4)
    assert len(seen) == 1
    assert all(torch.equal(p, q) for p, q in zip(plain, watched, strict=True))
