"""`LightningGNSCallback`: the monitor inside `lightning.Trainer`.

    trainer = Trainer(callbacks=[LightningGNSCallback()])

Readings are logged by the LightningModule as `gns/b_simple`, `gns/b_simple_low`, `gns/b_simple_high`,
`gns/trace_sigma` and `gns/grad_sq_norm`, and so reach every logger, `trainer.callback_metrics` and the
progress of early stopping. They are over all steps so far. One that is not finite is left out of that log.

The interval is `monitor.live()`, since a log is looked at all the time: it appears at the 20th usable step,
is renewed at the 25th, 32nd, 40th, … and stands in between, so that the chance that it ever misses the truth
during the training is at most 5 %. That makes it about 1.6 times as wide as the interval of
`monitor.estimate()`, which is for one look, after the training; and the value may leave it between two looks.

Examples are the rows of one module's own call, so it matters which module `training_step` calls with the
batch. The callback expects the LightningModule itself where that has a `forward`, else the one child that
holds everything that trains, and looks at the first training batch: if another one is called, it measures
that one from the next step on. Where several are called one after the other, or a part is to be measured
alone (the generator, not its critic), `module=` names it.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from gns.integrations.shared import Given, Readings, attached, monitor_or_options
from gns.monitor import GNSMonitor
from gns.notices import GNSWarning
from gns.reasons import UNSEEN

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
NO_ROOT = (
    "`training_step` calls `{called}` first, which does not hold all that trains (e.g. not `{missing}`): "
    "rows of the layers are counted as examples, with equal weights and no tokens. Call `self(...)` on the "
    "batch, or measure one part with LightningGNSCallback(module=...)"
)


def _base() -> type:
    """Find Lightning's `Callback`: of the package that the user has imported, else of one that is there.

    Raises:
        ImportError: neither package is installed.
    """
    for package in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(package).Callback
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != package.split(".")[0]:
                raise  # installed, and something that it needs is missing
    raise ImportError(
        "LightningGNSCallback needs `lightning` or `pytorch-lightning`, and neither is installed: "
        "pip install 'gradient-noise-scale[lightning]'"
    )


if not TYPE_CHECKING:
    Callback = _base()


class LightningGNSCallback(Callback):
    """Attaches a monitor for the time of `fit` and logs its readings.

    It takes the loss scale of fp16 from the precision plugin, and detaches at the end of training and after
    an exception. Checkpoints hold the readings; a training that resumes from one goes on with them.

    Automatic and manual optimisation, accumulation, clipping and several optimizers are all measured where
    one optimizer owns what is measured. Two callbacks may measure two parts that share no layer.

    Args:
        monitor_or_kwargs: a `GNSMonitor` of the LightningModule or of a part, or a mapping of its arguments.
        module: the part to measure, and the module that `training_step` calls with the batch: its name in
            the LightningModule, as in `"generator"`. By default it is found in the first training batch.
        **kwargs: arguments of a `GNSMonitor`, as keywords.

    Raises:
        TypeError: an argument is none of a `GNSMonitor`, or `module` was given with a monitor, which has one.
    """

    def __init__(self, monitor_or_kwargs: Given = None, *, module: str | None = None, **kwargs: Any) -> None:
        self.monitor, self._options = monitor_or_options(monitor_or_kwargs, kwargs)
        if self.monitor is not None and module is not None:
            raise TypeError("got a GNSMonitor and module; the GNSMonitor has its model already")
        if module is not None and not isinstance(module, str):
            raise TypeError(
                f"module is a {type(module).__name__}; its name in the LightningModule is needed, "
                "as in module='generator'"
            )
        self.module = module
        self._readings = Readings()
        self._saved: dict[str, Any] | None = None
        self._finder: _Finder | None = None
        self._ours = self._built = False
        self._later: nn.Module | None = None  # to be measured once the step under way is over
        self._began = 0  # optimizer steps before this training

    @property
    def state_key(self) -> str:
        """Tells the callbacks of one trainer apart in its checkpoints."""
        return self._generate_state_key(module=self.module)

    # life

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach.

        Raises:
            ValueError: there is no such `module`, or the monitor that was given belongs to another model.
        """
        self.detach()  # the last training may have been killed where no hook runs
        theirs = self.monitor is None or any(part is self.monitor.model for part in pl_module.modules())
        if self._built and not theirs:
            self.monitor = None  # of another training, with a model of its own
        if self.monitor is not None:
            if not theirs:
                raise ValueError(
                    "the GNSMonitor belongs to another model than the Trainer trains; build it with the "
                    "LightningModule or a part of it, or let LightningGNSCallback build it"
                )
            self._attach(trainer, self.monitor.model)
        elif self.module is not None:
            self._attach(trainer, _named(pl_module, self.module))
        else:
            root = _guess(pl_module)
            self._attach(trainer, root)
            self._finder = _Finder(pl_module, root, self._found)

    def _found(self, pl_module: nn.Module, called: nn.Module, missing: list[str]) -> None:
        """Note that `training_step` calls another module than expected."""
        if missing:
            name = next(name for name, part in pl_module.named_modules() if part is called)
            warnings.warn(NO_ROOT.format(called=name, missing=missing[0]), GNSWarning, stacklevel=3)
            called = pl_module
        assert self.monitor is not None
        if self.monitor.model is not called:
            self.detach()
            state = self.monitor.state_dict()  # what a checkpoint gave; the step under way is not measured
            self._saved = {**state, "next_step": state["next_step"] + 1}
            self.monitor, self._later = None, called

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Attach where the first batch has shown another module than expected, once its step is over."""
        if self._later is not None and trainer.global_step > self._began:
            self._attach(trainer, self._later)

    def _attach(self, trainer: Trainer, root: nn.Module) -> None:
        if self.monitor is None:
            self._built = True
            self.monitor = GNSMonitor(root, **self._options)
        if self.monitor.attached:
            return
        if self.monitor.scaler is None:
            self.monitor.scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._resume(trainer.global_step)
        self._readings.restart()
        self._later, self._began = None, trainer.global_step
        self._ours = attached(self.monitor)

    def _resume(self, global_step: int) -> None:
        """Go on with the readings of the checkpoint, or at least with its step numbers."""
        assert self.monitor is not None
        saved, self._saved = self._saved, None
        if saved is not None:
            self.monitor.load_state_dict(saved)
        elif global_step and not self.monitor.history:
            self.monitor.start_at(global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach; the readings stay in `monitor`."""
        stepped, monitor = trainer.global_step > self._began, self.monitor
        self.detach()
        if stepped and monitor is not None and not monitor.history:
            warnings.warn(f"nothing was measured in this training: {UNSEEN}", GNSWarning, stacklevel=2)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach."""
        self.detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach, however training ended."""
        self.detach()

    def detach(self) -> None:
        """Remove the hooks, if they are this callback's."""
        if self._finder is not None:
            self._finder.remove()
        if self.monitor is not None and self._ours:
            self.monitor.detach()
        self._finder, self._ours = None, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    # logs and checkpoints

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the readings, if a step has been measured."""
        if trainer.barebones:
            return
        if found := self._readings.of(self.monitor):
            pl_module.log_dict(found, on_step=True, on_epoch=False, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint keeps: the readings, as plain data."""
        if self.monitor is None:
            return {} if self._saved is None else {"saved": self._saved}
        return {"saved": self.monitor.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the readings of a checkpoint for the training that is about to begin."""
        self._saved = state_dict.get("saved")


def _named(pl_module: nn.Module, name: str) -> nn.Module:
    """Find a part by its name.

    Raises:
        ValueError: there is none.
    """
    parts = dict(pl_module.named_modules())
    if name not in parts:
        children = ", ".join(child for child, _ in pl_module.named_children())
        raise ValueError(f"{type(pl_module).__name__} has no module {name!r}; its children: {children}")
    return parts[name]


def _guess(pl_module: nn.Module) -> nn.Module:
    """Say which module a training step probably calls with the batch."""
    inherited = type(pl_module).forward.__module__.split(".")[0] in (
        "lightning",
        "pytorch_lightning",
        "torch",
    )
    children = [child for child in pl_module.children() if not _missing(pl_module, child)]
    return children[0] if inherited and children else pl_module


def _missing(pl_module: nn.Module, part: nn.Module) -> list[str]:
    """Name what trains, but not in this part."""
    mine = {id(p) for p in part.parameters()}
    return [name for name, p in pl_module.named_parameters() if p.requires_grad and id(p) not in mine]


class _Finder:
    """Waits for the first module that a training step calls.

    Args:
        pl_module: the LightningModule.
        expected: the module that is probably called.
        tell: called if it is another one, with the LightningModule, the module, and what trains outside it.
    """

    def __init__(
        self,
        pl_module: nn.Module,
        expected: nn.Module,
        tell: Callable[[nn.Module, nn.Module, list[str]], None],
    ):
        self._pl_module, self._expected, self._tell = pl_module, expected, tell
        self._handles = [module.register_forward_pre_hook(self._called) for module in pl_module.modules()]

    def remove(self) -> None:
        """Stop waiting."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _called(self, module: nn.Module, args: tuple) -> None:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._handles:
            return
        if not any(p.requires_grad for p in module.parameters()):
            return  # a metric, a loss, a frozen encoder
        self.remove()
        if module is not self._expected:
            self._tell(self._pl_module, module, _missing(self._pl_module, module))
