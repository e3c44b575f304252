"""Gradients kept whole or as sketches: inner products, unbiased, of the variance that is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gns.probing.gradrows import LEAST, GradientRows
from tests.reference.tolerances import close


def gradients(k, sizes=(300, 500), seed=0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {f"p{i}": mean + torch.randn(s // 10, 10, generator=generator) for i, s in enumerate(sizes)}
        for _ in range(k)
    ]


def kept(data, masses=None, **options):
    rows = GradientRows(**options)
    for i, g in enumerate(data):
        rows.add(g, 1.0 if masses is None else masses[i])
    return rows


def flat(data, names=("p0", "p1")):
    return np.array([np.concatenate([g[n].flatten().double().numpy() for n in names]) for g in data])


def test_whole_rows_give_the_products():
    data = gradients(5)
    rows = kept(data)
    assert not rows.sketched and len(rows) == 5 and rows.sq_norm_of_sum(["p0"]) is None
    close(rows.gram(["p0", "p1"]), flat(data) @ flat(data).T, rtol=1e-12)
    close(rows.gram(["p1"]), flat(data, ["p1"]) @ flat(data, ["p1"]).T, rtol=1e-12)
    assert rows.sketch_share(["p0"], rows.gram(["p0"])) == 0


def test_what_is_kept_does_not_follow_the_gradient():
    data = gradients(1)
    rows = kept(data)
    before = rows.gram(["p0"])
    data[0]["p0"].zero_()
    assert np.array_equal(rows.gram(["p0"]), before)


def test_a_missing_gradient_is_zero():
    data = gradients(3)
    data[1]["p0"] = None
    rows = kept(data)
    assert (rows.gram(["p0"])[1] == 0).all() and rows.gram(["p0"])[0, 0] > 0
    close(rows.whole("p0")[1].norm(), 0.0)
    assert rows.known(["p0", "none"]) == ["p0"]


def test_low_precision_is_widened():
    half = [{"p": torch.full((4,), 1.5, dtype=torch.bfloat16)}, {"p": torch.ones(4, dtype=torch.bfloat16)}]
    rows = kept(half)
    assert rows.whole("p").dtype is torch.float32
    close(rows.gram(["p"]), [[9.0, 6.0], [6.0, 4.0]])


@pytest.mark.parametrize("at", [0, 2000, 8000])
def test_rows_are_sketched_when_they_pass_the_budget_and_all_alike(at):
    """Whenever the switch comes, the sketches are the same, and the sum is exact."""
    data, masses = gradients(6), [1.0, 2.0, 3.0, 1.0, 2.0, 0.5]
    rows = kept(data, masses, max_bytes=at, size=200)
    twin = kept(data, masses, max_bytes=0, size=200)
    assert rows.sketched and np.array_equal(rows.gram(["p0", "p1"]), twin.gram(["p0", "p1"]))
    total = np.array(masses) @ flat(data)
    close(rows.sq_norm_of_sum(["p0", "p1"]), total @ total, rtol=1e-5)
    with pytest.raises(ValueError, match="were sketched; whole ones are needed here"):
        rows.whole("p0")


def test_small_parameters_stay_whole():
    data = gradients(3, sizes=(LEAST // 10 * 10, 5000))
    rows = kept(data, max_bytes=0, size=100)
    close(rows.gram(["p0"]), flat(data, ["p0"]) @ flat(data, ["p0"]).T, rtol=1e-12)
    assert not kept(gradients(3, sizes=(20, 30)), max_bytes=0, size=100).sketched, "nothing would be saved"


def test_products_of_sketches_are_unbiased_with_the_variance_that_is_said():
    """2,000 seeds, one parameter: mean within 4.5 standard errors (1e-5), variance within 4.5 of its own."""
    x, y = (torch.randn(600, generator=torch.Generator().manual_seed(s)) + 0.2 for s in (0, 1))
    found = np.array(
        [kept([{"p": x}, {"p": y}], max_bytes=0, size=100, seed=s).gram(["p"])[0, 1] for s in range(2000)]
    )
    truth = float(x.double() @ y.double())
    said = float(x @ x) * float(y @ y) + truth**2 - 2 * float((x * x) @ (y * y))
    said /= 100
    assert abs(found.mean() - truth) < 4.5 * np.sqrt(said / 2000)
    assert abs(found.var() / said - 1) < 4.5 * np.sqrt(2 / 2000) * 1.5


def test_the_share_of_the_sketch_is_what_it_adds():
    """Products of independent gradients have variance d, and d + d²/s sketched: a share of d/(s + d)."""
    data = gradients(60, sizes=(4000,))
    rows = kept(data, max_bytes=0, size=500)
    share = rows.sketch_share(["p0"], rows.gram(["p0"]))
    assert abs(share - 4000 / 4500) < 0.08


def test_another_seed_is_another_sketch():
    data = gradients(2)
    one, other = (kept(data, max_bytes=0, size=100, seed=s).gram(["p0"]) for s in (1, 2))
    assert not np.array_equal(one, other)
