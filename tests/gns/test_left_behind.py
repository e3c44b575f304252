"""Exceptions, copies, steps between measured ones: nothing is left behind, nothing grows."""

from __future__ import annotations

import collections
import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn

from gns.monitor import GNSMonitor, GNSWarning
from tests.gns.fault_tools import Boom, agree, draw, go, loss_of, mlp, sgd, truth
from tests.gns.matrix_models import batch, build, quiet


@pytest.fixture
def model():
    return mlp()


# exceptions, copies, what is left behind


def state_of(model):
    """Everything that a monitor could leave on a model, and on autograd and optimizers."""
    from torch.optim import optimizer as hooks

    kinds = [name for name in vars(nn.Module()) if "hooks" in name]
    return (
        {name: sorted(vars(m)) for name, m in model.named_modules()},
        {(name, kind): len(getattr(m, kind)) for name, m in model.named_modules() for kind in kinds},
        {
            name: (sorted(p._backward_hooks or ()), sorted(p._post_accumulate_grad_hooks or ()))
            for name, p in model.named_parameters()
        },
        {name: sorted(vars(p)) for name, p in model.named_parameters()},
        (len(hooks._global_optimizer_pre_hooks), len(hooks._global_optimizer_post_hooks)),
    )


@pytest.mark.parametrize("where", ["backward", "forward", "optimizer"])
def test_detach_after_an_exception_in_the_middle_restores_everything(model, where):
    before = state_of(model)
    monitor = GNSMonitor(model, on_error="raise").attach()
    optimizer = sgd(model)
    go(model, optimizer, draw())
    with pytest.raises((KeyError, RuntimeError)):
        if where == "backward":
            model[4](Boom.apply(model[3](model[2](model[1](model[0](draw())))))).sum().backward()
        elif where == "forward":
            model(draw()[:, :3])
        else:
            loss_of(model, draw()).backward()
            optimizer.step(closure=lambda: {}["the user's own"])
    monitor.detach()
    assert state_of(model) == before
    optimizer.zero_grad()
    with GNSMonitor(model, on_error="raise") as again:
        expected = truth(model, draw(seed=3))
        go(model, optimizer, draw(seed=3))
        agree(again.latest, expected)
    assert state_of(model) == before


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_after_an_exception_in_the_middle_the_next_step_is_right(model, where):
    optimizer = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GNSWarning)
        with GNSMonitor(model, on_error="raise") as monitor:
            with pytest.raises((KeyError, RuntimeError)):
                if where == "backward":
                    Boom.apply(model(draw())).sum().backward()
                elif where == "forward":
                    model(draw()[:, :3])
                else:
                    optimizer.step(closure=lambda: {}["the user's own"])
            for k in range(3):
                expected = truth(model, x := draw(seed=k))
                go(model, optimizer, x)
                agree(monitor.latest, expected)
    assert len(monitor.history) == 3


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_a_copy_made_in_the_middle_of_a_step_never_writes_into_the_sums(kind):
    model = build("llama", "lora", torch.float64)
    reference = build("llama", "lora", torch.float64)
    found = []
    for m, interrupt in ((reference, False), (model, True)):
        with GNSMonitor(m, on_error="raise") as monitor:
            optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
            for k in range(2):
                optimizer.zero_grad()
                m(**batch(seed=k)).loss.backward()
                if interrupt:
                    twin = copy.deepcopy(m) if kind == "deepcopy" else pickle.loads(pickle.dumps(m))
                    other = torch.optim.SGD(twin.parameters(), lr=0.1)
                    twin(**batch(6, seed=9)).loss.backward()
                    other.step()
                m(**batch(seed=k + 5)).loss.backward()
                optimizer.step()
            found.append([(s.n_examples, s.mean_sq_norm, s.sq_norm_of_mean) for s in monitor.history])
    assert found[0] == found[1]


def test_what_is_saved_while_attached_is_what_is_saved_without(tmp_path):
    import safetensors.torch

    model, keys = build("llama", "dora"), []
    for attached in (False, True):
        monitor = GNSMonitor(model)
        if attached:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", GNSWarning)
                monitor.attach()
        model.save_pretrained(tmp_path / str(attached))
        torch.save(model.state_dict(), tmp_path / f"{attached}.pt")
        monitor.detach()
    for name in ("adapter_model.safetensors",):
        plain, watched = (safetensors.torch.load_file(tmp_path / str(a) / name) for a in (False, True))
        assert plain.keys() == watched.keys() and all(torch.equal(plain[k], watched[k]) for k in plain)
    keys = [list(torch.load(tmp_path / f"{a}.pt")) for a in (False, True)]
    assert keys[0] == keys[1]


