"""From the object in a `config.json` to the model it describes, or the sentence that says why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optplan.planner.errors import ConfigError, shorten
from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import MODULES, family_of
from optplan.planner.models.spec import Family, ModelSpec

MAX_PARAMETERS = 10**14
"""A hundred times the largest model published."""

_SAME_INVENTORY = {
    "bloom": ("BloomModel",),
    "llama": ("LLaMAForCausalLM",),
    "opt": ("OPTModel",),
    "t5": ("T5WithLMHeadModel",),
}
"""Other class names that published files of a family give the same weights: a tied head left out, old spellings."""


def read_model(raw: Mapping[str, Any], *, name: str, source: str, where: str) -> ModelSpec:
    """The model that a configuration describes.

    Args:
        raw: The object of a `config.json`.
        name: What to call the model.
        source: Where the configuration comes from.
        where: How errors name the configuration.

    Raises:
        ConfigError: The architecture or the class is not known, the model wraps another or is quantised, a field is
            missing, of the wrong type or out of range, or the model is absurdly large.
    """
    fields = Fields(raw, where=where)
    model_type = fields.text("model_type")
    _refuse_wrapper(fields, model_type)
    family = family_of(model_type)
    _check_architectures(fields, family)
    if raw.get("quantization_config") is not None:
        raise ConfigError(
            f"{where} describes quantised weights ('quantization_config'), which are not trained as they are; "
            f"remove that field to plan for the model itself"
        )
    spec = family.spec(fields, name=name, source=source)
    if spec.num_parameters > MAX_PARAMETERS:
        raise ConfigError(f"{where} describes {spec.num_parameters} parameters; at most {MAX_PARAMETERS} are accepted")
    return spec


def _refuse_wrapper(fields: Fields, model_type: str) -> None:
    """Refuse a text-and-image model by pointing at its text part: its vision tower has no inventory here."""
    text_part = fields.raw.get("text_config")
    inner = text_part.get("model_type") if isinstance(text_part, dict) else None
    if model_type not in MODULES and isinstance(inner, str) and inner in MODULES:
        raise ConfigError(
            f"{fields.where} describes a model ({shorten(model_type)}) around a text model ('{inner}'); "
            f"to plan for the text model alone, save the object in 'text_config' as its own config.json"
        )


def _check_architectures(fields: Fields, family: Family) -> None:
    """Refuse a class whose weights differ from the family's, such as a sequence classifier."""
    named = fields.raw.get("architectures")
    if named is None:
        return
    if not isinstance(named, list) or not all(isinstance(entry, str) for entry in named):
        raise ConfigError(f"{fields.where}: the field 'architectures' must be a list of names, got {shorten(named)}")
    known = (family.architecture, *_SAME_INVENTORY.get(family.model_type, ()))
    if named and not any(entry in known for entry in named):
        raise ConfigError(
            f"{fields.where}: the field 'architectures' names {shorten(named[0])}; "
            f"supported for '{family.model_type}': {family.architecture}"
        )
