"""`b_noise`: the Hessian-weighted noise scale B_noise = tr(HΣ) / GᵀHG at the model's weights as they are.

One tapped backward pass a batch gives the signed sums uₛ = Σ εᵢ(gᵢ − ḡ) of all probes, a product with H each
gives tr(HΣ), one with ḡ gives GᵀHG; `gns.curvature.conclude` has the formulas. H is always taken on examples
that are not among those of g: on the same ones tr(HΣ) is biased by r_eff/n.

Data-parallel ranks each give batches of their own and all get the numbers that one process would have on all
of them; `gns.curvature.together` says in which order.

The "surge" B_noise of Li et al. 2024 (arXiv:2405.14578) for Adam is not offered. It is made of the
off-diagonal of H weighted with signs of gradient entries, under independent Gaussian entries of known mean
μ and deviation σ, for B ≪ πσ²/2μ². A batch with fewer examples than parameters gives neither μ/σ entry by
entry nor those sums without bias; the authors themselves fit it from (S, E) pairs. It is another quantity: do
not set its peak against this B_noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from gns.capture.pooling import refusal, unwrapped
from gns.capture.projections import is_sharded
from gns.checking import check_choice, check_whole
from gns.curvature.assemble import concluded, factor_or_other, known_of
from gns.curvature.conclude import STATUSES, set_of
from gns.curvature.contractions import OPERATORS, Builder, Contractions, contract, identity, joined
from gns.curvature.errors import CurvatureError
from gns.curvature.gathering import Sums, gather
from gns.curvature.lanczos import lanczos
from gns.curvature.parts import Point, fingerprint, pieces
from gns.curvature.products import METHODS
from gns.curvature.result import Block, Cost, CurvatureEstimate
from gns.curvature.together import Alone, Places, digest, everyone
from gns.probing.calling import Loss, moved
from gns.probing.still import gradient_hook, still
from gns.segments import SegmentsOf

__all__ = ["METHODS", "OPERATORS", "STATUSES", "CurvatureError", "CurvatureEstimate", "b_noise"]


@dataclass(frozen=True)
class Asked:
    """How a reading is to be made, see `b_noise`."""

    probes: int = 8
    operator: str = "hessian"
    method: str = "auto"
    level: float = 0.95
    seed: int = 0
    weights: str = "auto"
    segments: SegmentsOf | str | None = None
    parts: int | None = None
    blocks: bool = False
    spectrum: int = 0
    contributions: bool = True


def b_noise(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    probes: int = 8,
    operator: str = "hessian",
    method: str = "auto",
    loss: Loss | None = None,
    level: float = 0.95,
    seed: int = 0,
    weights: str = "auto",
    segments: SegmentsOf | str | None = None,
    hessian_batches: int | Sequence[Any] = 1,
    parts: int | None = None,
    blocks: bool = False,
    spectrum: int = 0,
    contributions: bool = True,
) -> CurvatureEstimate:
    """Measure B_noise; nothing is trained.

    Weights, `.grad`, buffers, training modes and random states are bit by bit the same afterwards, also after
    an exception or Ctrl-C. Optimizers are never touched. Dropout is off.

    Where several data-parallel processes are under way (DDP), every rank must call it, each with batches of
    its own, at least one for g and one for H; their numbers may differ. All ranks get the same result, that
    of one process on the batches of all (to rounding; differenced products to their own error): the
    first batch of every rank in the order of the ranks, then the second ones, and so on.

    Args:
        model: the module to call, e.g. a `peft` model, or DDP's wrapper of it, whose inner module is then
            called; its trainable parameters are measured.
        batches: what to call it with, as for `probe`. The last `hessian_batches` are for H, all others for g.
        probes: random sign vectors. Each has its own examples: whole batches, if there are as many.
        operator: "hessian", or "ggn": Gauss-Newton, never indefinite, for cross-entropy and squared error.
        method: of the products: "exact" (second derivatives), "difference" (of gradients; with fused kernels,
            checkpointing and 16-bit weights), "forward" (losses alone, cheapest; not for models that route
            tokens to experts, whose loss jumps where a choice flips), or "auto": exact, and differences where
            that fails or would be rounded away.
        loss: (model, batch) → scalar, a mean over its examples or tokens; None: `model(**batch).loss`.
        level: nominal coverage of the confidence sets.
        seed: of the signs.
        weights: of the examples in the loss, see `GNSMonitor`.
        segments: which rows or positions are which example, see `GNSMonitor`.
        hessian_batches: how many of the batches, the last ones, are for H; or other batches for it. Never
            examples that are also among those for g.
        parts: how many parts the rows for H are cut into, worked off one at a time; their spread is H's.
            None: 4, or down to 2 where they would have fewer than 4 rows each.
        blocks: measure each LoRA factor's own block of H too, at the price of as many more readings.
        spectrum: products to spend on λ_max and tr H; 0: none.
        contributions: say what each LoRA factor and each module adds (`groups` and `modules`). False: exact
            products give vᵀHv alone, which is the same B_noise for about a third less.

    Returns:
        The estimate.

    Raises:
        CurvatureError: an argument does not fit, there are too few examples, no second derivative exists and
            differencing was refused, a product is not finite, or the operator does not fit the loss; a
            parameter's hook would act on the gradients; parameters are sharded (FSDP, ZeRO-3). With several
            processes: also what any rank raised but `ProbeError`, or a rank did not come within 30 s or left.
        ProbeError: there is no loss, or it is no differentiable scalar.
        RuntimeError: a monitor is attached to the model, or the model wrote to a buffer over 64 MiB
            (`StillError`).
        TypeError: `model` is no module.
        ValueError: nothing trainable can be measured.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> batches = torch.randn(9, 16, 4)
        >>> found = b_noise(model, batches, loss=lambda model, x: (model(x) - 1).square().mean())
        >>> found.method, found.n_examples, found.probes
        ('exact', 128, 8)
    """
    asked = Asked(probes, operator, method, level, seed, weights, segments, parts, blocks, spectrum)
    asked = replace(asked, contributions=contributions)
    with everyone() as ranks:
        return measured(model, batches, hessian_batches, asked, loss, ranks)


def measured(
    model: nn.Module,
    batches: Iterable[Any],
    hessian_batches: int | Sequence[Any],
    asked: Asked,
    loss: Loss | None,
    ranks: Alone,
) -> CurvatureEstimate:
    """Make a reading, among ranks that have met; see `b_noise`."""
    _check(model, asked)
    inner = unwrapped(model)
    for_g, for_h = _divided(inner, list(batches), hessian_batches)
    places, n_hessian = _agreed(inner, for_g, for_h, asked, ranks)
    with still(inner, dropout=False):
        found = read(inner, for_g, for_h, asked, loss, places=places, n_hessian=n_hessian)
    return ranks.all(found)[0]


def _check(model: nn.Module, asked: Asked) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module is needed")
    for name, value, least in (
        ("probes", asked.probes, 2),
        ("parts", 1 if asked.parts is None else asked.parts, 1),
        ("spectrum", asked.spectrum, 0),
    ):
        check_whole(name, value, least, error=CurvatureError)
    for name, value, known in (
        ("operator", asked.operator, OPERATORS),
        ("method", asked.method, ("auto", *METHODS)),
    ):
        check_choice(name, value, known, CurvatureError)
    if not isinstance(asked.contributions, bool):
        raise CurvatureError(f"contributions is {asked.contributions!r}; True or False is needed")
    if not 0 < asked.level < 1:
        raise CurvatureError(f"level is {asked.level}; a coverage in (0, 1) is needed, e.g. 0.95")
    if (why := _apart(model)) is not None:
        raise CurvatureError(why)
    if (hooked := gradient_hook(model)) is not None:
        raise CurvatureError(hooked)


def _divided(
    model: nn.Module, batches: list[Any], hessian_batches: int | Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """Tell the batches for g from those for H, on the model's device.

    Raises:
        CurvatureError: one of the two has none.
    """
    if isinstance(hessian_batches, int):
        k = hessian_batches
        if isinstance(k, bool) or k < 1:
            raise CurvatureError(
                f"hessian_batches is {k!r}; 1 or more are needed: H needs examples of its own"
            )
        if len(batches) <= k:
            raise CurvatureError(
                f"{len(batches)} batch(es), {k} of them for H; at least {k + 1} are needed, since H must not "
                "be taken on the examples of g. Cut your batch in two"
            )
        for_g, for_h = batches[:-k], batches[-k:]
    else:
        for_g, for_h = batches, list(hessian_batches)
    if not for_g or not for_h:
        raise CurvatureError("no batch for g, or none for H; at least one of each is needed")
    devices = {p.device for p in model.parameters()}
    if len(devices) == 1:
        device = devices.pop()
        return [moved(b, device) for b in for_g], [moved(b, device) for b in for_h]
    return for_g, for_h


def _apart(model: nn.Module) -> str | None:
    """Say that an engine has taken the parameters apart, or None."""
    cut = [name for name, p in model.named_parameters() if is_sharded(p)]
    if refusal(model) is None and not cut:
        return None
    which = f"parameter `{cut[0]}`" if cut else "a parameter"
    return (
        f"{which} is sharded over ranks (fully_shard, FSDP or ZeRO-3); B_noise is measured on whole ones: "
        "take DDP, or save a checkpoint and measure it in one process"
    )


def _agreed(
    model: nn.Module, for_g: Sequence[Any], for_h: Sequence[Any], asked: Asked, ranks: Alone
) -> tuple[Places, int]:
    """Tell the ranks of one another's batches.

    Returns:
        Where those for g stand among all, and how many there are for H.

    Raises:
        CurvatureError: ranks ask for different things, or the same examples come twice.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    shapes = [(name, tuple(p.shape)) for name, p in named]
    bits = digest(p for _, p in named) if ranks.size > 1 else ""
    wanted = replace(asked, segments=asked.segments if isinstance(asked.segments, str) else None)
    prints = [fingerprint(b) for b in for_g], [fingerprint(b) for b in for_h]
    found = ranks.all((shapes, wanted, bits, prints))
    for rank, (others, other, theirs, _) in enumerate(found):
        if others != found[0][0] or other != found[0][1]:
            what = "trainable parameters" if others != found[0][0] else "arguments"
            raise CurvatureError(f"ranks 0 and {rank} have other {what}; B_noise is of the same on all ranks")
        if theirs != found[0][2]:
            raise CurvatureError(
                f"ranks 0 and {rank} have other weights; B_noise is of one point: load the same on all ranks"
            )
    counts = [len(g) for *_, (g, _) in found]
    places, total = Places(counts, ranks), sum(len(h) for *_, (_, h) in found)
    _fresh([g for *_, (g, _) in found], [h for *_, (_, h) in found])
    return places, total


