"""Gradient noise scale: what batch size pays when you fine-tune with LoRA, and how sure that number is.

Letters used throughout: B examples in a forward pass, T tokens, I in-features, O out-features, R LoRA
rank, n examples in one optimizer step. Importing this package does no work: names load when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gns._version import __version__

if TYPE_CHECKING:
    from gns.advice import Advice, advise
    from gns.coverage import Coverage
    from gns.curvature.result import CurvatureEstimate
    from gns.estimate import Estimate
    from gns.frozen import probe
    from gns.hessian import b_noise
    from gns.integrations.transformers import GNSCallback
    from gns.monitor import GNSMonitor
    from gns.probing.result import FrozenEstimate
    from gns.records import load
    from gns.sums import StepSums

_HOME = {
    # measure
    "GNSMonitor": "gns.monitor",
    "GNSCallback": "gns.integrations.transformers",
    "Coverage": "gns.coverage",
    "probe": "gns.frozen",
    "b_noise": "gns.hessian",
    # what was measured
    "StepSums": "gns.sums",
    "Estimate": "gns.estimate",
    "FrozenEstimate": "gns.probing.result",
    "CurvatureEstimate": "gns.curvature.result",
    "load": "gns.records",
    # what to do about it
    "advise": "gns.advice",
    "Advice": "gns.advice",
}

__all__ = [
    "Advice",
    "Coverage",
    "CurvatureEstimate",
    "Estimate",
    "FrozenEstimate",
    "GNSCallback",
    "GNSMonitor",
    "StepSums",
    "__version__",
    "advise",
    "b_noise",
    "load",
    "probe",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module.

    Raises:
        AttributeError: there is no such name.
    """
    if name not in _HOME:
        raise AttributeError(f"module 'gns' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
