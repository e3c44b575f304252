"""Where a step begins and ends: a table of event orders, and for each row the real loop that produces it."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn

from gns.boundary import IN_BACKWARD, Boundary, Close
from gns.monitor import GNSMonitor, GNSWarning
from tests.reference.per_example import contributions, joint, trainable
from tests.reference.tolerances import close

# The table. Events, one word each:
#   fwd          a training forward pass
#   new / more   a backward pass begins; all gradients are empty / some are not
#   end          it ends
#   pre1 post1   hooks of optimizer 1; suffix c: a closure was passed, b: inside backward
# Expected: what closes (None: usable), in order, and how many backward passes are dropped.

OK = None
BACKWARD = "fwd new end"
TABLE = [
    ("plain loop", f"{BACKWARD} pre1 post1 {BACKWARD} pre1 post1", [OK, OK], 0),
    ("accumulation", "fwd new end fwd more end pre1 post1", [OK], 0),
    (
        "accumulation after a step that zeroed nothing",
        f"{BACKWARD} pre1 post1 fwd more end pre1 post1",
        [OK, OK],
        0,
    ),
    ("closure", f"pre1c {BACKWARD} post1 pre1c {BACKWARD} post1", [OK, OK], 0),
    ("closure that takes no gradient", "pre1c fwd post1", [], 0),
    ("LBFGS, three gradients", f"pre1c {BACKWARD} {BACKWARD} {BACKWARD} post1", ["took 3 gradients"], 2),
    ("LBFGS, one gradient", f"pre1c {BACKWARD} post1", [OK], 0),
    ("LBFGS twice", f"pre1c {BACKWARD} {BACKWARD} post1 pre1c {BACKWARD} post1", ["took 2 gradients", OK], 1),
    ("Lightning: accumulated, the last inside the closure", "fwd new end pre1c fwd more end post1", [OK], 0),
    ("closure after a discarded batch", f"{BACKWARD} pre1c {BACKWARD} post1", [OK], 1),
    (
        "LBFGS after a discarded batch",
        f"{BACKWARD} pre1c {BACKWARD} {BACKWARD} {BACKWARD} post1",
        ["took 3 gradients"],
        3,
    ),
    (
        "Lightning: a discarded batch, then accumulation",
        f"{BACKWARD} {BACKWARD} pre1c fwd more end post1",
        [OK],
        1,
    ),
    ("SAM, two gradients by hand", f"{BACKWARD} {BACKWARD} pre1 post1", [OK], 1),
    ("SAM with a closure, base optimizer inside", f"{BACKWARD} pre1c {BACKWARD} pre2 post2 post1", [OK], 1),
    ("Lookahead: wrapper and base fire", f"{BACKWARD} pre1 pre2 post2 post1", [OK], 0),
    ("wrapper hands its closure on", f"pre1c pre2c {BACKWARD} post2 post1", [OK], 0),
    ("two optimizers on one gradient", f"{BACKWARD} pre1 post1 pre2 post2", [OK], 0),
    ("two optimizers, each its gradient", f"{BACKWARD} pre1 post1 {BACKWARD} pre2 post2", [OK, OK], 0),
    ("unfused overflow: nothing fires, gradients zeroed", f"{BACKWARD} {BACKWARD} pre1 post1", [OK], 1),
    ("fused overflow: fires as always", f"{BACKWARD} pre1 post1", [OK], 0),
    (
        "optimizer in backward",
        "fwd new pre1b post1b end fwd new pre1b post1b end",
        ["inside backward"] * 2,
        0,
    ),
    (
        "one optimizer a parameter in backward",
        "fwd new pre1b post1b pre2b post2b end",
        ["inside backward"],
        0,
    ),
    ("discarded gradients", f"{BACKWARD} {BACKWARD} {BACKWARD} pre1 post1", [OK], 2),
    ("discarded, then accumulated", f"{BACKWARD} {BACKWARD} fwd more end pre1 post1", [OK], 1),
    ("evaluation in between", f"fwd {BACKWARD} fwd fwd pre1 post1 fwd", [OK], 0),
    ("forward without backward", "fwd fwd pre1 post1", [], 0),
    ("step without backward", "pre1 post1 pre1 post1", [], 0),
    ("backward without step", f"{BACKWARD} fwd more end", [], 0),
    ("one gradient used twice", f"{BACKWARD} pre1 post1 pre1 post1", [OK], 0),
    ("backward under way when it steps, begun and not ended", "fwd new pre1 post1", [], 0),
]
OFF = [  # between measured steps backward passes are unseen; forward passes stand in
    ("plain loop", "fwd pre1 post1 fwd pre1 post1", [OK, OK]),
    ("accumulation", "fwd fwd fwd pre1 post1", [OK]),
    ("closure", "pre1c fwd post1", [OK]),
    ("LBFGS", "pre1c fwd fwd fwd post1", [OK]),
    ("two optimizers", "fwd pre1 post1 pre2 post2", [OK]),
    ("wrapper", "fwd pre1 pre2 post2 post1", [OK]),
    ("overflow", "fwd fwd pre1 post1", [OK]),
    ("nothing", "pre1 post1", []),
]


def play(events: str, *, measuring: bool = True) -> tuple[list[str | None], int]:
    boundary, closes, drops = Boundary(measuring=measuring), [], 0
    for word in events.split():
        close_ = None
        if word == "fwd":
            boundary.forward()
        elif word in ("new", "more"):
            drops += boundary.backward_begins(word == "new")
        elif word == "end":
            close_ = boundary.backward_ends()
        else:
            kind, number, suffix = (
                word.rstrip("0123456789cb"),
                int("".join(filter(str.isdigit, word))),
                word[-1],
            )
            if kind == "pre":
                close_ = boundary.optimizer_pre(number, closure=suffix == "c", in_backward=suffix == "b")
            else:
                assert kind == "post"
                close_ = boundary.optimizer_post(number, in_backward=suffix == "b")
        if close_ is not None:
            closes.append(close_.reason)
    return closes, drops


def agree(found: list[str | None], expected: list[str | None]) -> bool:
    pairs = zip(found, expected, strict=False)
    return len(found) == len(expected) and all(
        f is None if e is None else f is not None and e in f for f, e in pairs
    )


@pytest.mark.parametrize(
    ("events", "expected", "drops"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_table(events, expected, drops):
    closes, dropped = play(events)
    assert agree(closes, expected), closes
    assert dropped == drops


@pytest.mark.parametrize(("events", "expected"), [row[1:] for row in OFF], ids=[row[0] for row in OFF])
def test_between_measured_steps(events, expected):
    closes, dropped = play(events, measuring=False)
    assert agree(closes, expected), closes
    assert dropped == 0


@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_after_any_row_a_plain_step_closes_once(row):
    """No row leaves the machine in a state that spoils the next step."""
    name, events, *_ = row
    if "not ended" in name or "without step" in name:
        pytest.skip("the row itself is cut off inside a step")
    before, _ = play(events)
    after, _ = play(f"{events} fwd new end pre1 post1")
    assert after[len(before) :] == [OK]


def test_the_checker_of_this_table_can_fail():
    assert not agree([None], [])
    assert not agree([None], ["took 2"])
    assert not agree(["took 3 gradients"], [None])
    assert not agree(["took 3 gradients"], ["took 2 gradients"])
    assert agree(["took 3 gradients"], ["took 3"])


def test_reasons_name_the_cause():
    assert play("fwd new pre1b post1b end")[0] == [IN_BACKWARD]
    assert "LBFGS" in play(f"pre1c {BACKWARD} {BACKWARD} post1")[0][0]


# The real loops. Learning rates are 0, so that every step sees the same weights, as the slow twin does.

BATCH = 4


class Lookahead(torch.optim.Optimizer):
    """A wrapper whose step and whose base's step both fire."""

    def __init__(self, base):
        self.base = base
        super().__init__(base.param_groups, {})

    def step(self, closure=None):
        return self.base.step(closure)


