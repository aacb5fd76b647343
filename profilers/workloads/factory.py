"""Models of the user's own: `package.module:factory`.

The factory is called without arguments, on the meta device, and returns an `nn.Module`. The module, run on its example
inputs, returns the loss, or something with the loss as attribute `loss` or as first element. The inputs come from the
module's method `example_inputs(batch_size, seq_len)`, a dictionary of arguments by name; without that method the module
gets `input_ids` and `labels`, or pictures, as a transformers model would.
"""

from __future__ import annotations

import importlib
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optplan.planner.errors import ConfigError, printable
from optplan.planner.models.spec import ModelSpec
from optplan.planner.step.options import StepOptions
from optplan.planner.tensors import Buffer
from optplan.profilers.workloads.described import described_parameters
from optplan.profilers.workloads.inputs import model_inputs
from optplan.profilers.workloads.liger import played_liger_loss
from optplan.profilers.workloads.subject import Subject

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_UNLIMITED = 1 << 24


def is_factory(model: str) -> bool:
    """Whether `--model` names a factory."""
    return _FACTORY.fullmatch(model) is not None


class FactorySource:
    """A model of the user's own.

    Attributes:
        spec: The model in the planner's words, read off the module.
    """

    def __init__(self, model: str) -> None:
        """Import and call the factory.

        Raises:
            ConfigError: It cannot be imported, fails, or returns no module.
        """
        self._name = model
        self._module = _call(model, _import(model))
        self.spec = _spec(model, self._module)

    def subject(self, options: StepOptions) -> Subject:
        """The module in the step's dtype with one micro-batch.

        Raises:
            ConfigError: Checkpointing or a fused loss is asked for, which is the module's own business.
        """
        if options.fused_loss != "none":
            raise ConfigError(f"{self._name} computes its own loss: let the module fuse it and leave --fused-loss none")
        if options.checkpointing != "none" and not hasattr(self._module, "gradient_checkpointing_enable"):
            raise ConfigError(
                f"{self._name} has no gradient_checkpointing_enable(): let the module checkpoint itself and leave "
                f"--checkpointing none"
            )
        module = self._module.to(getattr(torch, options.parameter_dtype)).train()
        if options.checkpointing != "none":
            module.gradient_checkpointing_enable()  # type: ignore[operator]
        head = getattr(module, "lm_head", None)
        return Subject(
            module,
            self._inputs(options),
            head=head if isinstance(head, nn.Module) else None,
            context=partial(played_liger_loss, options.compute_capability),
        )

    def _inputs(self, options: StepOptions) -> dict[str, Any]:
        example = getattr(self._module, "example_inputs", None)
        if example is None:
            return model_inputs(self._module, batch_size=options.batch_size, seq_len=options.seq_len)
        with torch.device("meta"):
            inputs = example(options.batch_size, options.seq_len)
        if not isinstance(inputs, dict):
            raise ConfigError(f"example_inputs of {self._name} must return a dict, got {type(inputs).__name__}")
        return {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def _import(model: str) -> Any:
    module_name, _, attribute = model.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise ConfigError(f"--model {model} cannot be imported: {_sentence(error)}") from error
    return found


def _call(model: str, factory: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            module = factory()
    except Exception as error:
        raise ConfigError(f"--model {model} failed: {_sentence(error)}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"--model {model} must return a torch.nn.Module, got {type(module).__name__}")
    return module.to("meta")


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {printable(' '.join(str(error).split())[:300])}"


def _spec(model: str, module: nn.Module) -> ModelSpec:
    buffers = tuple(Buffer(name, tuple(b.shape), None) for name, b in module.named_buffers())
    return ModelSpec(
        name=model,
        model_type="module",
        architecture=type(module).__name__,
        parameters=described_parameters(module),
        buffers=buffers,
        config={},
        max_seq_len=_UNLIMITED,
        source=model,
    )
