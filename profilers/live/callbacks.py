"""Profiling inside other people's trainers: callbacks for the Hugging Face Trainer and for Lightning.

Each class is made when it is first asked for, because its base class comes with a package that need not be installed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from optplan.planner.errors import ConfigError
from optplan.planner.measured.measurement import Measurement
from optplan.profilers.live.session import StepProfile


class _Callback:
    """What both callbacks share: one profile from the beginning of the training to its end."""

    def __init__(self, *, name: str | None = None, gpu: str | None = None, out: str | Path | None = None) -> None:
        """Prepare to profile; see `StepProfile`."""
        super().__init__()
        self.measurement: Measurement | None = None
        self._given: dict[str, Any] = {"name": name, "gpu": gpu, "out": out}
        self._profile: StepProfile | None = None

    def _begin(self, model: Any, optimizer: Any) -> None:
        self._profile = StepProfile(model, unwrapped(optimizer), **self._given)
        self._profile.__enter__()

    def _end(self, error: BaseException | None = None) -> None:
        profile, self._profile = self._profile, None
        if profile is None:
            return
        profile.__exit__(type(error) if error else None, error, None)
        if profile.live.call is not None:
            self.measurement = profile.measurement()


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer within what accelerate or Lightning wraps around it.

    Raises:
        ConfigError: There is none.
    """
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__module__.startswith("accelerate"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise ConfigError(f"a torch.optim.Optimizer is needed to follow its steps, got {type(optimizer).__name__}")
        optimizer = inner
    return optimizer


@cache
def trainer_callback() -> type[Any]:
    """The callback class for `transformers.Trainer(callbacks=[...])`.

    Raises:
        ConfigError: transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError:
        raise ConfigError("ProfileCallback needs transformers, which is not installed") from None

    class ProfileCallback(_Callback, TrainerCallback):
        """Profiles a Trainer's steps; `measurement` is there when `train()` returns.

        Example: `Trainer(..., callbacks=[ProfileCallback(out="step.json.gz")])`.
        """

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Begin to observe."""
            del args, state, control
            self._begin(kwargs["model"], kwargs["optimizer"])

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Stop, and save if asked to."""
            del args, state, control, kwargs
            self._end()

    return ProfileCallback


@cache
def lightning_callback() -> type[Any]:
    """The callback class for `lightning.Trainer(callbacks=[...])`.

    Raises:
        ConfigError: lightning is not installed.
    """
    try:
        from lightning.pytorch.callbacks import Callback
    except ImportError:
        raise ConfigError("LightningProfileCallback needs lightning, which is not installed") from None

    class LightningProfileCallback(_Callback, Callback):
        """Profiles a LightningModule's steps; `measurement` is there when `fit()` returns."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Begin to observe the first optimizer."""
            self._begin(pl_module, trainer.optimizers[0])

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            """Begin a forward: `training_step` need not call the module itself."""
            del trainer, pl_module, batch_idx
            if self._profile is not None:
                self._profile.live.watcher.begin_forward(batch if isinstance(batch, dict | list | tuple) else [batch])

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            """Stop, and save if asked to."""
            del trainer, pl_module
            self._end()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            """Stop where the training stopped."""
            del trainer, pl_module
            self._end(exception)

    return LightningProfileCallback