class SAM(torch.optim.Optimizer):
    """Two gradients a step; the second is the one that is used."""

    def __init__(self, base):
        self.base = base
        super().__init__(base.param_groups, {})

    def first_step(self):
        self.base.zero_grad()

    def second_step(self):
        self.base.step()

    def step(self, closure=None):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def sgd(model, **kwargs):
    return torch.optim.SGD(model.parameters(), lr=0.0, **kwargs)


def loss_of(model, data, scale=1.0):
    return scale * model(data).square().sum()


def plain(model, data):
    optimizer = sgd(model)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model, data).backward()
        optimizer.step()


def accumulation(model, data):
    optimizer = sgd(model)
    for _ in range(4):
        optimizer.zero_grad()
        for part in (data[:1], data[1:]):
            loss_of(model, part).backward()
        optimizer.step()


def clipping(model, data):
    optimizer = sgd(model)
    for _ in range(4):
        loss_of(model, data).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()


def closure(model, data):
    optimizer = sgd(model)

    def take():
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(take)


def lbfgs(model, data, iterations=3):
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.0, max_iter=iterations)

    def take():
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(take)


def lightning(model, data):
    optimizer = sgd(model)

    def take(part, zero):
        loss = loss_of(model, part)
        if zero:
            optimizer.zero_grad()
        loss.backward()
        return loss

    for _ in range(4):
        take(data[:2], True)
        optimizer.step(closure=functools.partial(take, data[2:], False))


