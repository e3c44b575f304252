"""The noisy quadratic: a model small enough to solve, in which B_crit and the noise scale can be compared.

L(w) = ½ Σ hⱼwⱼ², per-example gradient Hw + ξ with Cov(ξ) = diag(c), independent of w. SGD with batch B:

    wⱼ ← wⱼ - ε(hⱼwⱼ + ξⱼ/√B),      E[wⱼ²] ← (1-εhⱼ)² E[wⱼ²] + ε²cⱼ/B

so the expected loss after S steps is exact, by a closed form for a constant rate and a recursion for a cosine
one. No sampling anywhere. What the model leaves out: curvature that changes, noise that depends on w,
momentum, Adam. It has no interior optimum of the batch size: at equal examples the smallest batch is best.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from theory.domain import Floats, choice, count, finite, finite_array, like, positive, spectrum, vector

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class NoisyQuadratic:
    """Curvature, noise and start of the model, all in the eigenbasis of the Hessian.

    Attributes:
        curvature: [d], hⱼ > 0.
        noise: [d], cⱼ >= 0, per-example gradient variance.
        start: [d], E[wⱼ²] at step 0, >= 0.
        rates: [m], learning rates to search, increasing, between 0 and the edge of stability 2/h_max.

    Raises:
        ValueError: if an array is outside its domain or the lengths differ.
    """

    curvature: Floats
    noise: Floats
    start: Floats
    rates: Floats = field(repr=False)

    @classmethod
    def power_law(
        cls, d: int, exponent: float = 1.0, noise: float = 1.0, rates: int = 160
    ) -> "NoisyQuadratic":
        """hⱼ = j^(-exponent), cⱼ = noise · hⱼ (as in regression), w₀ⱼ² = 1.

        Args:
            d: dimension, >= 1.
            exponent: decay of the curvature, finite.
            noise: ratio of noise to curvature, > 0.
            rates: number of learning rates in the search grid, >= 2.

        Returns:
            The model; learning rates are searched on a grid even in logit(ε·h_max/2), from 6e-6 to 0.993 of
            the edge of stability 2/h_max: even in log ε for small rates, fine near the edge, where the loss
            turns sharply (a plain log grid puts kinks of 15 % into the curves there).

        Raises:
            ValueError: if an argument is outside its domain.
        """
        h = np.arange(1, count("d", d) + 1, dtype=float) ** -finite("exponent", exponent)
        logit = np.linspace(-12.0, 5.0, count("rates", rates, 2))
        grid = (
            2 / h.max() / (1 + np.exp(-logit))
        )  # dense at both ends: small batches, and the edge of stability
        return cls(h, positive("noise", noise) * h, np.ones(d), grid)

    def __post_init__(self) -> None:
        h = spectrum("curvature", self.curvature)
        c = spectrum("noise", like("noise", self.noise, "curvature", h))
        m, rates = like("start", self.start, "curvature", h), vector("rates", self.rates)
        if np.any(h <= 0):
            raise ValueError(f"curvature: needs numbers > 0, got {float(h.min())!r}")
        if np.any(m < 0) or not np.any(m > 0):
            raise ValueError(f"start: needs numbers >= 0, one of them > 0, got {m.tolist()}")
        if np.any(np.diff(rates) <= 0) or rates[0] <= 0 or rates[-1] >= 2 / h.max():
            domain = f"increasing numbers in (0, 2/h_max = {2 / h.max():g})"
            raise ValueError(f"rates: needs {domain}, got {float(rates[0])!r} to {float(rates[-1])!r}")
        for name, value in (("curvature", h), ("noise", c), ("start", m), ("rates", rates)):
            object.__setattr__(self, name, value)

    def loss(self, second: ArrayLike) -> Floats:
        """½ Σ hⱼ E[wⱼ²] over the last axis."""
        return 0.5 * self._state(second) @ self.curvature

    def b_simple(self, second: ArrayLike) -> Floats:
        """trΣ/E|G|² = Σcⱼ / Σhⱼ²E[wⱼ²], over the last axis, in examples."""
        return self.noise.sum() / (self._state(second, least=1e-300) @ self.curvature**2)

    def b_noise(self, second: ArrayLike) -> Floats:
        """tr(HΣ)/E[GᵀHG] = Σhⱼcⱼ / Σhⱼ³E[wⱼ²], over the last axis, in examples."""
        return (self.curvature @ self.noise) / (self._state(second, least=1e-300) @ self.curvature**3)

    def _state(self, second: ArrayLike, least: float = 0.0) -> Floats:
        """E[wⱼ²] of one or more states.

        Raises:
            ValueError: if the last axis is not the model's, a value is negative, or a sum below `least`.
        """
        state = finite_array("second", second)
        if state.ndim == 0 or state.shape[-1] != self.curvature.size:
            raise ValueError(f"second: needs [..., {self.curvature.size}], got shape {state.shape}")
        if np.any(state < 0) or np.any(state.sum(-1) < least):
            raise ValueError(f"second: needs numbers >= 0, not all zero, got {state.min()!r}")
        return state

    def after_constant(self, steps: ArrayLike, batch: ArrayLike, rate: ArrayLike) -> Floats:
        """E[wⱼ²] after S steps at a constant rate: aˢm₀ + (ε²c/B)(1-aˢ)/(1-a), a = (1-εh)².

        Args:
            steps: S >= 0, need not be whole.
            batch: B > 0.
            rate: ε, 0 < ε < 2/h_max; the three broadcast against one another.

        Returns:
            [..., d].

        Raises:
            ValueError: if an argument is outside its domain.
        """
        s, b, eps = (
            finite_array(name, v)[..., None]
            for name, v in (("steps", steps), ("batch", batch), ("rate", rate))
        )
        if np.any(s < 0):
            raise ValueError(f"steps: needs numbers >= 0, got {float(s.min())!r}")
        if np.any(b <= 0):
            raise ValueError(f"batch: needs numbers > 0, got {float(b.min())!r}")
        self._check_rates("rate", eps)
        x = eps * self.curvature
        with np.errstate(divide="ignore"):
            log_decay = s * np.maximum(2 * np.log(np.abs(1 - x)), -700.0)
        log_decay = np.where(x < 0.5, 2 * s * np.log1p(-np.minimum(x, 0.5)), log_decay)
        gained = -np.expm1(log_decay) / (self.curvature * (2 - x))  # ε(1-aˢ)/(1-a), 1-a = εh(2-εh)
        return np.exp(log_decay) * self.start + eps * self.noise / b * gained

    def _check_rates(self, name: str, rates: Floats) -> None:
        """Learning rates between zero and the edge of stability.

        Raises:
            ValueError: if one is not.
        """
        edge = 2 / float(self.curvature.max())
        if np.any(rates <= 0) or np.any(rates >= edge):
            seen = float(rates.min() if np.any(rates <= 0) else rates.max())
            raise ValueError(f"{name}: needs numbers in (0, 2/h_max = {edge:g}), got {seen!r}")

    def after_cosine(self, steps: int, batch: float, rates: ArrayLike) -> Floats:
        """E[wⱼ²] after S steps whose rate falls from ε to 0 as ½ε(1+cos(πk/S)), k = 0..S-1.

        Args:
            steps: S, >= 1.
            batch: B > 0.
            rates: [m], peak rates.

        Returns:
            [m, d].

        Raises:
            ValueError: if an argument is outside its domain.
        """
        eps, s = vector("rates", rates)[:, None], count("steps", steps)
        self._check_rates("rates", eps)
        second = np.broadcast_to(self.start, (eps.shape[0], self.start.size)).copy()
        gain, kick = eps * self.curvature, eps**2 * self.noise / positive("batch", batch)
        for factor in 0.5 * (1 + np.cos(np.pi * np.arange(s) / s)):
            second *= (1 - factor * gain) ** 2
            second += factor**2 * kick
        return second

    def best_loss(self, examples: float, batch: float, schedule: str = "constant") -> float:
        """Loss after one pass over `examples` in batches of `batch`, at the best rate of the grid.

        The minimum over the grid is refined by a parabola through its neighbours.

        Args:
            examples: E, > 0.
            batch: B, > 0, at most E; the number of steps is E/B, rounded for the cosine.
            schedule: "constant" or "cosine".

        Returns:
            Expected excess loss.

        Raises:
            ValueError: if an argument is outside its domain.
        """
        e, b = positive("examples", examples), positive("batch", batch)
        if b > e:
            raise ValueError(f"batch: needs at most examples = {e:g}, got {batch!r}")
        if choice("schedule", schedule, SCHEDULES) == "constant":
            losses = self.loss(self.after_constant(e / b, b, self.rates))
        else:
            losses = self.loss(self.after_cosine(max(1, round(e / b)), b, self.rates))
        return float(np.exp(_parabola_minimum(np.log(losses))))

    def steps_to(self, target: float, batch: float) -> float:
        """Fewest steps to the target loss at one batch size, best constant rate; real-valued.

        Args:
            target: expected excess loss, > 0 and below the start.
            batch: B, > 0.

        Returns:
            S(B); `inf` if no rate of the grid gets there in 10⁹ steps.

        Raises:
            ValueError: if an argument is outside its domain.
        """
        b, goal = positive("batch", batch), positive("target", target)
        begin = float(self.loss(self.start))
        if goal >= begin:
            raise ValueError(f"target: needs a loss below the start's {begin:g}, got {target!r}")
        low, high = np.zeros_like(self.rates), np.full_like(self.rates, np.log(1e9))
        reachable = self.loss(self.after_constant(np.exp(high), b, self.rates)) <= goal
        for _ in range(50):
            middle = 0.5 * (low + high)
            done = self.loss(self.after_constant(np.exp(middle), b, self.rates)) <= goal
            low, high = np.where(done, low, middle), np.where(done, middle, high)
        if not reachable.any():
            return float("inf")
        return float(np.exp(_parabola_minimum(np.where(reachable, high, np.log(1e9)))))

    def trajectory(self, target: float, batch: float) -> Floats:
        """E[wⱼ²] at every step of the fastest run to the target at one batch size.

        Args:
            target: expected excess loss, > 0.
            batch: B, > 0.

        Returns:
            [S, d], the state before each step.

        Raises:
            ValueError: if the target is out of reach.
        """
        b = positive("batch", batch)
        length = self.steps_to(target, b)
        if not np.isfinite(length):
            raise ValueError(f"target: needs a loss within reach at batch {b}, got {target!r}")
        s = int(np.ceil(length))
        best = int(np.argmin(self.loss(self.after_constant(float(s), b, self.rates))))
        return self.after_constant(np.arange(s), b, self.rates[best])


def _parabola_minimum(values: Floats) -> float:
    """Minimum of equally spaced values, refined by the parabola through the lowest three."""
    i = int(np.argmin(values))
    if not 0 < i < values.size - 1:
        return float(values[i])
    left, mid, right = values[i - 1 : i + 2]
    bend = left - 2 * mid + right
    return float(mid - (left - right) ** 2 / (8 * bend)) if bend > 0 else float(mid)
