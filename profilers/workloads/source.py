"""From what `--model` says to a module: the catalogue, a `config.json`, or a factory of the user's own."""

from __future__ import annotations

from typing import Any, Protocol

from optplan.planner.catalog import load_model
from optplan.planner.models.spec import ModelSpec
from optplan.planner.step.options import StepOptions
from optplan.profilers.workloads.catalogue import build_model, prepared_subject
from optplan.profilers.workloads.factory import FactorySource, is_factory
from optplan.profilers.workloads.subject import Subject


class ModelSource(Protocol):
    """Where a module comes from.

    Attributes:
        spec: The model in the planner's words.
    """

    spec: ModelSpec

    def subject(self, options: StepOptions) -> Subject:
        """The module with one micro-batch; the same module each time, but for precision and attention."""
        ...


class CatalogueSource:
    """A transformers model."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._built: dict[tuple[str, str, str], Any] = {}

    def subject(self, options: StepOptions) -> Subject:
        """The module with one micro-batch."""
        key = (options.parameter_dtype, options.attention, options.fused_loss)
        if key not in self._built:
            self._built[key] = build_model(self.spec, options)
        return prepared_subject(self._built[key], options)


def find_source(model: str) -> ModelSource:
    """The source that `--model` names.

    Raises:
        ConfigError: Nothing goes by that name, or the user's factory fails.
    """
    return FactorySource(model) if is_factory(model) else CatalogueSource(load_model(model))