def sam_by_hand(model, data):
    optimizer = SAM(sgd(model))
    for _ in range(4):
        loss_of(model, data).backward()
        optimizer.first_step()
        loss_of(model, data).backward()
        optimizer.second_step()
        optimizer.zero_grad()


def sam_closure(model, data):
    optimizer = SAM(sgd(model))
    for _ in range(4):
        loss_of(model, data).backward()
        optimizer.step(lambda: loss_of(model, data).backward())
        optimizer.zero_grad()


def lookahead(model, data):
    optimizer = Lookahead(sgd(model))
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model, data).backward()
        optimizer.step()


def lookahead_closure(model, data):
    optimizer = Lookahead(sgd(model))

    def take():
        optimizer.zero_grad()
        loss_of(model, data).backward()

    for _ in range(4):
        optimizer.step(take)


def two_optimizers(model, data):
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.0) for part in (model[0], model[2])]
    for _ in range(4):
        model.zero_grad()
        loss_of(model, data).backward()
        for optimizer in optimizers:
            optimizer.step()


def in_turn(model, data):
    """Each optimizer owns a half and steps on a gradient of its own, as in alternating training."""
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.0) for part in (model[0], model[2])]
    for _ in range(2):
        for optimizer in optimizers:
            model.zero_grad()
            loss_of(model, data).backward()
            optimizer.step()


def adamw_fused(model, data):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    for _ in range(4):
        loss_of(model, data).backward()
        optimizer.step()
        optimizer.zero_grad()


def another_part(model, data):
    """An optimizer of a parameter of this model that is not measured, before and after the step."""
    optimizer = sgd(model)
    model.register_parameter("scale", nn.Parameter(torch.ones((), dtype=data.dtype)))
    other = torch.optim.Adam([model.scale], lr=0.0)
    for k in range(4):
        model.zero_grad()
        (loss_of(model, data) * model.scale).backward()
        for one in (optimizer, other) if k % 2 else (other, optimizer):
            one.step()


def compiled_step(model, data):
    """`torch.compile(optimizer.step)`: the hooks on optimizers run outside the compiled region."""
    torch._dynamo.reset()
    optimizer = sgd(model)
    step = torch.compile(optimizer.step, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the compiler's own doings
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model, data).backward()
            step()


def step_twice(model, data):
    optimizer = sgd(model)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model, data).backward()
        optimizer.step()
        optimizer.step()


