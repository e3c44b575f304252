"""Bad arguments are refused by name and domain; theory stands alone."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import theory
from theory import enumeration, laws, lemma_law, lora_init, montecarlo, one_epoch, spectra, tradeoff, verdict

QUADRATIC = laws.NoisyQuadratic.power_law(3)
ONES, EYE = [1.0, 1.0], np.eye(2)

NO_NUMBERS = ("8", b"8", True, np.True_, None, 8 + 0j, [8], 10**400)
NO_SPECTRA = ("123", ["1", "2"], [True, True], None, 3.0, [1 + 1j], [[1.0, 2.0], [3.0]], [1.0, np.inf])
NAN_GRAM = np.full((5, 5), np.nan)
RATES = np.array([0.1, 0.2])

BAD: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    *[(laws.lemma_mean, (v, 10), "r") for v in NO_NUMBERS],
    *[(laws.lemma_mean, (8, v), "n") for v in NO_NUMBERS],
    *[(laws.plugin_mean, (v, 10), "eigenvalues") for v in NO_SPECTRA],
    *[(laws.plugin_mean, (ONES, 10, v), "mean") for v in ("12", ["a", "b"], [True, True], [np.nan, 1.0])],
    *[(laws.LemmaLaw(8, 20).cdf, (v,), "x") for v in ("x", np.nan, [1.0, np.nan], [True])],
    *[(laws.LemmaLaw(8, 20).pdf, (v,), "x") for v in ("x", np.nan)],
    *[(laws.LemmaLaw, (r, 10), "r") for r in (1e-3, 1e300)],
    (lemma_law.log_f_density, (0.0, 3, 4), "z"),
    (laws.power_law_spectrum, (5, -500), "exponent"),
    (laws.reciprocal_moment, ([1e-310] * 5,), "eigenvalues"),
    (laws.isotropic_reciprocal_moment, (8, "5"), "noncentrality"),
    (spectra.isotropic_reciprocal_moment_hyp, (8, 1e308), "noncentrality"),
    *[(laws.any_signal_p_value, (v, 8, 10), "ratio") for v in (-1.0, np.nan, "a")],
    (laws.quadratic_form_positive, ([0.0, 0.0], ONES), "weights"),
    (laws.hall_statistic, (np.nan, 0.0, 5), "t"),
    (laws.studentised_statistic, ([1.0, 1.0, 1.0],), "per_step"),
    (laws.studentised_statistic, ([1.0, np.nan],), "per_step"),
    (laws.squared_covariance_trace, (NAN_GRAM,), "gram"),
    (laws.estimated_effective_rank, (np.zeros((5, 5)),), "gram"),
    (laws.sign_flip_p_value, (NAN_GRAM, 99, 0), "gram"),
    (laws.sign_flip_p_value, (EYE, 99, "seed"), "seed"),
    (laws.plugin_from_population, ("inf", 10), "b_simple"),
    (laws.plugin_ratio_mean, (8, 10, 1e-320), "b_simple"),
    (laws.GradientMoments, (1.0, 1.0, np.nan, 0.0), "trace_h_sigma"),
    (laws.regression_moments, ([1e300, 1.0], [1e10, 1.0], 1.0), "trace_sigma"),
    (laws.b_factor_null_mean_given, (4, [[10, 3], [0, 10]], 10), "label_gram"),
    (laws.b_factor_null_mean_given, (4, [[10, 30], [30, 10]], 10), "label_gram"),
    (laws.b_factor_null_mean_given, (4, [[9, 3], [3, 9]], 10), "label_gram"),
    (laws.a_factor_mean, (np.full((3, 5), np.nan), 10), "a"),
    (laws.a_factor_mean, (np.zeros((3, 5)), 10), "a"),
    (laws.init_factor_a, ("gaussian", 4, 8, -1), "seed"),
    (laws.a_effective_rank, ("gaussian", 8, 4), "d_in"),
    (laws.subspace_snr, (0.5, 1.0, -1.0), "noise_variance"),
    (laws.subspace_snr, ("a", 1.0, 1.0), "captured"),
    (laws.subspace_b_quantile, (5.0, 8, 8, 1.0), "p"),
    (laws.TradeOff, ("3", 1), "s_min"),
    (laws.fit_tradeoff, ([1.0], [1.0]), "batches"),
    (laws.sgd_learning_rate, ("a", 1, 1), "batch"),
    (laws.sign_descent_rate, (1.0, ONES, ONES, [[1.0, 0.5], [0.0, 1.0]]), "hessian"),
    (laws.sign_descent_peak, (ONES, [0.0, 1.0], np.ones((2, 2))), "deviation"),
    (laws.sign_descent_peak, (ONES, [1.0], np.ones((2, 2))), "deviation"),
    (laws.sign_descent_peak, (ONES, ONES, [[-1.0, 1.0], [1.0, -1.0]]), "hessian"),
    (laws.NoisyQuadratic, (np.array([1.0, 0.0]), np.ones(2), np.ones(2), RATES), "curvature"),
    (laws.NoisyQuadratic, (np.ones(2), np.ones(2), np.ones(2), 10 * RATES), "rates"),
    (laws.NoisyQuadratic.power_law, (3, np.nan), "exponent"),
    (QUADRATIC.after_constant, (10, 1, 3.0), "rate"),
    (QUADRATIC.after_constant, (10, -1, 0.1), "batch"),
    (QUADRATIC.after_constant, (-1, 1, 0.1), "steps"),
    (QUADRATIC.after_cosine, (10, 1, [5.0]), "rates"),
    (QUADRATIC.best_loss, (1.0, 10.0), "batch"),
    (QUADRATIC.steps_to, (100.0, 1.0), "target"),
    (QUADRATIC.b_simple, (np.zeros(3),), "second"),
    (QUADRATIC.loss, (np.ones(2),), "second"),
    (laws.largest_batch, ([1.0, 2.0, 3.0], [1.0, 2.0], 1.5), "losses"),
    (laws.largest_batch, ([1.0, 0.0], [1.0, 2.0], 1.5), "losses"),
    (laws.one_epoch_batches, ([[np.nan, np.nan]], [1.0, 2.0], "target", 1.0), "table"),
    (laws.one_epoch_batches, ([1.0, 2.0], [1.0, 2.0], "target", 1.0), "table"),
    (laws.one_epoch_batches, (np.ones((1, 2)), [1.0, 2.0], "absolute", -1.0), "bound"),
    (laws.growth_exponent, ([1.0, 2.0, 3.0], [1.0, -2.0, 3.0]), "batches"),
    (laws.growth_exponent, ([1.0, 2.0, 3.0], [1.0, 2.0]), "batches"),
    (laws.fieller, (ONES, [0.0, 0.0]), "y"),
    (laws.hall_hull, (ONES, [0.0, 0.0]), "y"),
    (laws.hull_accepts, ([1.0, np.nan], ONES, 1.0), "x"),
    (laws.hull_accepts, (ONES, ONES, "a"), "theta"),
    (laws.ratio_statistics, (ONES, [1.0, 2.0, 3.0], 1.0), "y"),
    (laws.delta_interval, (ONES, [1.0, -1.0]), "y"),
    (laws.detection_limit, (ONES, ONES), "y"),
    (laws.detection_limit, ([-1.0, -2.0], [1.0, 2.0]), "x"),
    (laws.step_variances, ([1e300], [1.0], 3), "eigenvalues"),
    (enumeration.population, ([["a"], [1]],), "examples"),
    (enumeration.population, ([[float("inf")], [1]],), "examples"),
    (enumeration.population, ([1, 3],), "examples"),
    (montecarlo.spectrum_plugin, (ONES, 10, [1.0]), "mean"),
    (montecarlo.gaussian_step, (ONES, [1.0], 10), "mean"),
    (montecarlo.sgd_second_moment, (ONES, [1.0], ONES, 0.1, 1, 3), "noise"),
    (montecarlo.lora_null, ("gaussian", 5, 4, 1, 10), "d_in"),
    (montecarlo.step_estimates, (np.ones((2, 1, 3)),), "gradients"),
    (montecarlo.collect, (montecarlo.lemma_law(8, 20), 10, "x"), "seed"),
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
    (laws.NoisyQuadratic, (np.ones(2), np.ones(2), np.ones(3), np.array([0.1, 0.2])), "start"),
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


def test_every_public_function_says_what_it_raises() -> None:
    """A `Raises:` section wherever a name of `theory.laws` takes arguments that can be wrong."""
    silent = ("RatioSet", "CriticalBatch")  # results, built by functions that check
    missing = [n for n in laws.__all__ if n not in silent and "Raises:" not in str(getattr(laws, n).__doc__)]
    assert missing == []


def test_theory_runs_without_torch_and_gns() -> None:
    """A fresh interpreter in which both are forbidden imports every module and proves the lemma."""
    forbid = (
        "import sys, pkgutil, importlib, importlib.abc\n"
        "class Forbid(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'gns', 'transformers', 'peft', 'experiments'):\n"
        "            raise RuntimeError('forbidden: ' + name)\n"
        "sys.meta_path.insert(0, Forbid())\n"
        "import theory\n"
        "names = [m.name for m in pkgutil.iter_modules(theory.__path__)]\n"
        "names = [n for n in names if not n.startswith(('test_', 'conftest'))]\n"
        "for name in names: importlib.import_module('theory.' + name)\n"
        "from theory import laws, montecarlo\n"
        "mean = montecarlo.simulate(montecarlo.lemma_law(8, 20), 10**5, 0)\n"
        "print(len(names), mean.agrees(laws.lemma_mean(8, 20)))"
    )
    root = pathlib.Path(theory.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", forbid], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    count, agrees = run.stdout.split()
    assert int(count) >= 15 and agrees == "True"


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
