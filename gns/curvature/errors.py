"""What goes wrong with a curvature, in one kind of error."""

from __future__ import annotations


class CurvatureError(ValueError):
    """A curvature cannot be measured as asked; the message says what to change."""
