"""The exact laws, one flat face: import any of them from here.

Each lives in a module of one idea: `lemma_law` (the lemma's distribution), `spectra` (any spectrum and mean),
`any_signal` (is there any gradient?), `signal` (empirical against population), `lora_init` (LoRA at B = 0),
`tradeoff` (steps, examples, learning rate), `quadratic` and `one_epoch` (a solvable model of training),
`intervals` (confidence sets, detection limits), `enumeration` (exact small cases).
"""

from theory.any_signal import (
    any_signal_p_value,
    critical_ratio,
    estimated_effective_rank,
    f_test_size,
    hall_statistic,
    quadratic_form_positive,
    sign_flip_p_value,
    squared_covariance_trace,
    studentised_statistic,
)
from theory.enumeration import average_over_batches, population
from theory.intervals import (
    RatioSet,
    delta_interval,
    detection_limit,
    fieller,
    hall_hull,
    hull_accepts,
    planned_detection_limit,
    ratio_statistics,
    step_variances,
    t_quantile,
)
from theory.lemma_law import LemmaLaw, lemma_mean, lemma_mean_biased, lemma_variance
from theory.lora_init import (
    a_effective_rank,
    a_factor_mean,
    b_factor_null_mean,
    b_factor_null_mean_given,
    gaussian_a_mean,
    init_factor_a,
    lora_null_factor,
    subspace_b_mean,
    subspace_b_quantile,
    subspace_b_ratio_of_means,
    subspace_snr,
)
from theory.one_epoch import (
    CriticalBatch,
    critical_batch,
    growth_exponent,
    largest_batch,
    loss_table,
    one_epoch_batches,
    run_averages,
)
from theory.quadratic import NoisyQuadratic
from theory.signal import (
    GradientMoments,
    mean_of_ratios_factor,
    plugin_from_population,
    plugin_ratio_mean,
    population_from_plugin,
    regression_moments,
    signal_b_simple,
)
from theory.spectra import (
    effective_rank,
    isotropic_reciprocal_moment,
    plugin_mean,
    plugin_mean_shortcut,
    power_law_spectrum,
    reciprocal_moment,
)
from theory.tradeoff import (
    TradeOff,
    fit_tradeoff,
    progress_share,
    sgd_learning_rate,
    sign_descent_peak,
    sign_descent_rate,
    surge_learning_rate,
)

__all__ = [
    # the lemma
    "LemmaLaw",
    "lemma_mean",
    "lemma_mean_biased",
    "lemma_variance",
    # any spectrum, any mean
    "effective_rank",
    "isotropic_reciprocal_moment",
    "plugin_mean",
    "plugin_mean_shortcut",
    "power_law_spectrum",
    "reciprocal_moment",
    # is there any signal?
    "any_signal_p_value",
    "critical_ratio",
    "estimated_effective_rank",
    "f_test_size",
    "hall_statistic",
    "quadratic_form_positive",
    "sign_flip_p_value",
    "squared_covariance_trace",
    "studentised_statistic",
    # empirical objective and population
    "GradientMoments",
    "average_over_batches",
    "mean_of_ratios_factor",
    "plugin_from_population",
    "plugin_ratio_mean",
    "population",
    "population_from_plugin",
    "regression_moments",
    "signal_b_simple",
    # LoRA at initialisation
    "a_effective_rank",
    "a_factor_mean",
    "b_factor_null_mean",
    "b_factor_null_mean_given",
    "gaussian_a_mean",
    "init_factor_a",
    "lora_null_factor",
    "subspace_b_mean",
    "subspace_b_quantile",
    "subspace_b_ratio_of_means",
    "subspace_snr",
    # batch size: trade-off, learning rate, one epoch
    "CriticalBatch",
    "NoisyQuadratic",
    "TradeOff",
    "critical_batch",
    "fit_tradeoff",
    "growth_exponent",
    "largest_batch",
    "loss_table",
    "one_epoch_batches",
    "progress_share",
    "run_averages",
    "sgd_learning_rate",
    "sign_descent_peak",
    "sign_descent_rate",
    "surge_learning_rate",
    # how sure
    "RatioSet",
    "delta_interval",
    "detection_limit",
    "fieller",
    "hall_hull",
    "hull_accepts",
    "planned_detection_limit",
    "ratio_statistics",
    "step_variances",
    "t_quantile",
]
