"""Which trainable parameters are in the sums, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Coverage:
    """What `monitor.coverage()` returns.

    Args:
        measured: trainable parameters in the sums, name → number of scalars.
        unmeasured: trainable parameters left out of both sums, name → number of scalars.
        reasons: for each name in `unmeasured`, why it is left out.
        verified: measured parameters whose contributions have summed to their gradient in a self-check.
        stopped: the error after which the monitor stood down, or None.
        shared: measured weights whose gradient has come out of the product of their norms, see
            `gns.capture.sharing`; None where that was not asked for.
    """

    measured: Mapping[str, int]
    unmeasured: Mapping[str, int]
    reasons: Mapping[str, str]
    verified: frozenset[str] = frozenset()
    stopped: str | None = None
    shared: frozenset[str] | None = None

    @property
    def share(self) -> float:
        """Share of the trainable scalars that is in the sums, 0 … 1."""
        inside, outside = sum(self.measured.values()), sum(self.unmeasured.values())
        return inside / (inside + outside) if inside + outside else 0.0

    def __str__(self) -> str:
        total = len(self.measured) + len(self.unmeasured)
        lines = [
            f"{len(self.measured)} of {total} trainable parameters measured "
            f"({100 * self.share:.4g} % of their scalars), {len(self.verified)} verified by the self-check"
        ]
        lines += [f"  not measured: {name}: {self.reasons[name]}" for name in self.unmeasured]
        if self.shared is not None:
            lines.append(f"  gradient out of the same product as the norms: {len(self.shared)} parameters")
        if self.stopped is not None:
            lines.append(f"  measuring stopped: {self.stopped}")
        return "\n".join(lines)
