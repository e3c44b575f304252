"""What a symbolic proof is made of: a step that states a formula and can check it, and χ² integrals.

The check of a step derives its formula by another route than the one that wrote it down, and takes the
claimed formula as an argument, so that a test can put a wrong one in and see it refused.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy as sp

Formula = Any  # a sympy expression; sympy's annotations lose Expr in most operations

r = sp.Symbol("r", positive=True)
N = sp.Symbol("N", positive=True)
s = sp.Symbol("s", positive=True)  # argument of Laplace transforms E[exp(-s Q)]
u = sp.Symbol("u", real=True)  # argument of moment generating functions E[exp(u g)]
q, z = sp.symbols("q z", positive=True)

PAPER = "arXiv:2602.09492, Lemma 4.1"


@dataclass(frozen=True)
class Step:
    """One line of the proof.

    Attributes:
        name: short name, unique in the derivation.
        statement: the claim in words.
        assumes: what has to hold for it.
        symbol: left-hand side, as LaTeX.
        formula: right-hand side, symbolic.
        route: how the check arrives at the same formula.
        source: where the paper (or a textbook) has it.
    """

    name: str
    statement: str
    assumes: tuple[str, ...]
    symbol: str
    formula: Formula
    route: str
    check: Callable[[Formula], bool] = field(repr=False, compare=False)
    source: str = PAPER

    def holds(self, claim: Formula | None = None) -> bool:
        """Whether a formula survives the check.

        Args:
            claim: the formula to put to the check; the step's own if left out.

        Returns:
            True if the independent route gives the same.
        """
        return bool(self.check(self.formula if claim is None else claim))

    def __str__(self) -> str:
        assumed = "; ".join(self.assumes)
        return f"{self.name}: {self.statement}\n  {self.formula}\n  assumes: {assumed}\n  check: {self.route}"

    def _repr_markdown_(self) -> str:
        assumed = "; ".join(self.assumes)
        tick = "✓" if self.holds() else "✗"
        return (
            f"**{self.name}.** {self.statement}\n\n$${self.symbol} = {sp.latex(self.formula)}$$\n\n"
            f"*Assumes:* {assumed}. *Check {tick}:* {self.route}."
        )


def chi_square_density(dof: Formula) -> Formula:
    """Density of χ² at q: q^(k/2-1) e^(-q/2) / (2^(k/2) Γ(k/2)).

    Args:
        dof: degrees of freedom k, symbolic or a number.

    Returns:
        An expression in the symbol q.
    """
    return q ** (dof / 2 - 1) * sp.exp(-q / 2) / (2 ** (dof / 2) * sp.gamma(dof / 2))


def same(a: Formula, b: Formula) -> bool:
    """Whether two formulas are equal, after simplification."""
    return sp.simplify(sp.gammasimp(sp.expand_func(a - b))) == 0


def gaussian_mean(value: Formula, variable: sp.Symbol) -> Formula:
    """E of an expression in one standard normal variable."""
    density = sp.exp(-(variable**2) / 2) / sp.sqrt(2 * sp.pi)
    return sp.simplify(sp.integrate(value * density, (variable, -sp.oo, sp.oo)))


def chi_square_mean(value: Formula, dof: Formula) -> Formula:
    """E of an expression in q ~ χ²; a Piecewise is returned with its existence condition."""
    return sp.integrate(sp.powsimp(value * chi_square_density(dof)), (q, 0, sp.oo))


def convergent_branch(expression: Formula) -> Formula:
    """The convergent branch of a conditional integral."""
    found = expression.atoms(sp.Piecewise)
    return expression.replace(lambda e: e in found, lambda e: e.args[0][0]) if found else expression
