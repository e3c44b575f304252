"""The examples that the Hessian is taken on: split into parts, called, weighed."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha1
from typing import Any

import torch
from torch import Tensor, nn

from gns.capture.arguments import tensors_in
from gns.curvature.errors import CurvatureError
from gns.examples import IGNORED, row_map, shifts_labels
from gns.probing.calling import Loss, call, loss_of, value_of
from gns.probing.randomness import mixed, seeded
from gns.probing.still import uninterrupted
from gns.segments import SegmentsOf

HALF = (torch.bfloat16, torch.float16)
OWN_RTOL = 1e-4  # between a model's own loss and our token mean: more is another loss
# Parts of the examples for H: their spread is that of H. Fewer rows in one cost more each; with 2 parts in
# place of 4 sets cover as before and are wider, high/low 3.8 for 3.4 (simulated, curvature/test_coverage:
# 128 examples, 16 for H, B_noise = 2).
PARTS, PART_ROWS = 4, 4
WHOLE = ("num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # keywords of calls not to be cut


def split(batch: Any, parts: int) -> list[Any]:
    """Cut a batch into parts of its rows, or leave it whole where its rows do not show.

    Args:
        batch: a mapping, a tensor, a tuple or list of tensors, or (args, kwargs).
        parts: how many, at the most.
    """
    n = _rows(batch)
    if parts < 2 or n < 2:
        return [batch]
    ends = [round(n * i / min(parts, n)) for i in range(min(parts, n) + 1)]
    return [_sliced(batch, slice(a, b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def _rows(batch: Any) -> int:
    """Rows that a batch can be cut between; 0 where they do not show."""
    keys = set(batch) if isinstance(batch, Mapping) else set()
    rows = {len(t) if t.ndim else 0 for t in tensors_in(batch)}
    return 0 if len(rows) != 1 or keys & set(WHOLE) else rows.pop()


def _sliced(value: Any, rows: slice) -> Any:
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, Mapping):
        return {key: _sliced(item, rows) for key, item in value.items()}
    if isinstance(value, tuple | list):
        cut = [_sliced(item, rows) for item in value]
        return tuple(cut) if isinstance(value, tuple) else cut
    return value


def fingerprint(batch: Any) -> tuple[bytes, ...] | None:
    """Tell batches of the same rows, in whatever order; None where a batch has no rows to be read."""
    tensors = [t.detach() for t in tensors_in(batch) if t.ndim]
    if not tensors or any(t.layout is not torch.strided or t.is_meta for t in tensors):
        return None
    n = len(tensors[0])
    bits = [t.cpu().contiguous().view(torch.uint8).numpy() for t in tensors if len(t) == n and t.numel()]
    return tuple(sorted(sha1(b"".join(b[i].tobytes() for b in bits)).digest() for i in range(n)))


@dataclass
class Point:
    """A model at one parameter point, and how its loss is asked for.

    Args:
        model: held still by the caller.
        parameters: name → parameter, those that are measured.
        loss: (model, batch) → scalar; None: the model's own.
        weights: of the examples in the loss, see `GNSMonitor`.
        segments: which rows or positions are which example, see there.
        seed: of what the model draws; the same at every point, so that differences are those of weights.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter | Tensor]
    loss: Loss | None = None
    weights: str = "auto"
    segments: SegmentsOf | str | None = None
    seed: int = 0
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _half: bool = field(default=False, repr=False)
    _called: tuple[tuple, Mapping[str, Any], Any] | None = field(default=None, repr=False)
    _loss: Tensor | None = field(default=None, repr=False)

    @property
    def coarse(self) -> bool:
        """Whether trainable weights are kept in 16 bits, which round small shifts away."""
        return any(p.dtype in HALF for p in self.parameters.values())

    @property
    def precision(self) -> str:
        """Lowest precision that was seen on the way to the loss: "double", "single" or "half"."""
        return "half" if self._half else self._of_weights

    @cached_property
    def _of_weights(self) -> str:
        if any(p.dtype in HALF for p in self.model.parameters()):
            return "half"
        return "double" if all(p.dtype is torch.float64 for p in self.parameters.values()) else "single"

    def value(self, batch: Any) -> Tensor:
        """The loss of a batch here; what the model was called with is remembered until the next."""
        self._called = None
        handle = self.model.register_forward_hook(self._see, with_kwargs=True)
        try:
            with seeded(mixed(self.seed)):
                found = loss_of(self.model, batch, self.loss)
        finally:
            handle.remove()
        self._loss = found.detach()
        return found

    def _see(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], out: Any) -> None:
        self._called = args, kwargs, out
        kinds = {p.device.type for p in self.parameters.values()}
        self._half |= any(torch.is_autocast_enabled(kind) for kind in kinds)  # in the loss's own context

    def forward_value(self, batch: Any, *, wide: bool) -> float:
        """The loss of a batch here, without a graph.

        Args:
            batch: the part.
            wide: add up the model's own token mean in float64, see `adds_up`.
        """
        self._called = None
        handle = self.model.register_forward_hook(self._see, with_kwargs=True)
        try:
            with torch.no_grad(), seeded(mixed(self.seed)):
                self._loss = value_of(self.model, batch, self.loss).detach()
        finally:
            handle.remove()
        return self.last_value(wide=wide)

    def bare_value(self, batch: Any) -> float | None:
        """The same, added up in float64 from logits of a call without labels: it spares the model's own loss.

        None where the batch does not show its labels, or no token mean comes of the logits. Whether the call
        without them is the same call, the caller has to try: a model may make its inputs of the labels.
        """
        rest, labels = _without_labels(batch)
        if self.loss is not None or labels is None:
            return None
        self._called, self._loss = None, None
        handle = self.model.register_forward_hook(self._see, with_kwargs=True)
        try:
            with torch.no_grad(), seeded(mixed(self.seed)):
                call(self.model, rest)
        finally:
            handle.remove()
        called = self._last()
        return None if called is None else self._token_mean({**called[1], "labels": labels}, called[2])

    def last_value(self, *, wide: bool) -> float:
        """The loss of the last call, of `value` or `forward_value`, added up in the same way."""
        found = self._mean_of_tokens() if wide else None
        return self._rounded() if found is None else found

    def adds_up(self) -> bool:
        """Whether the loss of the last call is the mean over its tokens, which float64 adds up better.

        To be asked once for losses that are subtracted: half of them rounded would show in the difference.
        """
        wide, rounded = self._mean_of_tokens(), self._rounded()
        return wide is not None and abs(wide - rounded) <= OWN_RTOL * abs(rounded)

    def _rounded(self) -> float:
        return math.nan if self._loss is None else float(self._loss.double())

    def _mean_of_tokens(self) -> float | None:
        called = self._last()
        return None if self.loss is not None or called is None else self._token_mean(*called[1:])

    def _token_mean(self, kwargs: Mapping[str, Any], out: Any) -> float | None:
        """Cross-entropy of a call over its labelled tokens; None where it has none."""
        labels, logits = kwargs.get("labels"), getattr(out, "logits", None)
        if not isinstance(labels, Tensor) or not isinstance(logits, Tensor) or logits.ndim != labels.ndim + 1:
            return None
        if labels.shape != logits.shape[:-1] or labels.is_floating_point():
            return None
        if shifts_labels(self.model):  # labels alone move: logits without their last position are a copy
            labels = nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED)
        labels = labels.reshape(-1).to(logits.device)
        each = nn.functional.cross_entropy(
            logits.detach().reshape(len(labels), -1).float(), labels, ignore_index=IGNORED, reduction="none"
        )
        count = int((labels != IGNORED).sum())
        return float(each.double().sum()) / count if count else None

    def _last(self) -> tuple[tuple, Mapping[str, Any], Any] | None:
        return self._called  # by a hook, which no type checker follows

    def output(self) -> Any:
        """What the model gave in the last call of `value`.

        Raises:
            CurvatureError: the loss did not call the model.
        """
        if self._called is None:
            raise CurvatureError("the loss does not call the model that it is given; let it")
        return self._called[2]

    def mass(self) -> float:
        """Weight of the last called batch: its labelled tokens, or its examples; 1 if unknown."""
        if self._called is None:
            return 1.0
        rows = row_map(self.model, *self._called[:2], self.weights, self.segments)
        if rows is None:
            return 1.0
        return float(rows.n) if rows.weights is None or rows.n_tokens is None else float(rows.n_tokens)

    def gradient(self, batch: Any) -> dict[str, Tensor]:
        """The gradient of a batch's loss here; zero where none arrives. `.grad` is None before and after."""
        try:
            self.value(batch).backward()
            found = {name: p.grad for name, p in self.parameters.items()}
        finally:
            for p in self.model.parameters():
                p.grad = None
        return {
            name: torch.zeros_like(self.parameters[name]) if g is None else g.detach()
            for name, g in found.items()
        }

    def hidden(self, batch: Any, names: Sequence[str]) -> str | None:
        """Name one of these parameters that has a gradient, though the loss's graph does not lead to it.

        A reentrant checkpoint keeps its parameters out of the graph, and brings their gradients in backward()
        alone. Costs a gradient, where there are names.

        Args:
            batch: whose loss.
            names: parameters without a gradient on the graph.
        """
        there = self.gradient(batch) if names else {}
        return next((name for name in names if bool(there[name].any())), None)

    @contextmanager
    def shifted(self, vector: Mapping[str, Tensor], h: float) -> Generator[None]:
        """Be at w + h·vector inside; the weights' bits are put back, also after an exception or Ctrl-C."""
        if not self._kept:
            self._kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        at = [p.data for p in self.parameters.values()]
        kept = [self._kept[name] for name in self.parameters]
        try:
            # not one by one: there may be hundreds of small ones
            torch._foreach_copy_(at, kept)  # type: ignore[reportPrivateImportUsage]
            torch._foreach_add_(at, [vector[name] for name in self.parameters], alpha=h)  # type: ignore[reportPrivateImportUsage]
            torch.clear_autocast_cache()  # an autocast around us holds low-precision copies of the weights
            yield
        finally:
            with uninterrupted():
                torch._foreach_copy_(at, kept)  # type: ignore[reportPrivateImportUsage]
                torch.clear_autocast_cache()


