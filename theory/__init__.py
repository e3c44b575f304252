"""What the gradient noise scale must be: derived, in closed form, and simulated. No torch, no gns.

    theory.lemma        Lemma 4.1 of arXiv:2602.09492 as symbolic steps that check themselves
    theory.laws         the exact laws around it, one flat face over modules of one idea each
    theory.montecarlo   seeded simulation of the same quantities, in bounded memory
    theory.verdict      when simulation and formula agree, at one false-alarm rate

Letters: r rank, N (argument `n`) examples in a data set or step, d dimension, S covariance of the per-example
gradients, G true gradient, ḡ their mean over the data, SNR = |w|²/s². Importing this package does no work;
import the module you need.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from theory import laws, lemma, montecarlo, verdict

__all__ = ["laws", "lemma", "montecarlo", "verdict"]


def __getattr__(name: str) -> ModuleType:
    """The submodules of `__all__`, imported when first asked for.

    Raises:
        AttributeError: for any other name; the message lists them.
    """
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
