"""Per-example gradient rules: one file a layer kind, one pure function each, and their registry."""

from gns.rules.base import Rule, known_kinds, register, rule_for
from gns.rules.linear import LINEAR

__all__ = ["LINEAR", "Rule", "known_kinds", "register", "rule_for"]