def overflow(model, data, *, fused=False, set_to_none=True):
    optimizer, scaler = (
        sgd(model, fused=fused),
        torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1),
    )
    for i in range(4):
        optimizer.zero_grad(set_to_none=set_to_none)
        scaler.scale(loss_of(model, data, float("inf") if i == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()


def in_backward(model, data):
    optimizers = {p: torch.optim.SGD([p], lr=0.0) for p in model.parameters()}

    def use_up(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    handles = [p.register_post_accumulate_grad_hook(use_up) for p in model.parameters()]
    for _ in range(4):
        loss_of(model, data).backward()
    for handle in handles:
        handle.remove()


def discarded(model, data, *, set_to_none=True):
    optimizer = sgd(model)
    for _ in range(4):
        for other in (10 * data, data.repeat(3, 1)):
            loss_of(model, other).backward()
            optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model, data).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


def discarded_through_data(model, data):
    """The idiom of old: the gradient's version does not show it."""
    for _ in range(4):
        loss_of(model, 10 * data).backward()
        for p in model.parameters():
            p.grad.data.zero_()
        loss_of(model, data).backward()
        optimizer = sgd(model)
        optimizer.step()
        optimizer.zero_grad()


def discarded_before_closure(model, data):
    optimizer = sgd(model)

    def take():
        optimizer.zero_grad()
        loss_of(model, data).backward()

    for _ in range(4):
        loss_of(model, 10 * data).backward()
        optimizer.step(take)


def zero_micro_batch(model, data):
    """The first micro-batch's gradient is exactly zero: it is not discarded, its rows are examples."""
    optimizer = sgd(model)
    for _ in range(4):
        optimizer.zero_grad()
        (0 * loss_of(model, data)).backward()
        loss_of(model, data).backward()
        optimizer.step()


def evaluation(model, data):
    optimizer = sgd(model)
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(model, data)
        with torch.no_grad():
            model(data.repeat(5, 1))
        model(data.repeat(3, 1))  # with a graph, never run backward
        loss.backward()
        model.eval()
        with torch.inference_mode():
            model(data)
        model.train()
        optimizer.step()


def foreign_optimizer(model, data):
    optimizer, other = sgd(model), nn.Linear(2, 2)
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model, data).backward()
        other(torch.ones(1, 2)).sum().backward()
        foreign.step()
        optimizer.step()


def no_step(model, data):
    for _ in range(4):
        loss_of(model, data).backward()


def no_backward(model, data):
    optimizer = sgd(model)
    for _ in range(4):
        loss_of(model, data)
        optimizer.step()


STEP = (BATCH, None)
REAL = {
    "plain loop": (plain, [STEP] * 4),
    "accumulation": (accumulation, [STEP] * 4),
    "clipping": (clipping, [STEP] * 4),
    "closure": (closure, [STEP] * 4),
    "LBFGS": (lbfgs, [(BATCH, "took 2 gradients")] * 4),
    "LBFGS of one iteration": (functools.partial(lbfgs, iterations=1), [STEP] * 4),
    "Lightning-like closure": (lightning, [STEP] * 4),
    "SAM by hand": (sam_by_hand, [STEP] * 4),
    "SAM with a closure": (sam_closure, [STEP] * 4),
    "Lookahead": (lookahead, [STEP] * 4),
    "Lookahead with a closure": (lookahead_closure, [STEP] * 4),
    "two optimizers": (two_optimizers, [STEP] * 4),
    "one gradient used twice": (step_twice, [STEP] * 4),
    "two optimizers in turn": (in_turn, [STEP] * 4),
    "fused AdamW": (adamw_fused, [STEP] * 4),
    "an optimizer of another part of the model": (another_part, [STEP] * 4),
    "compiled optimizer": (compiled_step, [STEP] * 4),
    "unfused overflow": (overflow, [STEP] * 3),
    "unfused overflow, zeroed": (functools.partial(overflow, set_to_none=False), [STEP] * 3),
    "fused overflow": (functools.partial(overflow, fused=True), [STEP, (BATCH, "not finite"), STEP, STEP]),
    "optimizer in backward": (in_backward, [(BATCH, "inside backward")] * 4),
    "discarded gradients": (discarded, [STEP] * 4),
    "discarded gradients, zeroed": (functools.partial(discarded, set_to_none=False), [STEP] * 4),
    "discarded gradients, zeroed through .data": (discarded_through_data, [STEP] * 4),
    "discarded gradients, then a closure": (discarded_before_closure, [STEP] * 4),
    "a micro-batch without gradient": (zero_micro_batch, [(2 * BATCH, None)] * 4),
    "evaluation in between": (evaluation, [STEP] * 4),
    "an optimizer of another model": (foreign_optimizer, [STEP] * 4),
    "backward without step": (no_step, []),
    "step without backward": (no_backward, []),
}
SCALED = {"unfused overflow", "unfused overflow, zeroed", "fused overflow"}


@pytest.fixture
def model(seed):
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


@pytest.fixture
def data(model):
    return torch.randn(BATCH, 3, dtype=torch.float64)


def records(model, data, loop, *, every=1, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GNSWarning)  # reasons are warned about; here they are compared
        with GNSMonitor(model, every=every, on_error="raise", **kwargs) as monitor:
            loop(model, data)
        return monitor.history


@pytest.mark.parametrize(("loop", "expected"), REAL.values(), ids=REAL.keys())
def test_real_loops(model, data, loop, expected):
    found = records(model, data, loop)
    assert [s.n_examples for s in found] == [n for n, _ in expected]
    assert agree([s.reason for s in found], [why for _, why in expected]), [s.reason for s in found]
    assert [s.step for s in found] == list(range(len(expected)))


@pytest.mark.parametrize(
    "name", [name for name, (_, steps) in REAL.items() if STEP in steps and name not in SCALED]
)
def test_real_loops_have_the_slow_twins_sums(model, data, name):
    twin = contributions(
        trainable(model), [lambda i=i: loss_of(model, data[i : i + 1]) for i in range(BATCH)]
    )
    m, q = joint(twin)
    for s in records(model, data, REAL[name][0]):
        if s.usable:
            close([s.mean_sq_norm, s.sq_norm_of_mean], [m, q], what=f"{name}, step {s.step}: (m, q)")


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("name", list(REAL))
def test_measuring_one_step_in_k_gives_those_steps_of_measuring_all(model, data, name, every):
    loop = REAL[name][0]
    full = records(model, data, loop)
    some = records(model, data, loop, every=every)
    # an overflow that fires nothing is no step: the numbers of the steps after it stay
    assert [(s.step, s.n_examples, s.reason) for s in some] == [
        (s.step, s.n_examples, s.reason) for s in full if s.step % every == 0
    ]
    for a, b in zip(some, (s for s in full if s.step % every == 0), strict=True):
        if a.usable:
            close([a.mean_sq_norm, a.sq_norm_of_mean], [b.mean_sq_norm, b.sq_norm_of_mean])


@pytest.mark.parametrize("fused", [False, True])
def test_the_loss_scale_is_undone(model, data, fused):
    """The scale changes from step to step, the sums do not (never undone: 64 times, then more)."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)

    def loop(model, data):
        optimizer = sgd(model, fused=fused)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, data)).backward()
            scaler.step(optimizer)
            scaler.update()

    reference = records(model, data, plain)[0]
    scales = []
    for s in records(model, data, loop, scaler=scaler):
        close([s.mean_sq_norm, s.sq_norm_of_mean], [reference.mean_sq_norm, reference.sq_norm_of_mean])
        scales.append(s)
    assert len(scales) == 3
    assert scaler.get_scale() == 64.0


def test_a_step_is_ended_by_hand_only_after_a_backward_pass():
    boundary = Boundary()
    assert boundary.close() is None
    boundary.backward_begins(grads_empty=True)
    boundary.backward_ends()
    assert boundary.close() == Close() and boundary.close() is None
