"""Roles read from real modules against the planner's inventory of the same configuration, for every family.

The planner's inventories are written by hand, family by family, and held against transformers on their own; the walk
over modules shares no code with them.
"""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers

from optplan.optim_impls.adam_mini.roles import describe_module
from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.optimizers.adam_mini import partition

CASES_FOLDER = Path(__file__).parents[2] / "planner" / "models"


def _cases() -> list[Any]:
    rows: list[tuple[str, dict[str, Any]]] = []
    for name in ("inventory_cases.py", "inventory_cases_other.py"):
        rows += runpy.run_path(str(CASES_FOLDER / name))["CASES"]
    return [pytest.param(*row, id=f"{row[0]}-{number}") for number, row in enumerate(rows)]


def _model(architecture: str, model_type: str, fields: dict[str, Any]) -> torch.nn.Module:
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(fields))
    with torch.device("meta"):
        model: torch.nn.Module = getattr(transformers, architecture)._from_config(config)
    return model


@pytest.mark.parametrize(("model_type", "fields"), _cases())
def test_roles_equal_the_planners_inventory(model_type: str, fields: dict[str, Any]) -> None:
    spec = family_of(model_type).spec(Fields(fields, where="config.json"), name="case", source="test")
    found = [row.parameter for row in describe_module(_model(spec.architecture, model_type, fields))]
    assert [(p.name, p.role) for p in found] == [(p.name, p.role) for p in spec.unique_parameters]
    # A module does not show which of its parameters its forward leaves aside.
    assert found == [msgspec.structs.replace(p, is_used=True) for p in spec.unique_parameters]
    assert [partition(p) for p in found] == [partition(p) for p in spec.unique_parameters]
