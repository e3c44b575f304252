"""Which trainable parameter is measured by which taps, and which is not and why: decided once, at attach."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import Tensor, nn

from gns.capture.gather import EmbeddingTie, Gather
from gns.reducers import MAX_BYTES
from gns.rules import EMBEDDING, LINEAR, Rule, known_kinds, rule_for
from gns.rules.base import parameter_of
from gns.taps import Tap


@dataclass
class Entry:
    """A measured parameter.

    Args:
        name: its name in the model (the first, if it is tied).
        sites: the taps that see its uses, each with the parameter's name in that layer.
        scalars: number of its entries.
    """

    name: str
    sites: list[tuple[Tap, str]]
    scalars: int
    left_out: bool = False  # it does not count in the norms of single examples
    blocks: bool = False  # a metric weighs its entries, so that blocks must be formed

    @property
    def parameter(self) -> Tensor:
        """The parameter as it is now."""
        tap, local = self.sites[0]
        found = tap.module._parameters.get(local)  # asked several times a step
        return tap.parameter(local) if found is None else found

    @property
    def gathered(self) -> bool:
        """Whether its uses are added before they are squared."""
        tap, local = self.sites[0]
        return local in tap.gathers

    @property
    def meeting(self) -> Gather | None:
        """Where its uses meet, if they are gathered."""
        tap, local = self.sites[0]
        return tap.gathers.get(local)

    def gather(self) -> None:
        """From now on add the blocks of all uses in one call of the model before squaring.

        An embedding tied to a linear head meets it in a form that needs no table an example; asked once more,
        because the model uses one of them twice, both go over to the general form.
        """
        tie = None if self.gathered or self.blocks else self._tie()
        meeting = tie or Gather(self.parameter, self.sites[0][0].limit)
        meeting.left_out = self.left_out
        for tap, local in self.sites:
            tap.gathers[local] = meeting

    def weigh(self, root: Tensor | None) -> None:
        """Set √ of the metric, of the parameter's shape, for the step that begins; None: there is none."""
        for tap, local in self.sites:
            if root is None:
                tap.roots.pop(local, None)
            else:
                tap.roots[local] = root
        if self.meeting is not None:
            self.meeting.root = root

    def leave_out(self) -> None:
        """From now on do not count it in the norms of single examples."""
        self.left_out = True
        for tap, local in self.sites:
            tap.left_out.add(local)
        if self.meeting is not None:
            self.meeting.left_out = True

    def _tie(self) -> Gather | None:
        embeddings = [
            tap for tap, local in self.sites if tap.rule.kind == EMBEDDING.kind and local == "weight"
        ]
        heads = [tap for tap, local in self.sites if tap.rule.kind == LINEAR.kind and local == "weight"]
        if len(self.sites) != 2 or len(embeddings) != 1 or len(heads) != 1:
            return None
        (tap,) = embeddings
        padding: int | None = tap.module.padding_idx  # type: ignore[reportAssignmentType]
        return EmbeddingTie(self.parameter, tap.rule, padding, tap.limit)


@dataclass
class Plan:
    """What `plan` found: taps and entries to measure, and reasons for the parameters left out."""

    taps: list[Tap] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    scalars: dict[str, int] = field(default_factory=dict)  # of the parameters in `reasons`