def _fresh(for_g: Sequence[Sequence[Any]], for_h: Sequence[Sequence[Any]]) -> None:
    """Refuse examples that come twice; batches are given as fingerprints, by rank.

    Raises:
        CurvatureError: some do.
    """
    prints = [p for of_rank in for_g for p in of_rank if p is not None]
    known = set(prints)
    if len(known) < len(prints):
        apart = ", on every rank its own" if len(for_g) > 1 else ""
        raise CurvatureError(
            "two batches for g have the same examples; GᵀHG comes from pairs of two examples: give others"
            + apart
        )
    for rank, of_rank in enumerate(for_h):
        for number, batch in enumerate(of_rank):
            if batch in known:
                where = f" of rank {rank}" if len(for_h) > 1 else ""
                raise CurvatureError(
                    f"batch {number} for H{where} has the same examples as one for g, which makes tr(HΣ) too "
                    "large; give H other examples"
                )


def read(
    model: nn.Module,
    for_g: Sequence[Any],
    for_h: Sequence[Any],
    asked: Asked,
    loss: Loss | None,
    *,
    signs: np.ndarray | None = None,
    places: Places | None = None,
    n_hessian: int | None = None,
) -> CurvatureEstimate:
    """Make one reading of a model that is held still.

    Args:
        model: the model.
        for_g: batches for gradients.
        for_h: batches for H.
        asked: how.
        loss: as in `b_noise`.
        signs: [S, N], instead of random ones.
        places: of the batches for g among those of all ranks; None: there are no others.
        n_hessian: batches for H over all ranks; None: there are no others.
    """
    ranks = Alone() if places is None else places.ranks
    start = time.perf_counter()
    how = {"weights": asked.weights, "segments": asked.segments}
    sums = gather(model, for_g, loss, probes=asked.probes, seed=asked.seed, signs=signs, places=places, **how)
    gathered = time.perf_counter()
    every = dict(model.named_parameters(remove_duplicate=False))
    point = Point(model, {n: every[n] for n in sums.names}, loss, seed=asked.seed, **how)
    whole = asked.segments is not None  # rows of one example stay together
    cut = pieces(for_h, asked.parts, whole=whole, total=n_hessian)
    found = _contracted(point, cut, sums, asked, ranks)
    said = {"level": asked.level, "operator": asked.operator, "seed": asked.seed}
    result = concluded(sums, found, contributions=asked.contributions, **said)
    if asked.blocks:
        result = replace(result, blocks=_blocks(point, cut, sums, asked, ranks))
    if asked.spectrum:
        trace, largest = _spectrum(point, cut, sums, asked, found.method, ranks)
        result = replace(result, trace_h=trace, largest_eigenvalue=largest)
    end = time.perf_counter()
    return replace(result, cost=Cost(end - start, gathered - start, len(for_g), found.products))


