"""Families × adapters × engines × precision: each cell exact, approximate in a named way, or refused.

The fast suite runs a covering design; the full product is marked slow.
"""

from __future__ import annotations

import itertools
import re
import warnings

import pytest
import torch

from gns.monitor import GNSMonitor, GNSWarning
from tests.gns.matrix_cells import (
    COMPILED,
    ENGINES,
    PRECISIONS,
    Cell,
    covering,
    every_cell,
    expected,
    widest,
)
from tests.gns.matrix_engines import (
    SCALE,
    STEPS,
    compiler_noise,
    last_twin_of,
    make,
    scaler_of,
    train,
    twin_of,
)
from tests.gns.matrix_models import batch
from tests.reference.tolerances import close


def params(cells):
    return [pytest.param(c, id=str(c)) for c in cells]


def watched_run(cell):
    """Train a cell under a monitor: the weights, the monitor, its coverage and what it warned of."""
    model, scaler = make(cell), scaler_of(cell)
    given = scaler if PRECISIONS[cell.precision].scaler == "given" else None
    with warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("always", category=GNSWarning)
        with compiler_noise(), GNSMonitor(model, scaler=given, on_error="raise") as monitor:
            run = train(model, cell, scaler)
            coverage = monitor.coverage()
    return run, monitor, coverage, [str(w.message) for w in said]


def check_cell(cell):
    wanted = expected(cell)
    run, monitor, coverage, said = watched_run(cell)
    assert set(coverage.unmeasured) == {wanted.left_out} - {""}, coverage
    assert [s.step for s in monitor.history] == list(range(STEPS))
    with compiler_noise():
        plain = train(make(cell), cell, scaler_of(cell))
    assert all(map(torch.equal, plain.weights, run.weights)), "training was changed"
    if wanted.kind == "refused":
        assert all(wanted.why in (s.reason or "") for s in monitor.history), monitor.history
        assert any(wanted.why in text for text in said)
        return
    assert all(s.usable for s in monitor.history), [s.reason for s in monitor.history]
    assert len(said) == bool(wanted.why) + bool(wanted.left_out), said
    assert any(wanted.why in text for text in said) or not wanted.why, said
    assert coverage.verified == frozenset(coverage.measured), set(coverage.measured) - coverage.verified
    check_record(cell, wanted, monitor.history[0], twin_of(cell))
    if wanted.twin:
        # at 16 bits the weights have gone where rounding differs more between a batch of 1 and of 4
        wider = 3 if PRECISIONS[cell.precision].rtol > 1e-3 else 1
        check_sums(cell, wanted, monitor.history[-1], last_twin_of(cell, run.before_last), wider)


def check_record(cell, wanted, step, twin):
    _, weights = twin.sums(ENGINES[cell.engine].splits)
    n = len(weights)
    assert step.n_examples == n
    assert step.loss_scaled == wanted.scaled
    assert step.call_seen == (wanted.weights == "tokens")
    if wanted.weights == "tokens":
        assert step.n_tokens == int(twin.tokens.sum())
        assert step.sum_sq_weights == pytest.approx(weights.square().sum().item(), rel=1e-6)
    else:
        assert step.n_tokens is None and step.sum_sq_weights == 1 / n
    if wanted.twin:
        check_sums(cell, wanted, step, twin)


def check_norms(cell, wanted, step, twin, rtol):
    """Norms of single examples, or nothing: in compiled layers they cannot be told."""
    if cell.engine in COMPILED or (step.step == 0 and wanted.left_out and step.mean_fourth is None):
        assert (step.mean_fourth, step.top_sq_norms) == (None, ())
        return
    factor = SCALE**2 if wanted.scaled else 1.0
    norms = factor * twin.norms(ENGINES[cell.engine].splits, step.layout.names)
    close(step.mean_fourth, norms.square().mean(), rtol=3 * rtol, what=f"{cell}: Σ‖g‖⁴/n")
    close(step.top_sq_norms, norms.topk(-(-len(norms) // 10)).values, rtol=3 * rtol, what=f"{cell}: top")


def check_sums(cell, wanted, step, twin, wider=1):
    rows, _ = twin.sums(ENGINES[cell.engine].splits)
    rtol = wider * PRECISIONS[cell.precision].rtol
    factor = SCALE**2 if wanted.scaled else 1.0
    joint = [step.mean_sq_norm, step.sq_norm_of_mean]
    rows = rows[[twin.names.index(name) for name in step.layout.names]]
    close(joint, factor * rows.sum(0), rtol=rtol, what=f"{cell}, step {step.step}: (m, q)")
    # a bias of the keys has no gradient but rounding: parameters are compared with the largest one's noise
    low = torch.bfloat16 if rtol > 1e-3 else torch.float32
    what = f"{cell}, step {step.step}: (m, q) of {step.layout.names}"
    close(step.rows, factor * rows, low, rtol=rtol, what=what)
    check_norms(cell, wanted, step, twin, rtol)


@pytest.mark.parametrize("cell", params(covering()))
def test_covering_design(cell):
    check_cell(cell)


def compiled_once():
    """One cell of each compiled engine, of the family that compiles soonest."""
    return [next(c for c in widest() if (c.family, c.engine) == ("gpt2", name)) for name in COMPILED]


@pytest.mark.parametrize("cell", params(compiled_once()))
def test_each_compiled_engine_once(cell):
    check_cell(cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", params(list(widest())))
def test_full_product(cell):
    check_cell(cell)


def test_the_design_holds_every_pair():
    chosen = covering()
    fast = [name for name in ENGINES if name not in COMPILED]
    for one, other in itertools.combinations(range(4), 2):
        possible = {(c[one], c[other]) for c in every_cell() if c.engine in fast}
        assert {(c[one], c[other]) for c in chosen} >= possible, Cell._fields[one] + Cell._fields[other]
    assert {c.engine for c in chosen} == set(ENGINES)
    assert len({*chosen, *widest()}) == len(chosen) + len(list(widest()))


def test_the_twin_tells_a_wrong_sum():
    """The control: sums of another batch, or with another split's weights, do not pass."""
    cell = Cell("llama", "lora", "plain", "float32")
    _, monitor, _, _ = watched_run(cell)
    rows, _ = twin_of(cell).sums((1, 3))
    with pytest.raises(AssertionError, match=re.escape("ratio")):
        close(monitor.history[0].rows, rows, rtol=2e-2)


def test_the_batch_has_a_padded_and_a_masked_row():
    data = batch()
    assert data["attention_mask"][0].sum() < 7 and (data["labels"][2] == -100).all()