def _sites(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Trainable parameter (by identity) → its places: module path, module, local name.

    Those in a dictionary or list of parameters belong to the module around it, which is the one that is
    called.
    """
    found: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)
    modules = dict(model.named_modules())
    for path, module in modules.items():
        above, _, own = path.rpartition(".")
        for local, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            if isinstance(module, nn.ParameterDict | nn.ParameterList) and path:
                found[id(parameter)].append((above, modules[above], f"{own}.{local}"))
            else:
                found[id(parameter)].append((path, module, local))
    return found


# Position embeddings of `transformers`, (class around, name), that are looked up once for all examples and
# then added. Others are repeated, concatenated or dropped out first: a batch dimension would break that.
_ADDED = {
    ("GPT2Model", "wpe"),
    ("GPTNeoModel", "wpe"),
    ("BertEmbeddings", "position_embeddings"),
    ("ElectraEmbeddings", "position_embeddings"),
    ("AlbertEmbeddings", "position_embeddings"),
}


def _only_adds(model: nn.Module, path: str) -> bool:
    """Whether the output of the layer at `path` is known to be only added to the tokens' embeddings."""
    above, _, own = path.rpartition(".")
    kind = type(model.get_submodule(above))
    return kind.__module__.partition(".")[0] == "transformers" and (kind.__name__, own) in _ADDED


def _why_not(path: str, module: nn.Module, local: str, rule: Rule | None) -> str | None:
    kind = type(module).__name__
    if rule is None:
        return f"`{path}` ({kind}): no per-example rule. Known: {known_kinds()}"
    if not rule.knows(local):
        return f"`{path}` ({kind}): the rule knows {', '.join(rule.parameters)}, not `{local}`"
    return None


def plan(model: nn.Module, *, limit: int = MAX_BYTES, blocks: bool = False) -> Plan:
    """Assign taps to the trainable parameters of a model.

    Args:
        model: any module; for `peft` models both factors are linear layers of their own.
        limit: bytes of per-example gradients alive at once.
        blocks: blocks must be formed, for a metric that weighs entries.

    Returns:
        The plan. Parameters with several places (tied weights) are gathered, or left out with all places
        if one of them has no rule.

    Raises:
        ValueError: nothing is trainable, or nothing trainable has a rule.
    """
    made, taps = Plan(), {}
    rules: dict[int, Rule | None] = {}
    wanted: dict[int, list[str]] = defaultdict(list)
    covered = []
    for places in _sites(model).values():
        for _, module, _ in places:
            if id(module) not in rules:
                rules[id(module)] = rule_for(module)
        whys = [why for p, m, local in places if (why := _why_not(p, m, local, rules[id(m)]))]
        path, module, local = places[0]
        name = f"{path}.{local}" if path else local
        parameter = parameter_of(module, local)
        if whys:
            made.reasons[name], made.scalars[name] = whys[0], parameter.numel()
            continue
        covered.append((name, places, parameter.numel()))
        for _, m, n in places:
            wanted[id(m)].append(n)
    _refuse_empty(model, covered, made)
    for name, places, scalars in covered:
        sites = []
        for path, module, local in places:
            if id(module) not in taps:
                rule = rules[id(module)]
                assert rule is not None
                shareable = rule.ids and _only_adds(model, path)
                names = tuple(wanted[id(module)])
                taps[id(module)] = Tap(path, module, rule, names, limit=limit, shareable=shareable)
            sites.append((taps[id(module)], local))
        entry = Entry(name, sites, scalars, blocks=blocks)
        if len(sites) > 1:
            entry.gather()
        made.entries.append(entry)
    made.taps = list(taps.values())
    return made


def _refuse_empty(model: nn.Module, covered: list, made: Plan) -> None:
    if covered:
        return
    kind = type(model).__name__
    if not made.reasons:
        raise ValueError(
            f"{kind} has no trainable parameter (all have requires_grad=False); "
            "add an adapter, e.g. peft.get_peft_model(model, config), or unfreeze layers, then attach"
        )
    example = next(iter(made.reasons.values()))
    raise ValueError(
        f"none of the {len(made.reasons)} trainable parameters of {kind} can be measured, "
        f"e.g. {example}. "
        "Add a LoRA adapter, train linear layers, or register a rule in `gns/rules/`"
    )


def trainable(model: nn.Module) -> dict[str, int]:
    """Name the trainable parameters as they are now, each with its number of scalars."""
    found = {}
    for places in _sites(model).values():
        path, module, local = places[0]
        found[f"{path}.{local}" if path else local] = parameter_of(module, local).numel()
    return found


def batch_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Give the layers, with their names, that mix the examples of a batch while in training mode."""
    kind = nn.modules.batchnorm._BatchNorm
    return [(name, m) for name, m in model.named_modules() if isinstance(m, kind)]
