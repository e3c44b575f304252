"""`GNSCallback`: the monitor inside `transformers.Trainer`, and so inside TRL's trainers.

    trainer = Trainer(model, args, train_dataset=data, callbacks=[GNSCallback()])

Readings join the Trainer's logs as `gns/b_simple`, `gns/b_simple_low`, `gns/b_simple_high`, `gns/trace_sigma`
and `gns/grad_sq_norm`, and so reach `trainer.state.log_history` and whatever `report_to` names (TensorBoard
and others put their own "train/" before the name). They are over all steps so far; from the hundredth step on
a logged value may be up to 1 % of the steps old. One that is not finite (no upper end, |G|² not positive) is
left out of that log, a gap in the curve: reporters and JSON choke on NaN and Infinity.

Reporters run before the callbacks that a user passes, so they would never see what a later one adds. This one
moves itself to the front when training begins.
"""

from __future__ import annotations

import base64
import inspect
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler, ExportableState

from gns.estimate import Estimate
from gns.monitor import GNSMonitor
from gns.sums import Layout, StepSums

LOGGED = {
    "gns/b_simple": "b_simple",
    "gns/b_simple_low": "low",
    "gns/b_simple_high": "high",
    "gns/trace_sigma": "trace_sigma",
    "gns/grad_sq_norm": "grad_sq_norm",
}
_OPTIONS = tuple(inspect.signature(GNSMonitor).parameters)[1:]
_SCALARS = [f.name for f in fields(StepSums) if f.name not in ("rows", "layout")]


