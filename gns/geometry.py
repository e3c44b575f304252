"""Where in a model the noise is: the noise scale of every module and of every layer, from the recorded steps.

The joint number of a LoRA model is a convention. A → cA, B → B/c leaves the function alone and moves it,
since the factors' squared norms are then scaled by 1/c² and c². The numbers of each factor do not move, for a
common scale cancels in tr Σ / |G|²: they are in `.groups` of every module and layer. The metrics that a step
can be measured in are in `METRICS`, see `gns.metrics`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gns.estimate import Estimate, concluded, summarise, usable_of
from gns.statistics.moments import BETWEEN, Moments, exact_unit
from gns.sums import FACTORS, Layout, StepSums, factor_of

__all__ = ["METRICS", "by_layer", "by_module", "layer_of", "module_of"]

if TYPE_CHECKING:
    from gns.metrics import METRICS

_PEFT, _COMPILED = "base_model.model.", "_orig_mod"
# parts of a parameter's name that belong to an adapter inside the module, not to the path of the module
_INSIDE = ("base_layer", "modules_to_save", "original_module")
_CHUNK = 256  # steps whose rows are turned at once, so that they stay in a cache


def __getattr__(name: str) -> Any:
    """Give `METRICS`, whose module imports torch, only when it is asked for: a report needs none.

    Raises:
        AttributeError: the module has no such name.
    """
    if name == "METRICS":
        from gns.metrics import METRICS

        return METRICS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def module_of(parameter: str) -> str:
    """Path of the module that a parameter belongs to, as the base model has it; "" is the model itself.

    What `torch.compile` and `peft` put around and inside a module is no part of it: both factors in
    "base_model.model.model.layers.0.mlp.up_proj" belong to "model.layers.0.mlp.up_proj".
    """
    plain = ".".join(part for part in parameter.split(".") if part != _COMPILED)
    parts = plain.removeprefix(_PEFT).split(".")
    inside = [i for i, part in enumerate(parts) if part.startswith("lora_") or part in _INSIDE]
    return ".".join(parts[: inside[0]] if inside else parts[:-1])


def layer_of(parameter: str) -> str:
    """Path of the numbered block that a parameter is in, or of its module where it is in none."""
    parts = module_of(parameter).split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1] if numbered else parts)


def by_module(steps: Iterable[StepSums], *, level: float = 0.95) -> dict[str, Estimate]:
    """Estimate B_simple of every module, from the same steps as the joint one.

    Args:
        steps: records of steps; those that carry a `reason`, or no rows, are left out.
        level: nominal coverage of each confidence set; of many sets some will miss.

    Returns:
        Module path (see `module_of`) → its estimate, in the model's order, with "A" and "B" in `.groups` of a
        LoRA module. Each is what `estimate` gives of that module's own sums; what is not known of a part
        alone (the tails) is left unknown. Empty where no step has rows.

    Raises:
        ValueError: `level` is outside (0, 1), or the steps are not all in one metric.
    """
    return _by_part(steps, level, module_of)


def by_layer(steps: Iterable[StepSums], *, level: float = 0.95) -> dict[str, Estimate]:
    """Estimate B_simple of every numbered block, e.g. "model.layers.0"; the rest goes by its module.

    Args:
        steps: records of steps; those that carry a `reason`, or no rows, are left out.
        level: nominal coverage of each confidence set.

    Returns:
        Path of the block → its estimate, as `by_module` gives it.

    Raises:
        ValueError: `level` is outside (0, 1), or the steps are not all in one metric.
    """
    return _by_part(steps, level, layer_of)


class _Sums(NamedTuple):
    """Of one part of the model, over the steps that have it: which steps, and m and q of each."""

    at: np.ndarray
    m: np.ndarray
    q: np.ndarray


def _by_part(steps: Iterable[StepSums], level: float, part_of: Callable[[str], str]) -> dict[str, Estimate]:
    steps = list(steps)
    known = [s for s in steps if not isinstance(s, StepSums) or s.rows is not None]
    usable, _ = usable_of(known, level)
    # what is said of the steps holds of every part; of the tails, of none
    whole = replace(summarise(usable, level=level), tail_share=None, warnings=())
    n = np.array([s.n_examples for s in usable], dtype=np.float64)
    squares = np.array([s.sum_sq_weights for s in usable], dtype=np.float64)
    numbers = [s.step for s in usable]

    def estimated(sums: _Sums) -> Estimate:
        first, last = numbers[sums.at[0]], numbers[sums.at[-1]]
        about = {"steps": (first, last), "n_skipped": len(steps) - len(sums.at)}
        return _estimate(replace(whole, **about), n[sums.at], squares[sums.at], sums, level)

    found: dict[str, dict[str, _Sums]] = defaultdict(dict)
    for (part, group), sums in _sums_of(usable, part_of).items():
        found[part][group] = sums
    return {
        part: replace(estimated(of.pop("")), groups={g: estimated(sums) for g, sums in of.items()})
        for part, of in found.items()
    }


def _sums_of(steps: Sequence[StepSums], part_of: Callable[[str], str]) -> dict[tuple[str, str], _Sums]:
    """(part, factor or "" for all of it) → its sums over the steps; factors where the part has any."""
    by_layout: dict[Layout, list[int]] = defaultdict(list)
    for i, step in enumerate(steps):
        if step.layout is not None:
            by_layout[step.layout].append(i)
    pieces: dict[tuple[str, str], list[_Sums]] = defaultdict(list)
    for layout, at in by_layout.items():
        turned = _turned([steps[i].rows for i in at])
        for key, rows in _rows_of(layout, part_of).items():
            m, q = turned[rows].sum(0, dtype=np.float64)
            pieces[key].append(_Sums(np.array(at), m, q))
    return {key: _in_order(found) for key, found in pieces.items()}


def _turned(rows: Sequence[Any]) -> np.ndarray:
    """Turn the steps' rows [P, 2] into one array [P, 2, K]."""
    out = np.empty((*rows[0].shape, len(rows)), dtype=np.result_type(*{r.dtype for r in rows}))
    for start in range(0, len(rows), _CHUNK):
        out[:, :, start : start + _CHUNK] = np.stack(rows[start : start + _CHUNK], axis=-1)
    return out


