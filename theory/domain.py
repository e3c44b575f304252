"""Argument checks: every bad value is refused by name, with what was seen and what is allowed.

A theory that silently returns `nan` for N = 1 or a negative eigenvalue teaches the reader a wrong
number, so each public function sends its arguments through here first. `ValueError` is always the
type, and the text always has the form `name: needs <domain>, got <value>`.
"""

from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def _text(name: str, domain: str, seen: object) -> str:
    return f"{name}: needs {domain}, got {seen!r}"


def _as_number(name: str, domain: str, value: Any) -> float:
    """The value as a float.

    Raises:
        ValueError: if it is not one number: text, truth values, arrays, and what no float can hold.
    """
    scalar = value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if isinstance(scalar, bool | np.bool_) or not isinstance(scalar, Real):
        raise ValueError(_text(name, domain, value))
    try:
        return float(scalar)
    except OverflowError:
        raise ValueError(_text(name, domain + " that a float can hold", value)) from None


def positive(name: str, value: float) -> float:
    """A finite number > 0.

    Args:
        name: the argument's name, for the message.
        value: what the caller passed.

    Returns:
        The value as a float.

    Raises:
        ValueError: if it is zero, negative, infinite or nan.
    """
    domain = "a finite number > 0"
    number = _as_number(name, domain, value)
    if not (np.isfinite(number) and number > 0):
        raise ValueError(_text(name, domain, value))
    return number


def non_negative(name: str, value: float) -> float:
    """A finite number >= 0; see `positive` for the arguments.

    Raises:
        ValueError: if it is negative, infinite or nan.
    """
    domain = "a finite number >= 0"
    number = _as_number(name, domain, value)
    if not (np.isfinite(number) and number >= 0):
        raise ValueError(_text(name, domain, value))
    return number


def finite(name: str, value: float) -> float:
    """A finite number of either sign; see `positive` for the arguments.

    Raises:
        ValueError: if it is infinite or nan.
    """
    domain = "a finite number"
    number = _as_number(name, domain, value)
    if not np.isfinite(number):
        raise ValueError(_text(name, domain, value))
    return number


def count(name: str, value: int, least: int = 1) -> int:
    """A whole number >= `least`; a float that is whole (1e9) is accepted.

    Args:
        name: the argument's name, for the message.
        value: what the caller passed.
        least: smallest allowed value.

    Returns:
        The value as an int.

    Raises:
        ValueError: if it is smaller, not whole, or not finite.
    """
    domain = f"a whole number >= {least}"
    number = _as_number(name, domain, value)
    if not (np.isfinite(number) and number == int(number) and number >= least):
        raise ValueError(_text(name, domain, value))
    return int(number) if isinstance(value, float) else int(value)


def seed(name: str, value: int | np.random.Generator) -> int | np.random.Generator:
    """A seed: a whole number >= 0, or a generator to go on drawing from.

    Args:
        name: the argument's name, for the message.
        value: what the caller passed.

    Returns:
        The same, ready for `numpy.random.default_rng`.

    Raises:
        ValueError: if it is neither.
    """
    return value if isinstance(value, np.random.Generator) else count(name, value, 0)


def probability(name: str, value: float) -> float:
    """A number strictly between 0 and 1; see `positive` for the arguments.

    Raises:
        ValueError: if it is outside (0, 1).
    """
    domain = "a number in (0, 1)"
    number = _as_number(name, domain, value)
    if not 0 < number < 1:
        raise ValueError(_text(name, domain, value))
    return number


def choice(name: str, value: str, allowed: Iterable[str]) -> str:
    """One of the allowed words.

    Args:
        name: the argument's name, for the message.
        value: what the caller passed.
        allowed: the words.

    Returns:
        The value itself.

    Raises:
        ValueError: if it is not one of them; the message lists them.
    """
    words = sorted(allowed)
    if value not in words:
        raise ValueError(_text(name, "one of " + ", ".join(words), value))
    return value


