"""Profiling a training script that knows nothing of it: the first optimizer that it steps is followed."""

from __future__ import annotations

import gc
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from optplan.planner.errors import ConfigError, OptplanError, shorten
from optplan.planner.measured.measurement import Measurement
from optplan.profilers.live.measure import MIN_STEPS
from optplan.profilers.live.session import StepProfile

_MESSAGE_LIMIT = 300


class _Enough(BaseException):
    """Ends the script once all steps are measured; no handler of ordinary errors stops it."""


def profile_script(
    path: str,
    arguments: Sequence[str] = (),
    *,
    num_steps: int = 8,
    name: str | None = None,
    gpu: str | None = None,
) -> Measurement:
    """Run a script as `python path arguments` would, until the optimizer that it steps first has been followed enough.

    Its first step only shows which optimizer that is; `num_steps` more are measured, the third of them event by event.
    The script then ends, at the end of an optimizer's step.

    Args:
        path: The script.
        arguments: Its command line.
        num_steps: Steps to measure.
        name: The model's name in the catalogue.
        gpu: The GPU's id in the catalogue.

    An interrupt, too, ends the script; what is measured by then is kept if its third step is.

    Raises:
        ConfigError: The script is not there, ends before its steps are measured, or steps no optimizer whose model can
            be found.
        OptplanError: The script fails, or runs out of memory in its first optimizer step.
    """
    if num_steps < MIN_STEPS:
        raise ConfigError(f"--steps must be at least {MIN_STEPS}, the last of which is recorded; got {num_steps}")
    if not Path(path).is_file():
        raise ConfigError(f"cannot run {shorten(path)}: there is no such file")
    watch = _Watch(num_steps, name, gpu)
    handle = register_optimizer_step_post_hook(watch.stepped)
    try:
        _run(path, arguments)
    except _Enough:
        pass
    except torch.cuda.OutOfMemoryError as error:
        if watch.profile is None:
            words = " ".join(str(error).split())[:_MESSAGE_LIMIT]
            raise OptplanError(f"{shorten(path)} ran out of memory in its first optimizer step: {words}") from None
        watch.close(error)
    except KeyboardInterrupt as error:
        if not watch.has_recorded:
            raise
        watch.close(error)
    finally:
        handle.remove()
        watch.close(sys.exc_info()[1])
    return watch.result(path)


def _run(path: str, arguments: Sequence[str]) -> None:
    with _command_line([path, *arguments], Path(path).resolve().parent):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise OptplanError(f"{shorten(path)} ended with status {shorten(stop.code)}") from None
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            raise OptplanError(f"{shorten(path)} failed: {type(error).__name__}: {error}") from error


@contextmanager
def _command_line(words: list[str], folder: Path) -> Iterator[None]:
    """What a script finds when Python runs it: its own arguments, and its folder first among the places to import."""
    argv, paths = sys.argv, list(sys.path)
    sys.argv = words
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, paths


class _Watch:
    """Waits for the first optimizer's step, then profiles its loop."""

    def __init__(self, num_steps: int, name: str | None, gpu: str | None) -> None:
        self.profile: StepProfile | None = None
        self._num_steps = num_steps
        self._name, self._gpu = name, gpu
        self._optimizer: torch.optim.Optimizer | None = None
        self._is_closed = False

    def stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Called after every step of every optimizer."""
        del args, kwargs
        if self.profile is None:
            self._optimizer = optimizer
            self.profile = StepProfile(_model_of(optimizer), optimizer, name=self._name, gpu=self._gpu)
            self.profile.__enter__()
        # Hooks on all optimizers come after an optimizer's own: the step that ends now is among those counted.
        elif optimizer is self._optimizer and self.profile.live.num_steps >= self._num_steps:
            raise _Enough

    @property
    def has_recorded(self) -> bool:
        """Whether the step that is recorded event by event has ended."""
        return self.profile is not None and self.profile.live.num_steps > self.profile.live.recorded_step

    def close(self, error: BaseException | None) -> None:
        """Stop observing, once; `error` is what ended the script."""
        if self.profile is not None and not self._is_closed:
            self._is_closed = True
            self.profile.__exit__(type(error) if error else None, error, None)

    def result(self, path: str) -> Measurement:
        """What was found.

        Raises:
            ConfigError: Too little was.
        """
        if self.profile is None:
            raise ConfigError(f"{shorten(path)} ended without a step of any torch optimizer")
        live = self.profile.live
        if live.num_steps < MIN_STEPS and live.out_of_memory is None:
            raise ConfigError(
                f"{shorten(path)} ended after {live.num_steps + 1} steps; at least {MIN_STEPS + 1} are needed, "
                "the last of which is recorded"
            )
        return self.profile.measurement()


def _model_of(optimizer: torch.optim.Optimizer) -> nn.Module:
    """The outermost module that holds what the optimizer steps.

    Raises:
        ConfigError: No module alive holds it.
    """
    stepped = next(parameter for group in optimizer.param_groups for parameter in group["params"])
    holders = [
        found
        for found in gc.get_objects()
        if isinstance(found, nn.Module) and any(parameter is stepped for parameter in found.parameters())
    ]
    if not holders:
        raise ConfigError(
            f"no module holds the parameters of {type(optimizer).__name__}; use optplan.profile_step(model, optimizer)"
        )
    return max(holders, key=lambda module: sum(1 for _ in module.modules()))
