"""The records of `optplan models`, `gpus` and `optimizers`: what is known, filtered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from optplan.planner.catalog import model_entries
from optplan.planner.gpus import load_gpus
from optplan.planner.optimizers.facts import OptimizerFacts, load_facts
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.registry import OPTIMIZERS, OptimizerEntry
from optplan.planner.step.rules import RULED_FAMILIES


class ModelItem(msgspec.Struct, frozen=True):
    """One model of the catalogue.

    Attributes:
        predicts_peak: Whether the family has step rules; resident bytes are exact for every family.
    """

    id: str
    aliases: tuple[str, ...]
    family: str
    num_parameters: int
    predicts_peak: bool
    hub_id: str
    source: str
    as_of: str


class ModelListing(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `optplan models`."""

    schema: Literal["optplan.models/1"] = "optplan.models/1"
    models: list[ModelItem]


class GpuItem(msgspec.Struct, frozen=True):
    """One GPU of the catalogue; fields as in `optplan.planner.gpus.Gpu`."""

    id: str
    name: str
    aliases: tuple[str, ...]
    architecture: str | None
    marketing_bytes: int | None
    total_bytes: int
    total_basis: str
    total_source: str
    context_bytes: int
    context_basis: str
    context_source: str
    usable_bytes: int
    memory_bandwidth_bytes_per_s: float | None
    copy_bandwidth_bytes_per_s: float | None
    peak_flops: dict[str, float]
    host_link: str | None
    host_link_bytes_per_s: float | None
    peer_link: str | None
    peer_link_bytes_per_s: float | None
    source: str | None
    as_of: str | None


class GpuListing(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `optplan gpus`."""

    schema: Literal["optplan.gpus/1"] = "optplan.gpus/1"
    gpus: list[GpuItem]


class OptionItem(msgspec.Struct, frozen=True):
    """One option that `--set` takes."""

    name: str
    default: Any
    allowed: str
    help: str


class ImplementationItem(msgspec.Struct, frozen=True):
    """One implementation of an optimizer, with its options."""

    name: str
    default: bool
    options: list[OptionItem]


class OptimizerItem(msgspec.Struct, frozen=True):
    """One optimizer: what it is, where it comes from, what is known of it."""

    id: str
    title: str
    implementations: list[ImplementationItem]
    facts: OptimizerFacts


class OptimizerListing(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `optplan optimizers`."""

    schema: Literal["optplan.optimizers/1"] = "optplan.optimizers/1"
    optimizers: list[OptimizerItem]


def list_models(text: str | None = None) -> ModelListing:
    """The models whose id, aliases, family or repository contain `text`, in any case."""
    return ModelListing(
        models=[
            ModelItem(
                entry.id,
                entry.aliases,
                entry.family,
                entry.num_parameters,
                entry.family in RULED_FAMILIES,
                entry.hub_id,
                entry.source,
                entry.as_of,
            )
            for entry in model_entries()
            if _matches(text, (*entry.names, entry.family))
        ]
    )


def list_gpus(text: str | None = None) -> GpuListing:
    """The GPUs whose id, name, aliases or architecture contain `text`, in any case."""
    return GpuListing(
        gpus=[
            GpuItem(**{name: getattr(gpu, name) for name in GpuItem.__struct_fields__})
            for gpu in load_gpus().values()
            if _matches(text, (gpu.id, gpu.name, *gpu.aliases, gpu.architecture or ""))
        ]
    )


def list_optimizers(text: str | None = None) -> OptimizerListing:
    """The optimizers whose id, title or implementations contain `text`, in any case."""
    facts = load_facts()
    return OptimizerListing(
        optimizers=[
            OptimizerItem(entry.id, entry.title, _implementations(entry), facts[entry.id])
            for entry in OPTIMIZERS.values()
            if _matches(text, (entry.id, entry.title, *entry.implementations))
        ]
    )


def _implementations(entry: OptimizerEntry) -> list[ImplementationItem]:
    return [
        ImplementationItem(name, name == entry.default_implementation, [_option(o) for o in entry.options(name)])
        for name in entry.implementations
    ]


def _option(option: Option) -> OptionItem:
    return OptionItem(option.name, option.default, option.allowed, option.help)


def _matches(text: str | None, names: Iterable[str]) -> bool:
    return text is None or any(text.lower() in name.lower() for name in names)