def real_array(name: str, values: ArrayLike) -> Floats:
    """Real numbers in an array of any shape; text, truth values and ragged lists are no numbers.

    Args:
        name: the argument's name, for the message.
        values: what the caller passed.

    Returns:
        The same numbers, float64, nan and inf included.

    Raises:
        ValueError: if it is not an array of real numbers.
    """
    domain = "an array of real numbers"
    try:
        array = np.asarray(values)
        if array.dtype.kind == "O" and all(isinstance(v, Real) and type(v) is not bool for v in array.flat):
            array = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(_text(name, domain, values)) from None
    if array.dtype.kind not in "iuf":
        raise ValueError(_text(name, domain, values))
    return array.astype(np.float64)


def finite_array(name: str, values: ArrayLike) -> Floats:
    """Finite real numbers in an array of any shape; see `real_array` for the arguments.

    Raises:
        ValueError: if it holds inf, nan or anything that is no number.
    """
    array = real_array(name, values)
    if not np.all(np.isfinite(array)):
        raise ValueError(_text(name, "finite numbers", float(array[~np.isfinite(array)][0])))
    return array


def matrix(name: str, values: ArrayLike, square: bool = False) -> Floats:
    """A finite matrix, or a stack of square ones.

    Args:
        name: the argument's name, for the message.
        values: what the caller passed.
        square: the last two axes have to be equal; leading axes are then allowed.

    Returns:
        [rows, columns], or [..., n, n], float64.

    Raises:
        ValueError: if the shape is another, or a value is not finite.
    """
    array = finite_array(name, values)
    if square and (array.ndim < 2 or array.shape[-1] != array.shape[-2]):
        raise ValueError(_text(name, "a square matrix", array.shape))
    if not square and (array.ndim != 2 or array.size == 0):
        raise ValueError(_text(name, "a matrix", array.shape))
    return array


def vector(name: str, values: ArrayLike, least: int = 1) -> Floats:
    """A one-dimensional array of at least `least` finite numbers.

    Args:
        name: the argument's name, for the message.
        values: what the caller passed.
        least: smallest allowed length.

    Returns:
        [d], float64.

    Raises:
        ValueError: if it is not one-dimensional, too short, or holds inf or nan.
    """
    array = finite_array(name, values)
    if array.ndim != 1 or array.size < least:
        raise ValueError(_text(name, f"a one-dimensional array of length >= {least}", array.shape))
    return array


def like(name: str, values: ArrayLike, other: str, pattern: Floats) -> Floats:
    """A vector of the same length as another.

    Args:
        name: the argument's name, for the message.
        values: what the caller passed.
        other: name of the vector it goes with.
        pattern: that vector, checked.

    Returns:
        [d], float64.

    Raises:
        ValueError: if the lengths differ, or it is no finite vector.
    """
    array = vector(name, values)
    if array.shape != pattern.shape:
        raise ValueError(_text(name, f"{pattern.size} numbers, one for each of {other}", array.size))
    return array


def spectrum(name: str, eigenvalues: ArrayLike) -> Floats:
    """Eigenvalues of a covariance: finite, none negative, at least one positive.

    Args:
        name: the argument's name, for the message.
        eigenvalues: what the caller passed, in any order.

    Returns:
        [d], float64, in the caller's order.

    Raises:
        ValueError: if one is negative or not finite, or if all are zero.
    """
    array = vector(name, eigenvalues)
    if np.any(array < 0):
        raise ValueError(_text(name, "eigenvalues >= 0", float(array.min())))
    if not np.any(array > 0):
        raise ValueError(_text(name, "at least one eigenvalue > 0", "all zero"))
    return array


def sorted_sizes(name: str, values: ArrayLike) -> Floats:
    """Strictly increasing positive sizes (batches, data-set sizes).

    Args:
        name: the argument's name, for the message.
        values: what the caller passed.

    Returns:
        [k], float64.

    Raises:
        ValueError: if they are not positive or not strictly increasing.
    """
    array = vector(name, values)
    if np.any(array <= 0) or np.any(np.diff(array) <= 0):
        raise ValueError(_text(name, "strictly increasing numbers > 0", array.tolist()))
    return array
