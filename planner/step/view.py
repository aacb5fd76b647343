"""A model as a sharding strategy sees it under the options of a step."""

from __future__ import annotations

from optplan.planner.models.spec import ModelSpec
from optplan.planner.sharding.base import ModelView
from optplan.planner.step.families import FAMILIES
from optplan.planner.step.options import StepOptions


def model_view(spec: ModelSpec, options: StepOptions) -> ModelView:
    """The model's layers, and the dtypes in which its parameters are used and stored.

    Of a family without step rules no layers are known; sums over the whole model are the same.
    """
    stored = options.stored_dtype or options.parameter_dtype
    family = FAMILIES.get(spec.model_type)
    if family is None:
        return ModelView(spec, 0, str, options.parameter_dtype, stored)
    return ModelView(spec, len(family.layers(spec)), family.namer(spec), options.parameter_dtype, stored)