def _contracted(point: Point, cut: Sequence[Any], sums: Sums, asked: Asked, ranks: Alone) -> Contractions:
    """The contractions on the parts of all ranks, their products made in one way."""
    how = {"operator": asked.operator, "contributions": asked.contributions}
    own = contract(point, cut, sums, method=asked.method, **how)
    found = ranks.all(own)
    if len({c.method for c in found}) > 1:  # some ranks found no second derivative
        if own.method == "exact":
            own = contract(point, cut, sums, method="difference", **how)
        found = ranks.all(own)
    return joined(found)


def _blocks(point: Point, cut: Sequence[Any], sums: Sums, asked: Asked, ranks: Alone) -> dict[str, Block]:
    """Each factor as if it alone trained."""
    out, asked = {}, replace(asked, contributions=False)
    for factor in dict.fromkeys(map(factor_or_other, sums.names)):
        names = [n for n in sums.names if factor_or_other(n) == factor]
        if not any(sums.sq[n] > 0 for n in names):
            continue
        part = sums.of(names)
        alone = replace(point, parameters={n: point.parameters[n] for n in names}, _kept={})
        found = _contracted(alone, cut, part, asked, ranks)
        s = set_of(found, known_of(part, identity(part)), asked.level)
        out[factor] = Block(s.ratio, s.low, s.high, s.status, s.x, s.y)
    return out


def _spectrum(
    point: Point, cut: Sequence[Any], sums: Sums, asked: Asked, method: str, ranks: Alone
) -> tuple[float, float]:
    """Give tr H (one random vector) and λ_max, over all parts."""
    build = Builder(point, asked.operator, "auto" if asked.operator == "ggn" else _gradients(method))

    def product(vector: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """H v over all parts, each by its mass."""
        total = {name: torch.zeros_like(v) for name, v in vector.items()}
        mass = 0.0
        for piece in cut:
            part = build(piece)
            if part.mass > 0:
                mass += part.mass
                for name, v in part.product(vector).items():
                    total[name] = total[name] + part.mass * v
        mass = sum(ranks.all(mass))
        ranks.add(total)
        return {name: v / mass for name, v in total.items()}

    trace, largest = lanczos(product, sums.mean, asked.spectrum, asked.seed)
    if not math.isfinite(trace):
        raise CurvatureError("tr H is not finite; take method='exact'")
    return trace, largest


def _gradients(method: str) -> str:
    """The method for products that are needed as vectors."""
    return "difference" if method == "forward" else method