def _without_labels(batch: Any) -> tuple[Any, Any]:
    """A batch without its labels, and these; None where they do not show."""
    if isinstance(batch, Mapping) and batch.get("labels") is not None:
        return {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[1], Mapping):
        rest, labels = _without_labels(batch[1])
        return (batch[0], rest), labels
    return batch, None


def label_kind(batch: Any) -> tuple[bool, bool] | None:
    """Whether some labels of a batch are ignored, and all of some row: a model may make its mask of that."""
    labels = _without_labels(batch)[1]
    if not isinstance(labels, Tensor) or not labels.ndim or not labels.numel():
        return None
    ignored = (labels == IGNORED).reshape(len(labels), -1)
    return bool(ignored.any()), bool(ignored.all(1).any())


def pieces(
    batches: Sequence[Any], parts: int | None, *, whole: bool = False, total: int | None = None
) -> list[Any]:
    """Cut the batches for H.

    Args:
        batches: for H.
        parts: about how many in all; None: 4, or down to 2 where they would have fewer than 4 rows each.
        whole: no batch is cut.
        total: batches for H of all ranks, of which these are some; None: these are all.
    """
    n = max(1, len(batches) if total is None else total)
    wanted, least = (-(-k // n) for k in (PARTS if parts is None else parts, 2))
    out: list[Any] = []
    for batch in batches:
        each = wanted if parts is not None else max(least, min(wanted, _rows(batch) // PART_ROWS))
        out += split(batch, 1 if whole else each)
    return out