def test_a_saved_history_is_continued_by_a_monitor_of_a_reloaded_model(model):
    with GNSMonitor(model, on_error="raise") as monitor:
        optimizer = sgd(model)
        for k in range(12):
            go(model, optimizer, draw(seed=k))
    state = pickle.loads(pickle.dumps(monitor.state_dict()))
    twin = pickle.loads(pickle.dumps(model))
    later = GNSMonitor(twin, on_error="raise")
    later.load_state_dict(state)
    with later:
        optimizer = sgd(twin)
        for k in range(12, 24):
            go(twin, optimizer, draw(seed=k))
    assert [s.step for s in later.history] == list(range(24))
    assert later.estimate().n_steps == 24 and later.estimate().coverage == 1
    assert later.history[:12] == monitor.history


# cost between measured steps


def graph_names(tensor):
    """Every node of a graph by its name, counted."""
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [f for f, _ in node.next_functions]
    return collections.Counter(node.name() for node in seen)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("adapter", ["lora", "modules_to_save"])
def test_between_measured_steps_the_graph_is_that_of_an_unwatched_model(adapter, checkpoint):
    model = build("llama", adapter)
    if checkpoint:
        with quiet():
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    plain = graph_names(model(**batch()).loss)
    saved = []

    def pack(t):
        saved[-1] += t.nbytes
        return t

    with GNSMonitor(model, every=3, on_error="raise") as monitor:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for k in range(7):
            saved.append(0)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                loss = model(**batch(seed=k)).loss
            names = graph_names(loss)
            echoes = names.pop("EchoBackward", 0)  # identities: a recomputation may fall into a measured step
            assert (names == plain) == (k % 3 > 0), k
            assert (echoes > 0) == (checkpoint and k % 3 > 0), k
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    monitor.detach()
    saved.append(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**batch())
    assert saved[1] == saved[2] == saved[4] == saved[-1]
    assert [s.step for s in monitor.history] == [0, 3, 6]


# nothing grows


WATCHED = {"Tensor", "Call", "RowMap", "OpenStep", "HostCopy", "Stamp", "StepUnderWay"}


def census():
    """Count the live objects of the kinds that a step makes."""
    gc.collect()
    kinds = collections.Counter(type(o).__name__ for o in gc.get_objects())
    return {kind: kinds[kind] for kind in WATCHED}


def grown(before):
    """What there is more of now; a few check sums or a longer ring of calls are no growth with the steps."""
    return {kind: (before[kind], count) for kind, count in census().items() if count > before[kind] + 70}


def wander(model, optimizer, steps):
    """Train in every way that leaves something half done."""
    for k in range(steps):
        optimizer.zero_grad()
        loss_of(model, draw(seed=k)).backward()
        model(draw())  # never run backward
        loss = loss_of(model, draw())
        if k % 3 == 0:
            loss.backward()
            optimizer.zero_grad()  # thrown away
            loss_of(model, draw()).backward()
        torch.autograd.grad(loss_of(model, draw()), model[0].weight)
        with torch.no_grad():
            model(draw())
        if k % 5 == 0:
            with pytest.raises(KeyError):
                Boom.apply(model(draw())).sum().backward()
        optimizer.step()


def test_the_census_sees_what_grows(model):
    before, held = census(), [loss_of(model, draw()) for _ in range(100)]
    assert "Tensor" in grown(before)
    held.clear()
    assert grown(before) == {}


@pytest.mark.parametrize("every", [1, 3])
def test_nothing_is_held_after_steps_however_they_end(model, every):
    optimizer = sgd(model, lr=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GNSWarning)
        with GNSMonitor(model, every=every, history=10, on_error="raise") as monitor:
            wander(model, optimizer, 10)
            before, hooks = census(), state_of(model)
            wander(model, optimizer, 100)  # some 500 calls of the model
            assert grown(before) == {}
            assert state_of(model) == hooks
            assert len(monitor.history) == 10


@pytest.mark.slow
def test_two_thousand_accumulated_steps_of_an_adapter_leak_nothing():
    import tracemalloc

    model = build("llama", "lora", layers=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    with GNSMonitor(model, history=100, on_error="raise") as monitor:

        def go(k):
            for _ in range(k):
                for part in (batch(2, 5), batch(3, 6)):
                    (model(**part).loss / 2).backward()
                optimizer.step()
                optimizer.zero_grad()
            gc.collect()

        go(200)
        tracemalloc.start()
        before, hooks = census(), state_of(model)
        objects, memory = len(gc.get_objects()), tracemalloc.get_traced_memory()[0]
        go(2_000)
        assert grown(before) == {} and state_of(model) == hooks
        assert len(gc.get_objects()) - objects < 200
        assert tracemalloc.get_traced_memory()[0] - memory < 300_000
        tracemalloc.stop()
    assert len(monitor.history) == 100
