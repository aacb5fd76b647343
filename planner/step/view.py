"""A model as a sharding strategy sees it under the options of a step."""

from __future__ import annotations

from optplan.planner.models.spec import ModelSpec
from optplan.planner.sharding.base import ModelView
from optplan.planner.step.families import FAMILIES
from optplan.planner.step.options import StepOptions


def model_view(spec: ModelSpec, options: StepOptions) -> ModelView:
    """The model's layers, and the dtypes in which its parameters are used and stored.

    Raises:
        KeyError: The family has no step rules.
    """
    family = FAMILIES[spec.model_type]
    stored = options.stored_dtype or options.parameter_dtype
    return ModelView(spec, len(family.layers(spec)), family.namer(spec), options.parameter_dtype, stored)
