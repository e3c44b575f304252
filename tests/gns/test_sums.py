"""The record of a step: its estimators against pair sums and enumeration, its groups, merges and errors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gns.sums import Contributions, Layout, StepSums, factor_of, from_rows, unbiased
from tests.reference.estimators import ordered_batches, pairwise, pairwise_weighted, truth
from tests.reference.tolerances import EXACT, close


def step_of(g: np.ndarray, **fields) -> StepSums:
    """The record of examples with gradients g [n, d], equal weights."""
    q = float((g.mean(0) ** 2).sum())
    return StepSums(
        step=0, n_examples=len(g), mean_sq_norm=float((g**2).sum() / len(g)), sq_norm_of_mean=q, **fields
    )


@given(n=st.integers(2, 7), d=st.integers(1, 4), seed=st.integers(0, 999))
def test_equal_weights_give_the_pairwise_statistics(n, d, seed):
    g = np.random.default_rng(seed).normal(1, 2, (n, d))
    grad_sq_norm, trace = pairwise(g)
    s = step_of(g)
    close([s.grad_sq_norm, s.trace_sigma], [grad_sq_norm, trace], rtol=1e-9, what="(|G|², tr Σ)")


@given(n=st.integers(2, 6), seed=st.integers(0, 999))
def test_unequal_weights_give_the_weighted_pairwise_statistic(n, seed):
    rng = np.random.default_rng(seed)
    h, a = rng.normal(3, 1, (n, 3)), rng.exponential(size=n) + 0.05
    a /= a.sum()
    c = a[:, None] * h
    s = StepSums(
        step=0,
        n_examples=n,
        mean_sq_norm=float(n * (c**2).sum()),
        sq_norm_of_mean=float((c.sum(0) ** 2).sum()),
        sum_sq_weights=float((a**2).sum()),
    )
    close(s.grad_sq_norm, pairwise_weighted(h, a), rtol=1e-9, what="|G|²")
    close(s.trace_sigma, n * (s.sq_norm_of_mean - s.grad_sq_norm), rtol=EXACT, what="tr Σ")


@pytest.mark.parametrize("n", [2, 3, 49, 1000])
def test_equal_weights_through_both_formulas(n):
    default, given_weights = unbiased(n, 3.0, 1.0, 1 / n), unbiased(n, 3.0, 1.0, (1 / n) * (1 + 1e-12))
    close(default, given_weights, rtol=1e-8, what="(|G|², tr Σ)")


def test_facts_two_micro_batches_of_one_linear():
    # Linear(2, 2, bias), loss = out.sum() / 2: x = [1, 0], [0, 1] and [1, 4], [5, .5]
    for x, (trace, grad, b) in [
        (np.array([[1, 0], [0, 1.0]]), (2, 2, 1)),
        (np.array([[1, 4], [5, 0.5]]), (28.25, 16, 1.765625)),
    ]:
        g = np.array([[*row, *row, 1, 1] for row in x])
        s = step_of(g)
        assert (s.trace_sigma, s.grad_sq_norm, s.b_simple) == (trace, grad, b)
        undivided = step_of(2 * g)
        assert (undivided.trace_sigma, undivided.grad_sq_norm, undivided.b_simple) == (4 * trace, 4 * grad, b)


def test_fair_coin_is_exactly_unbiased_over_all_ordered_batches_and_its_ratio_is_not():
    data = np.array([[1.0], [3.0]])
    for n in (2, 3, 4):
        steps = [step_of(data[list(rows)]) for rows in ordered_batches(2, n)]
        assert math.isclose(np.mean([s.grad_sq_norm for s in steps]), 4, rel_tol=EXACT)
        assert math.isclose(np.mean([s.trace_sigma for s in steps]), 1, rel_tol=EXACT)
        ratios = [s.trace_sigma / s.grad_sq_norm for s in steps]
        assert abs(np.mean(ratios) - 0.25) > 0.01
        # controls: the sums without their corrections are not unbiased
        assert abs(np.mean([s.sq_norm_of_mean for s in steps]) - 4) > 0.2
        assert abs(np.mean([s.mean_sq_norm - s.sq_norm_of_mean for s in steps]) - 1) > 0.2


@pytest.mark.parametrize("n", [2, 3])
def test_without_replacement_the_squared_gradient_is_low_by_s2_over_n(n):
    data = np.random.default_rng(3).normal(1, 1, (5, 2))
    grad, _ = truth(data)
    s2 = float(((data - data.mean(0)) ** 2).sum() / (len(data) - 1))
    steps = [step_of(data[list(rows)]) for rows in itertools.permutations(range(5), n)]
    close(np.mean([s.grad_sq_norm for s in steps]), grad - s2 / len(data), rtol=1e-11, what="|G|²")
    close(np.mean([s.trace_sigma for s in steps]), s2, rtol=1e-11, what="tr Σ")


def test_token_weights_are_exactly_unbiased_for_the_squared_gradient():
    data, a = np.array([[1.0, 0.5], [3.0, -1.0], [0.0, 2.0]]), np.array([0.5, 0.3, 0.2])
    grad, _ = truth(data)
    found, uncorrected = [], []
    for rows in ordered_batches(3, 3):
        c = a[:, None] * data[list(rows)]
        m, q = 3 * float((c**2).sum()), float((c.sum(0) ** 2).sum())
        found.append(StepSums(0, 3, m, q, sum_sq_weights=float(a @ a)).grad_sq_norm)
        uncorrected.append(StepSums(0, 3, m, q).grad_sq_norm)
    close(np.mean(found), grad, rtol=1e-12, what="|G|²")
    assert np.mean(uncorrected) < 0.99 * grad


@pytest.mark.parametrize(("n", "reads"), [(4, 0.83), (8, 0.88), (16, 0.92)])
def test_log_normal_lengths_uncorrected_read_low_and_corrected_do_not(n, reads):
    # FACTS §3, log-length SD 1: E|G|² uncorrected = |G|²·(1 − Σa²)/(1 − 1/n) whatever tr Σ is
    rng = np.random.default_rng(0)
    t = np.exp(rng.normal(0, 1, (20_000, n)))
    a = t / t.sum(1, keepdims=True)
    corrected, uncorrected = [], []
    for weights in a:  # the expected sums, given the weights: |G|² = 1, tr Σ = 20
        s2 = float(weights @ weights)
        m, q = n * s2 * 21, 1 + 20 * s2
        corrected.append(unbiased(n, m, q, s2).grad_sq_norm)
        uncorrected.append(unbiased(n, m, q, 1 / n).grad_sq_norm)
    assert abs(np.mean(corrected) - 1) < 0.02
    assert abs(np.mean(uncorrected) - reads) < 0.025


def test_negative_estimates_are_legal_and_never_clamped():
    s = StepSums(step=3, n_examples=4, mean_sq_norm=10.0, sq_norm_of_mean=1.0)
    assert s.grad_sq_norm == -2.0
    assert s.trace_sigma == 12.0
    assert math.isnan(s.b_simple)
    assert s.b_simple_plugin == 12.0
    assert s.usable


def test_identical_gradients_of_zero_have_no_ratio():
    s = StepSums(step=0, n_examples=4, mean_sq_norm=0.0, sq_norm_of_mean=0.0)
    assert (s.grad_sq_norm, s.trace_sigma) == (0, 0)
    assert math.isnan(s.b_simple)
    assert math.isnan(s.b_simple_plugin)


def test_squared_norms_are_averaged_not_the_mean_of_norms_squared():
    # FACTS §5: heavy tails, true B read 15 times too small by the square of the mean of norms
    norms = np.array([0.01] * 99 + [10.0])
    g = np.zeros((100, 100))
    np.fill_diagonal(g, norms)
    s = step_of(g)
    wrong = StepSums(0, 100, float(norms.mean() ** 2), s.sq_norm_of_mean)
    assert s.mean_sq_norm == pytest.approx(float((norms**2).mean()))
    assert wrong.trace_sigma < 0.1 * s.trace_sigma


@pytest.mark.parametrize("theta", [0.1, 0.5, 0.9])
def test_cockpits_norm_test_identity(theta):
    """θ² = (m − q)/(B q) with the population variance over B − 1; B_simple of the plug-in is Bθ²/(1 − θ²)."""
    n, q = 16, 2.0
    s = StepSums(0, n, q + theta**2 * q * (n - 1), q)  # tr Σ / (n q) = θ²
    close(s.trace_sigma / (n * q), theta**2, rtol=EXACT, what="θ²")
    close(s.b_simple, n * theta**2 / (1 - theta**2), rtol=1e-12, what="B_simple")
    close(1 / s.b_simple_plugin, 1 / s.b_simple + 1 / n, rtol=1e-12, what="1/plug-in")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"n_examples": 1}, "1 example(s) in the step: at least 2"),
        ({"n_examples": 0}, "0 example(s)"),
        ({"mean_sq_norm": math.nan}, "not finite"),
        ({"sq_norm_of_mean": math.inf}, "not finite"),
        ({"finite": False}, "not finite"),
        ({"sum_sq_weights": 1.0}, "all the weight"),
        ({"sum_sq_weights": math.nan}, "all the weight"),
        ({"reason": "because"}, "because"),
    ],
    ids=str,
)
def test_a_step_that_cannot_be_used_says_why(fields, reason):
    s = StepSums(**({"step": 0, "n_examples": 4, "mean_sq_norm": 2.0, "sq_norm_of_mean": 1.0} | fields))
    assert not s.usable
    assert s.reason is not None
    assert reason in s.reason
    assert s.finite is not ("not finite" in reason)


def test_one_example_has_no_estimate():
    s = StepSums(0, 1, 2.0, 2.0)
    assert math.isnan(s.grad_sq_norm)
    assert math.isnan(s.trace_sigma)
    assert math.isnan(s.b_simple)
    assert math.isnan(StepSums(0, 0, 0.0, 0.0).sum_sq_weights)


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="n_examples is -1; a count of examples is needed"):
        StepSums(0, -1, 1.0, 1.0)


# groups and rows


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("base.q_proj.lora_A.default.weight", "A"),
        ("base.q_proj.lora_B.default.weight", "B"),
        ("base.embed.lora_embedding_A.default", "A"),
        ("base.embed.lora_embedding_B.default", "B"),
        ("base.lora_Alike.weight", None),
        ("base.q_proj.weight", None),
        ("lora_A", "A"),
        ("lora_magnitude_vector.default.weight", None),
    ],
)
def test_factor_of(name, factor):
    assert factor_of(name) == factor


def test_groups_are_sums_over_their_parameters():
    layout = Layout(("q.lora_A.x", "q.lora_B.x", "k.lora_A.x", "head.weight"))
    s = from_rows(np.array([[1.0, 0.5], [2, 1], [3, 1.5], [10, 4]]), layout, step=2, n_examples=4, n_tokens=9)
    assert {name: (g.mean_sq_norm, g.sq_norm_of_mean) for name, g in s.groups.items()} == {
        "A": (4, 2),
        "B": (2, 1),
        "other": (10, 4),
    }
    assert (s.mean_sq_norm, s.sq_norm_of_mean) == (16, 7)
    assert all(g.n_examples == 4 and g.step == 2 and g.n_tokens == 9 for g in s.groups.values())
    assert [name for name, _ in s.parameters()] == list(layout.names)
    assert [p.mean_sq_norm for _, p in s.parameters()] == [1, 2, 3, 10]


def test_a_model_without_factors_has_no_groups():
    assert from_rows(np.ones((2, 2)), Layout(("a", "b")), step=0, n_examples=2).groups == {}
    assert StepSums(0, 2, 1.0, 1.0).groups == {}
    assert list(StepSums(0, 2, 1.0, 1.0).parameters()) == []


def test_groups_keep_the_weights_of_the_examples():
    s = from_rows(np.ones((1, 2)), Layout(("lora_A",)), step=0, n_examples=4, sum_sq_weights=0.4)
    assert s.groups["A"].sum_sq_weights == 0.4


def test_leaving_parameters_out_takes_them_out_of_both_sums():
    s = from_rows(np.array([[1.0, 0.5], [2, 1], [3, 1.5]]), Layout(("a", "b", "c")), step=0, n_examples=4)
    left = s.without(["b", "unknown"])
    assert (left.mean_sq_norm, left.sq_norm_of_mean) == (4, 2)
    assert left.layout == Layout(("a", "c"))
    assert (s.mean_sq_norm, s.sq_norm_of_mean) == (6, 3)
    assert s.without(["unknown"]) is s
    by_hand = StepSums(0, 2, 1.0, 1.0)
    assert by_hand.without(["a"]) is by_hand
    shared = Layout(("a", "c"))
    assert s.without(["b"], shared).layout is shared


def test_norms_of_single_examples_are_of_all_parameters_or_unknown():
    known = {"mean_fourth": 9.0, "top_sq_norms": (2.0,)}
    s = from_rows(np.ones((2, 2)), Layout(("lora_A", "b")), step=0, n_examples=4, **known)
    assert (s.mean_fourth, s.top_sq_norms) == (9.0, (2.0,))
    assert s.without(["unknown"]).mean_fourth == 9.0
    for part in (s.without(["b"]), s.without(["b", "lora_A"]), s.groups["A"], dict(s.parameters())["b"]):
        assert (part.mean_fourth, part.top_sq_norms) == (None, ())


def test_a_step_with_every_parameter_left_out_is_not_usable():
    s = from_rows(np.array([[1.0, 0.5]]), Layout(("a",)), step=0, n_examples=4)
    assert not s.without(["a"]).usable, "m = q = 0 of no parameter at all is no measurement"


def test_rows_and_layout_must_fit():
    with pytest.raises(ValueError, match=r"shape \(3, 2\); \[2, 2\] is needed"):
        from_rows(np.ones((3, 2)), Layout(("a", "b")), step=0, n_examples=2)


def test_joint_sums_are_taken_in_float64():
    rows = np.full((1000, 2), 0.1, dtype=np.float32)
    s = from_rows(rows, Layout(tuple(map(str, range(1000)))), step=0, n_examples=2)
    close(s.mean_sq_norm, 1000 * float(np.float32(0.1)), rtol=1e-14)


# merging

part = st.builds(
    Contributions,
    st.lists(st.integers(0, 100), min_size=2, max_size=2).map(lambda v: np.array(v, dtype=np.float64)),
    st.integers(1, 9),
    st.integers(1, 50).map(float),
    st.integers(1, 50).map(float),
    st.one_of(st.none(), st.integers(0, 99)),
)


def as_tuple(c: Contributions):
    return (*c.sum_sq_norms.tolist(), c.n_examples, c.weight_sum, c.weight_sq_sum, c.n_tokens)


@given(part, part, part)
def test_merge_is_associative_and_commutative(a, b, c):
    assert as_tuple(a.merge(b).merge(c)) == as_tuple(a.merge(b.merge(c)))
    assert as_tuple(a.merge(b)) == as_tuple(b.merge(a))


def test_close_joins_both_sums():
    whole = Contributions(np.array([1.0, 2.0]), 2, 2, 2, 10).merge(
        Contributions(np.array([0.5, 0.5]), 2, 2, 2, 6)
    )
    s = whole.close(np.array([0.25, 0.75]), Layout(("a", "b")), step=5, learning_rate=0.1)
    assert s.n_examples == 4
    assert s.mean_sq_norm == 4 * 4.0
    assert s.sq_norm_of_mean == 1.0
    assert s.sum_sq_weights == 0.25
    assert (s.step, s.n_tokens, s.learning_rate) == (5, 16, 0.1)
    assert [p.mean_sq_norm for _, p in s.parameters()] == [6, 10]


def test_close_uses_the_weights_of_the_examples():
    s = Contributions(np.array([1.0]), 2, 4.0, 10.0).close(np.array([1.0]), Layout(("a",)), step=0)
    assert s.sum_sq_weights == 10 / 16  # weights 1 and 3
    unknown = Contributions(np.array([1.0]), 2, 0.0, 0.0).close(np.array([1.0]), Layout(("a",)), step=0)
    assert unknown.sum_sq_weights == 0.5


@pytest.mark.parametrize("n", range(2, 400, 7))
def test_equal_weights_summed_are_recognised_as_equal(n):
    s = Contributions(np.array([1.0]), n, float(n), float(n)).close(np.array([1.0]), Layout(("a",)), step=0)
    assert s.sum_sq_weights == 1 / n
