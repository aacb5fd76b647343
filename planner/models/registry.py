"""The architectures the reader knows, each loaded only when a model of its family is asked for."""

from __future__ import annotations

from importlib import import_module

from optplan.planner.errors import unknown
from optplan.planner.models.spec import Family

MODULES: dict[str, str] = {
    "bert": "bert",
    "bloom": "bloom",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "olmo2": "olmo2",
    "olmoe": "olmoe",
    "opt": "opt",
    "palm": "palm",
    "phi": "phi",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "roberta": "bert",
    "starcoder2": "starcoder2",
    "t5": "t5",
    "vit": "vit",
}
"""Module of `optplan.planner.models` that describes each `model_type`: it offers `FAMILY`, or `FAMILIES` if several."""


def family_of(model_type: str) -> Family:
    """The family of a `model_type`.

    Raises:
        ConfigError: The architecture is not known.
    """
    if model_type not in MODULES:
        raise unknown("architecture (model_type)", model_type, MODULES)
    module = import_module(f"optplan.planner.models.{MODULES[model_type]}")
    families: dict[str, Family] = getattr(module, "FAMILIES", None) or {module.FAMILY.model_type: module.FAMILY}
    return families[model_type]
