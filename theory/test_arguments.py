"""Bad arguments are refused by name and domain; theory stands alone."""

import ast
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import theory
from theory import enumeration, laws, lora_init, montecarlo, one_epoch, spectra, tradeoff, verdict

QUADRATIC = laws.NoisyQuadratic.power_law(3)
ONES, EYE = [1.0, 1.0], np.eye(2)

BAD: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    *[(laws.lemma_mean, (r, 10), "r") for r in (0, -1, np.nan, np.inf, "x", [3, 4])],
    *[(laws.lemma_mean, (8, n), "n") for n in (1, 0, -3, 2.5, np.nan, np.inf)],
    (laws.lemma_variance, (0, 10), "r"),
    (laws.lemma_mean_biased, (8, 1), "n"),
    (laws.LemmaLaw, (0, 10), "r"),
    (laws.LemmaLaw, (8, 1), "n"),
    (laws.LemmaLaw(8, 20).quantile, (1.0,), "p"),
    (laws.LemmaLaw(8, 20).quantile, (np.nan,), "p"),
    (laws.plugin_mean, ([1.0, -1.0], 10), "eigenvalues"),
    (laws.plugin_mean, ([1.0, np.nan], 10), "eigenvalues"),
    (laws.plugin_mean, ([0.0, 0.0], 10), "eigenvalues"),
    (laws.plugin_mean, ([[1.0]], 10), "eigenvalues"),
    (laws.plugin_mean, ([], 10), "eigenvalues"),
    (laws.plugin_mean, (ONES, 1), "n"),
    (laws.reciprocal_moment, (ONES, [1.0]), "mean"),
    (laws.reciprocal_moment, (ONES, [1.0, np.inf]), "mean"),
    (laws.isotropic_reciprocal_moment, (0, 1), "r"),
    (laws.isotropic_reciprocal_moment, (8, -1), "noncentrality"),
    (laws.effective_rank, ([-1.0],), "eigenvalues"),
    (laws.power_law_spectrum, (0,), "d"),
    (laws.power_law_spectrum, (5, np.nan), "exponent"),
    (spectra.repeated_reciprocal_moment, (ONES, 0), "multiplicity"),
    (laws.f_test_size, (ONES, 10, 0.0), "level"),
    (laws.f_test_size, (ONES, 10, 0.05, -1), "assumed_rank"),
    (laws.any_signal_p_value, (1.0, 0, 10), "r"),
    (laws.critical_ratio, (3, 1), "n"),
    (laws.quadratic_form_positive, (ONES, [1.0]), "dof"),
    (laws.hall_statistic, (1.0, 0.0, 1), "k"),
    (laws.studentised_statistic, ([1.0],), "per_step"),
    (laws.squared_covariance_trace, (np.eye(3),), "gram"),
    (laws.sign_flip_p_value, (np.ones((2, 3)), 10, 0), "gram"),
    (laws.sign_flip_p_value, (EYE, 0, 0), "flips"),
    (laws.plugin_from_population, (-1, 10), "b_simple"),
    (laws.plugin_from_population, (5, 1), "n"),
    (laws.population_from_plugin, (0, 10), "b_plugin"),
    (laws.plugin_ratio_mean, (8, 10, 0), "b_simple"),
    (laws.signal_b_simple, (0, 1), "r"),
    (laws.signal_b_simple, (8, -1), "snr"),
    (laws.regression_moments, (ONES, [1.0], 1), "error"),
    (laws.regression_moments, (ONES, ONES, -1), "noise_variance"),
    (enumeration.average_over_batches, ([[1], [2]], 1), "batch"),
    (enumeration.average_over_batches, ([[1], [2]], 3, "without"), "batch"),
    (enumeration.average_over_batches, ([[1], [2]], 2, "maybe"), "draw"),
    (enumeration.population, ([[1], [1, 2]],), "examples"),
    (laws.lora_null_factor, (0, 1), "r"),
    (laws.lora_null_factor, (4, 0), "d_out"),
    (laws.b_factor_null_mean, (4, 3, 10), "d_out"),
    (laws.b_factor_null_mean_given, (4, np.ones((2, 3)), 10), "label_gram"),
    (laws.gaussian_a_mean, (8, 4, 10), "d_in"),
    (laws.init_factor_a, ("pissa", 4, 8, 0), "kind"),
    (laws.init_factor_a, ("gaussian", 8, 4, 0), "d_in"),
    (laws.a_factor_mean, (ONES, 10), "a"),
    (lora_init.a_effective_rank, ("magic", 4, 8), "kind"),
    (laws.subspace_snr, (2.0, 1.0, 1.0), "captured"),
    (laws.subspace_b_mean, (9, 8, 1.0), "r"),
    (laws.subspace_b_quantile, (0.0, 4, 8, 1.0), "p"),
    (laws.TradeOff, (0, 1), "s_min"),
    (laws.TradeOff, (1, -1), "e_min"),
    (laws.TradeOff(1, 1).steps, (0,), "batch"),
    (laws.fit_tradeoff, ([1.0, 2.0], [1.0]), "steps"),
    (laws.fit_tradeoff, ([2.0, 1.0], [1.0, 1.0]), "batches"),
    (laws.fit_tradeoff, ([1.0, 2.0], [1.0, 2.0]), "steps"),
    (laws.sgd_learning_rate, (0.0, 1, 1), "batch"),
    (laws.surge_learning_rate, (1.0, 0, 1), "eps_max"),
    (laws.sign_descent_rate, (1.0, ONES, [1.0, 0.0], EYE), "deviation"),
    (tradeoff.sign_descent_peak, (ONES, ONES, EYE), "hessian"),
    (laws.NoisyQuadratic, (np.ones(2), np.ones(2), np.ones(3), np.ones(2)), "start"),
    (QUADRATIC.best_loss, (10.0, 1.0, "linear"), "schedule"),
    (QUADRATIC.best_loss, (-1.0, 1.0), "examples"),
    (QUADRATIC.trajectory, (1e-30, 1.0), "target"),
    (laws.one_epoch_batches, (np.ones((1, 2)), [1.0, 2.0], "vague", 1.0), "criterion"),
    (one_epoch.run_averages, ([1.0, -1.0], 1.0), "per_step"),
    (laws.fieller, ([1.0], [1.0]), "x"),
    (laws.fieller, (ONES, [1.0, 2.0, 3.0]), "y"),
    (laws.fieller, (ONES, [1.0, np.nan]), "y"),
    (laws.hall_hull, (ONES, ONES, 1.0), "level"),
    (laws.planned_detection_limit, (1, 50, 10), "batch"),
    (laws.planned_detection_limit, (16, 0, 10), "steps"),
    (laws.step_variances, (ONES, [1.0], 4), "mean"),
    (montecarlo.lemma_data, (8, 1), "n"),
    (montecarlo.lemma_data, (8, 5, 4), "d"),
    (montecarlo.lemma_data, (8, 5, None, "N-2"), "divisor"),
    (montecarlo.simulate, (montecarlo.lemma_law(8, 20), 1, 0), "draws"),
    (verdict.z_bound, (0.0,), "family"),
]


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    BAD,
    ids=[f"{f.__qualname__}-{n}-{i}" for i, (f, _, n) in enumerate(BAD)],
)
def test_bad_argument_is_refused_by_name(
    function: Callable[..., Any], arguments: tuple[Any, ...], name: str
) -> None:
    """ValueError: `name: needs <domain>, got <value>`."""
    with pytest.raises(ValueError, match=rf"^{name}: needs .+, got "):
        function(*arguments)


def test_rank_two_and_below_is_no_error() -> None:
    """`inf`, with the reason in the docstring."""
    for mean in (
        laws.lemma_mean(2, 10),
        laws.plugin_mean([1.0, 1.0], 10),
        laws.plugin_ratio_mean(2, 10, np.inf),
    ):
        assert mean == np.inf
    assert "diverges" in str(laws.lemma_mean.__doc__)


def test_theory_imports_neither_torch_nor_gns() -> None:
    """Walk the imports of every module."""
    seen = set()
    for path in pathlib.Path(theory.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            seen |= {name.split(".")[0] for name in names}
    assert "numpy" in seen and not seen & {"torch", "gns", "experiments", "transformers", "peft"}


def test_public_names_exist_and_are_documented() -> None:
    """`theory` and `theory.laws` list what they have; an unknown name is refused with the list."""
    for name in theory.__all__:
        assert getattr(theory, name).__doc__
    assert len(set(laws.__all__)) == len(laws.__all__)
    for name in laws.__all__:
        assert getattr(laws, name).__doc__
    with pytest.raises(AttributeError, match="laws, lemma, montecarlo, verdict"):
        theory.__getattr__("law")
