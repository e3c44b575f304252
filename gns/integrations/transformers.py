"""`GNSCallback`: the monitor inside `transformers.Trainer`, and so inside TRL's trainers.

    trainer = Trainer(model, args, train_dataset=data, callbacks=[GNSCallback()])

Readings join the Trainer's logs as `gns/b_simple`, `gns/b_simple_low`, `gns/b_simple_high`, `gns/trace_sigma`
and `gns/grad_sq_norm`, and so reach `trainer.state.log_history` and whatever `report_to` names (TensorBoard
and others put their own "train/" before the name). They are over all steps so far; from the hundredth step on
a logged value may be up to 1 % of the steps old. One that is not finite (no upper end, |G|² not positive) is
left out of that log, a gap in the curve: reporters and JSON choke on NaN and Infinity.

The interval is `monitor.live()`, since a log is looked at all the time: it appears at the 20th usable step,
is renewed at the 25th, 32nd, 40th, … and stands in between, so that the chance that it ever misses the truth
during the training is at most 5 %. That makes it about 1.6 times as wide as the interval of
`monitor.estimate()`, which is for one look, after the training; and the value may leave it between two looks.

Reporters run before the callbacks that a user passes, so they would never see what a later one adds. This one
moves itself to the front when training begins.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any, Self

from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler, ExportableState

from gns.estimate import Estimate
from gns.integrations import trl
from gns.integrations.shared import Given, Readings, attached, monitor_or_options
from gns.monitor import GNSMonitor
from gns.notices import GNSWarning


class GNSCallback(TrainerCallback, ExportableState):
    """Attaches a monitor for the time of training and logs its readings.

    It measures the model that the Trainer trains, also where a trainer has wrapped that in adapters itself,
    and takes the loss scale of fp16 from the Trainer, and from TRL's `DPOTrainer` and `RewardTrainer` that a
    preference pair is one example. Checkpoints hold the readings; a training that resumes
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

    def __init__(self, monitor_or_kwargs: Given = None, **kwargs: Any) -> None:
        self.monitor, self._options = monitor_or_options(monitor_or_kwargs, kwargs)
        self.saved: dict[str, Any] | None = None  # set by the Trainer where it restores callbacks
        self._readings = Readings()
        self._ours = self._built = False

    @property
    def shown(self) -> Estimate | None:
        """The estimate that was logged last."""
        return self._readings.shown

    @classmethod
    def install(cls, trainer: Trainer, monitor_or_kwargs: Given = None, **kwargs: Any) -> Self:
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
        if self._built and self.monitor is not None and not _same(self.monitor.model, model):
            self.monitor = None  # of another training, with a model of its own
        if self.monitor is None:
            assert model is not None
            self._built = True
            self.monitor = GNSMonitor(model, **{**trl.options_for(args), **self._options})
        elif not _same(self.monitor.model, model):
            raise ValueError(
                "the GNSMonitor belongs to another model than the Trainer trains; build it with that model, "
                "or pass GNSCallback the monitor's arguments and let it build the monitor"
            )
        # the Trainer will write to it
        exported = state.stateful_callbacks.setdefault(type(self).__name__, {})
        if self.monitor.attached:
            return
        if self.monitor.scaler is None:
            # of accelerate's wrapper, None without fp16
            self.monitor.scaler = getattr(optimizer, "scaler", None)
        if state.global_step:
            self._resume(exported, state.global_step)
        for text in trl.doubts(args, self.monitor, self._options):
            warnings.warn(text, GNSWarning, stacklevel=2)
        self._readings.restart()
        self._ours = attached(self.monitor)

    def _resume(self, exported: Any, global_step: int) -> None:
        """Go on with the readings of the checkpoint, or at least with its step numbers."""
        assert self.monitor is not None
        exported = exported[-1] if isinstance(exported, list) else exported
        saved = self.saved or exported.get("attributes", {}).get("saved")
        self.saved = None
        if saved is None:
            self.monitor.start_at(global_step)
        else:
            self.monitor.load_state_dict(saved)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the readings to a log of training; a log of evaluation alone is left as it is."""
        if not logs or all(key.startswith(("eval_", "test_")) or key in ("epoch", "step") for key in logs):
            return
        found = self._readings.of(self.monitor)
        logs.update(found)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)  # the Trainer has put a copy there before it asked us

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
        saved = self.monitor.state_dict() if self.monitor is not None else None
        return {"args": options, "attributes": {"saved": saved}}


def next_step(checkpoint: str | Path) -> int | None:
    """Number of the first step after this checkpoint, or None if it holds no readings."""
    data = json.loads((Path(checkpoint) / "trainer_state.json").read_bytes())
    exported = data["stateful_callbacks"].get(GNSCallback.__name__, {})
    saved = exported.get("attributes", {}).get("saved")
    return saved["next_step"] if saved else None


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
