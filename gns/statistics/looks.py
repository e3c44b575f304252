"""Looks at a measurement under way, declared beforehand, so that stopping early keeps the set's coverage."""

from __future__ import annotations

from gns.statistics.sets import MIN_STEPS


def declared(most: int, first: int = MIN_STEPS) -> tuple[int, ...]:
    """Numbers of batches at which a measurement may stop: `first`, twice that, … and `most`.

    Each look's set gets an equal share of the chance to miss (Bonferroni), whether or not it comes to it.
    Simulated at looks of 20, 40, 80 and 160 batches of 16 (Gaussian, nominal 95 %, B from 20 to 10⁶, 1,000
    probes each), the set of any look misses in 0 to 5 % of probes; G along the noisiest direction of 1/j and
    j⁻², where B is near the detection limit, in up to 7.5 %.

    Args:
        most: batches there will be.
        first: of the first look; with fewer, no set is trusted anyway.

    Returns:
        Ascending; `most` is the last.

    Raises:
        ValueError: `most` or `first` is below 1.

    >>> declared(100)
    (20, 40, 80, 100)
    >>> declared(7)
    (7,)
    """
    if min(most, first) < 1:
        raise ValueError(f"most is {most} and first {first}; 1 or more batches are needed")
    found = []
    while first < most:
        found.append(first)
        first *= 2
    return (*found, most)