def _rows_of(layout: Layout, part_of: Callable[[str], str]) -> dict[tuple[str, str], list[int]]:
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, name in enumerate(layout.names):
        part = part_of(name)
        found[part, ""].append(i)
        found[part, factor_of(name) or "other"].append(i)
    lora = {part for part, group in found if group in FACTORS}
    return {key: rows for key, rows in found.items() if not key[1] or key[0] in lora}


def _in_order(pieces: list[_Sums]) -> _Sums:
    """Join what steps of several layouts have of one part, in the order of the steps."""
    if len(pieces) == 1:
        return pieces[0]
    joined = [np.concatenate(each) for each in zip(*pieces, strict=True)]
    order = np.argsort(joined[0])
    return _Sums(*(each[order] for each in joined))


def _estimate(
    about: Estimate, n: np.ndarray, sum_sq_weights: np.ndarray, sums: _Sums, level: float
) -> Estimate:
    """Estimate from the sums of steps, [K] each, as `gns.estimate.estimate` does from records."""
    x, y = _unbiased(n, sums.m, sums.q, sum_sq_weights)
    about = replace(about, n_steps=len(n), n_examples=int(n.sum()))
    if len(n) < 2:
        one = {"b_simple": math.nan, "low": math.nan, "high": math.inf, "detection_limit": math.nan}
        one |= {"status": "collecting", "trace_sigma": float(x[0]), "grad_sq_norm": float(y[0])}
        return replace(about, **one, p_value=math.nan, variance=BETWEEN, moments=None)
    unit = exact_unit(x, y)
    moments = Moments.of(x * unit, y * unit, n - 1, n * (n - 1), variance="auto")
    return replace(about, **concluded(moments, unit, level))


def _unbiased(n: np.ndarray, m: np.ndarray, q: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tr Σ, |G|²) of each step, [K]; `gns.sums.unbiased` over many steps of two examples or more."""
    equal = a == 1 / n
    grad = np.where(equal, (n * q - m) / (n - 1), (q - m / n) / (1 - a))
    return np.where(equal, n * (m - q) / (n - 1), n * (q - grad)), grad