class GNSCallback(TrainerCallback, ExportableState):
    """Attaches a monitor for the time of training and logs its readings.

    It measures the model that the Trainer trains, also where a trainer has wrapped that in adapters itself,
    and takes the loss scale of fp16 from the Trainer. Checkpoints hold the readings; a training that resumes
    from one goes on with them, in the same monitor. (`restore_callback_states_from_checkpoint=True` lets the
    Trainer make a new callback with a new monitor instead: ask that one for its `monitor`.)

    The Trainer calls no callback when training ends in an exception. The hooks of the monitor then stay until
    `detach()`, the next `train()`, or the end of a `with` block:

        with GNSCallback.install(trainer) as gns:
            trainer.train()
        print(gns.monitor.estimate())

    Args:
        monitor_or_kwargs: a `GNSMonitor` of the model to be trained, or a mapping of its arguments.
        **kwargs: the same arguments, as keywords.

    Raises:
        TypeError: an argument is none of a `GNSMonitor`.
    """

    def __init__(
        self, monitor_or_kwargs: GNSMonitor | Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        given = monitor_or_kwargs
        self.monitor: GNSMonitor | None = given if isinstance(given, GNSMonitor) else None
        if not isinstance(given, GNSMonitor | Mapping | None):
            raise TypeError(
                f"got a {type(given).__name__}; a GNSMonitor or a mapping of its arguments is needed"
            )
        if self.monitor is not None and kwargs:
            raise TypeError(f"got a GNSMonitor and {', '.join(kwargs)}; give these to the GNSMonitor")
        self._options = {**(given if isinstance(given, Mapping) else {}), **kwargs}
        if unknown := [name for name in self._options if name not in _OPTIONS]:
            raise TypeError(f"GNSMonitor has no {', '.join(unknown)}; it has {', '.join(_OPTIONS)}")
        self.saved: dict[str, Any] | None = None  # set by the Trainer where it restores callbacks
        self.shown: Estimate | None = None  # the estimate that was logged last
        self._shown_at = -1
        self._ours = False

    @classmethod
    def install(
        cls, trainer: Trainer, monitor_or_kwargs: GNSMonitor | Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Self:
        """Add a callback to a trainer, at the front of its list, and return it."""
        callback = cls(monitor_or_kwargs, **kwargs)
        trainer.add_callback(callback)
        _move_to_front(trainer.callback_handler, callback)
        return callback

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Attach to the model in training.

        Raises:
            ValueError: the monitor that was given belongs to another model.
        """
        handler = _caller(self)
        if handler is not None:
            _move_to_front(handler, self)
        self.detach()  # the last training may have ended in an exception
        if self.monitor is None:
            assert model is not None
            self.monitor = GNSMonitor(model, **self._options)
        elif not _same(self.monitor.model, model):
            raise ValueError(
                "the GNSMonitor belongs to another model than the Trainer trains; build it with that model, "
                "or pass GNSCallback the monitor's arguments and let it build the monitor"
            )
        exported = state.stateful_callbacks.setdefault(
            type(self).__name__, {}
        )  # the Trainer will write to it
        if self.monitor.attached:
            return
        if self.monitor.scaler is None:
            self.monitor.scaler = getattr(
                optimizer, "scaler", None
            )  # of accelerate's wrapper, None without fp16
        if state.global_step:
            self._resume(exported, state.global_step)
        self._shown_at, self._ours = -1, True
        self.monitor.attach()

    def _resume(self, exported: Any, global_step: int) -> None:
        """Go on with the readings of the checkpoint, or at least with its step numbers."""
        assert self.monitor is not None
        exported = exported[-1] if isinstance(exported, list) else exported
        saved = self.saved or exported.get("attributes", {}).get("saved")
        self.saved = None
        if saved is None:
            self.monitor.load_state_dict({"next_step": global_step, "history": self.monitor.history})
        else:
            self.monitor.load_state_dict(unpack(saved))

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the readings to a log of training; a log of evaluation alone is left as it is."""
        if not logs or all(key.startswith(("eval_", "test_")) or key in ("epoch", "step") for key in logs):
            return
        found = self._readings()
        logs.update(found)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)  # the Trainer has put a copy there before it asked us

    def _readings(self) -> dict[str, float]:
        latest = self.monitor.latest if self.monitor is not None else None
        if self.monitor is None or latest is None:
            return {}
        if (
            self.shown is None
            or self._shown_at < 0
            or latest.step - self._shown_at >= self._shown_at // 100 + 1
        ):
            self.shown, self._shown_at = self.monitor.estimate(), latest.step
        values = {key: float(getattr(self.shown, name)) for key, name in LOGGED.items()}
        return {key: value for key, value in values.items() if math.isfinite(value)}

    def on_train_end(self, args, state, control, **kwargs):
        """Detach; the readings stay in `monitor`."""
        self.detach()

    def detach(self) -> None:
        """Remove the hooks, if they are this callback's."""
        if self.monitor is not None and self._ours:
            self.monitor.detach()
        self._ours = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps: the options that JSON can hold, and the readings."""
        plain = str | int | float | bool | None
        options = {name: value for name, value in self._options.items() if isinstance(value, plain)}
        saved = pack(self.monitor.state_dict()) if self.monitor is not None else None
        return {"args": options, "attributes": {"saved": saved}}


def next_step(checkpoint: str | Path) -> int | None:
    """Number of the first step after this checkpoint, or None if it holds no readings."""
    data = json.loads((Path(checkpoint) / "trainer_state.json").read_bytes())
    exported = data["stateful_callbacks"].get(GNSCallback.__name__, {})
    saved = exported.get("attributes", {}).get("saved")
    return saved["next_step"] if saved else None


def pack(state: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a monitor's `state_dict()` into plain JSON data; the rows exactly, as base64 of their bytes."""
    layouts: dict[tuple[str, ...], int] = {}
    steps = []
    for step in state["history"]:
        packed = {name: getattr(step, name) for name in _SCALARS}
        if step.rows is not None and step.layout is not None:
            text = base64.b64encode(np.ascontiguousarray(step.rows).tobytes()).decode()
            packed |= {"rows": text, "dtype": step.rows.dtype.name}
            packed["layout"] = layouts.setdefault(step.layout.names, len(layouts))
        steps.append(packed)
    return {"next_step": state["next_step"], "layouts": [list(names) for names in layouts], "steps": steps}


def unpack(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `pack`."""
    layouts = [Layout(tuple(names)) for names in packed["layouts"]]
    steps = []
    for step in packed["steps"]:
        values = {name: step[name] for name in _SCALARS}
        if "rows" in step:
            flat = np.frombuffer(base64.b64decode(step["rows"]), dtype=step["dtype"])
            values |= {"rows": flat.reshape(-1, 2).copy(), "layout": layouts[step["layout"]]}
        steps.append(StepSums(**values))
    return {"next_step": packed["next_step"], "history": steps}


def _caller(callback: TrainerCallback) -> CallbackHandler | None:
    """Find the handler that is calling `callback`.

    The Trainer hands a callback neither itself nor the handler, and the order of the list decides whether
    reporters see our readings. So this looks at the calling frames; where that finds nothing, the readings
    are still in `log_history`, and `GNSCallback.install(trainer)` needs no such look.
    """
    frame = sys._getframe(1)
    for _ in range(4):
        if frame is None:
            break
        owner = frame.f_locals.get("self")
        if isinstance(owner, CallbackHandler) and any(each is callback for each in owner.callbacks):
            return owner
        frame = frame.f_back
    return None


def _move_to_front(handler: CallbackHandler, callback: TrainerCallback) -> None:
    """Put a callback before the reporters; harmless while the handler walks through its list.

    Those before it move up by one, so the walk goes on with the one after it.
    """
    handler.callbacks.remove(callback)
    handler.callbacks.insert(0, callback)


def _same(mine: nn.Module, theirs: nn.Module | None) -> bool:
    """Whether two models are one, or one a part of the other (adapters and engines wrap)."""
    if theirs is None or mine is theirs:
        return True
    return any(part is mine for part in theirs.modules()) or any(part is theirs for part in mine.modules())
