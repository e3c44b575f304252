"""What goes wrong on several ranks: refused with the reason, on every rank alike, and training goes on."""

from __future__ import annotations

import re

import torch

from gns.capture.ownership import FOREIGN
from gns.reasons import (
    DIFFERENT_GRADIENTS,
    HIDDEN,
    IDLE_RANK,
    JOINED,
    LOST,
    NOT_ALL,
    OTHER_PARAMETERS,
)
from gns.sums import unbiased
from tests.gns.distributed.cases import losses, net
from tests.gns.distributed.faults import HIDDEN_STEPS, hidden_rows
from tests.gns.hiding import Hiding
from tests.reference.per_example import contributions, joint, trainable
from tests.reference.tolerances import close


def reasons(seen):
    return [reason for _, _, reason, _, _ in seen["steps"]]


def pattern(text):
    """A reason as a pattern, whatever stands in its braces."""
    return re.sub(r"\\\{[^}]*\}", ".+", re.escape(text))


def test_rank_0_only(found):
    first, *rest = found
    assert all(re.fullmatch(pattern(NOT_ALL), reason) for reason in reasons(first)) and first["steps"]
    assert f"only 1 of {len(found)} " in first["stopped"]
    assert len(first["warnings"]) == 1 and first["stopped"] in first["warnings"][0]
    assert all(rank["weights"] == first["weights"] for rank in rest)
    assert first["weights"] != [p.flatten().tolist() for p in net(torch.float64).parameters()]


def test_all_ranks_after_that(found):
    assert [reasons(each) for each in found] == [[None] * 3] * len(found)


def test_idle_rank(found):
    """Steps 2, 4 and 5 are without a backward pass on rank 1; the steps between and after are right."""
    assert all(each["steps"] == found[0]["steps"] for each in found)
    idle = [IDLE_RANK if step in (2, 4, 5) else None for step in range(8)]
    assert reasons(found[0]) == idle
    assert found[0]["steps"][2][1] == 4 * (len(found) - 1)
    assert found[0]["stopped"] is None and len(found[0]["warnings"]) == 1


def test_not_averaged(found):
    assert [reasons(each) for each in found] == [[DIFFERENT_GRADIENTS] * 2] * len(found)


def test_last_pass_not_synchronised(found):
    assert [reasons(each) for each in found] == [[None, DIFFERENT_GRADIENTS]] * len(found)


def test_comm_hook(found):
    """The bias whose gradient a hook doubles is found, though no rank holds Σc of all; the rest stays."""
    for each in found:
        assert list(each["reasons"]) == ["2.bias"] and "self-check failed" in each["reasons"]["2.bias"]
        assert reasons(each) == [None]
    off = float(found[0]["reasons"]["2.bias"].split("sum to ")[1].split(" %")[0])
    assert 20 < off < 90  # 50 %, as eight random projections see it


def test_other_parameters(found):
    for each in found:
        assert reasons(each)[0] == each["stopped"] == OTHER_PARAMETERS


def test_other_steps(found):
    for each in found:
        assert reasons(each)[0] == each["stopped"] == OTHER_PARAMETERS


def test_one_stands_down(found):
    first, second, *_ = found
    assert second["stopped"] == "RuntimeError: of our own"
    assert re.fullmatch(pattern(LOST), first["stopped"])
    assert reasons(first)[:2] == [None, None] and first["before"] == 2
    assert set(reasons(first)[2:]) == {first["stopped"]}
    assert len(first["warnings"]) == 1
    assert all(each["weights"] == first["weights"] for each in found)


def test_one_hangs(found):
    first = found[0]
    assert first["stopped"] == LOST.format(why="no answer within 1 s")
    assert reasons(first) == [None, None, first["stopped"]] and len(first["warnings"]) == 1
    assert all(each["weights"] == first["weights"] for each in found)


def test_join(found):
    assert [reasons(each) for each in found] == [[JOINED] * (3 - rank % 2) for rank in range(len(found))]


def test_hidden(found):
    """Each rank's own batch, and the average of the ranks' unbiased estimates, against one process alone."""
    size, model = len(found), net(torch.float64)
    engine, expected = Hiding(model, lr=0.05), []
    for step in range(HIDDEN_STEPS):
        each = []
        for rank in range(size):
            x = hidden_rows(step, rank)
            rows = [lambda i=i, x=x: losses(model(x[i : i + 1])).sum() / len(x) for i in range(len(x))]
            m, q = joint(contributions(trainable(model), rows))
            each.append((len(x), unbiased(len(x), m, q, 1 / len(x))))
            (losses(model(x)).mean() / size).backward()
        engine.step()
        good = [(n, both) for n, both in each if n > 1]
        g = sum(n * (n - 1) * both[0] for n, both in good) / sum(n * (n - 1) for n, _ in good)
        t = sum((n - 1) * both[1] for n, both in good) / sum(n - 1 for n, _ in good)
        expected.append((g, t))
    for seen in found:
        assert seen["steps"] == found[0]["steps"] and "local statistics" in seen["text"]
        assert reasons(seen) == [HIDDEN] + [None] * 4 and seen["local"] == [False] + [True] * 4
        for (_, n, _, m, q), both in zip(seen["steps"][1:], expected[FOREIGN:], strict=True):
            assert n == 4
            close(unbiased(n, m, q, 1 / n), both)


def test_attached_again(found):
    assert all(each["steps"] == found[0]["steps"] for each in found)
    assert [step for step, *_ in found[0]["steps"]] == [0, 1, 2, 3]
    assert reasons(found[0]) == [None] * 4


def test_forgotten(found):
    assert [each["threads"] for each in found] == [[1, 0]] * len(found)
    assert reasons(found[0]) == [None] * 2


def test_never_detached(found):
    """A rank that ends without a word has still sent its last step."""
    assert reasons(found[0]) == [None] * 2 and found[0]["stopped"] is None
