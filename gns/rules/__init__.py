"""Per-example gradient rules: one file a layer kind, one pure function each, and their registry."""

from gns.rules.base import Rule, known_kinds, register, rule_for
from gns.rules.conv import CONV
from gns.rules.conv1d import CONV1D
from gns.rules.dora import DORA
from gns.rules.elementwise import ELEMENTWISE
from gns.rules.embedding import EMBEDDING
from gns.rules.linear import LINEAR
from gns.rules.lora_embedding import LORA_EMBEDDING

__all__ = [
    "CONV",
    "CONV1D",
    "DORA",
    "ELEMENTWISE",
    "EMBEDDING",
    "LINEAR",
    "LORA_EMBEDDING",
    "Rule",
    "known_kinds",
    "register",
    "rule_for",
]
