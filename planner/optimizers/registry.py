"""The optimizers by id, each loaded only when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import msgspec

from optplan.planner.errors import ConfigError, shorten, unknown
from optplan.planner.optimizers.base import OptimizerModel
from optplan.planner.optimizers.options import Option


class OptimizerEntry(msgspec.Struct, frozen=True):
    """One row of the registry.

    Attributes:
        id: Name on the command line.
        title: Name for people.
        implementations: Implementation to `module:Class` of `optplan.planner.optimizers`; the first is the default.
    """

    id: str
    title: str
    implementations: dict[str, str]

    @property
    def default_implementation(self) -> str:
        """The implementation taken when the user names none."""
        return next(iter(self.implementations))

    def model_class(self, implementation: str) -> type[OptimizerModel]:
        """The class that models one implementation; imports its module.

        Raises:
            ConfigError: The optimizer has no such implementation.
        """
        if implementation not in self.implementations:
            raise unknown(f"implementation of {self.id}", implementation, self.implementations)
        module, _, name = self.implementations[implementation].partition(":")
        found: type[OptimizerModel] = getattr(import_module(f"optplan.planner.optimizers.{module}"), name)
        return found

    def options(self, implementation: str | None = None) -> tuple[Option, ...]:
        """What `--set` may say for one implementation (the default one), besides `implementation` itself."""
        return self.model_class(implementation or self.default_implementation).OPTIONS


def _entry(id_: str, title: str, **implementations: str) -> OptimizerEntry:
    return OptimizerEntry(id_, title, {name.replace("__", "-"): path for name, path in implementations.items()})


OPTIMIZERS: dict[str, OptimizerEntry] = {
    entry.id: entry
    for entry in (
        _entry(
            "adamw",
            "AdamW",
            fused="adamw:FusedAdamW",
            foreach="adamw:ForeachAdamW",
            for__loop="adamw:ForLoopAdamW",
            optplan="adamw:OptplanAdamW",
        ),
        _entry("micro-adam", "MicroAdam", optplan="micro_adam:MicroAdam", official="micro_adam_official:MicroAdam"),
        _entry("adam-mini", "Adam-mini", optplan="adam_mini:AdamMini", official="adam_mini_official:AdamMini"),
        _entry("adapprox", "Adapprox", optplan="adapprox:Adapprox"),
        _entry("sgd", "SGD", fused="sgd:FusedSgd", foreach="sgd:ForeachSgd", for__loop="sgd:ForLoopSgd"),
        _entry("adafactor", "Adafactor", torch="adafactor:TorchAdafactor", transformers="adafactor:HfAdafactor"),
        _entry("lion", "Lion", pytorch_optimizer="lion:Lion"),
        _entry("muon", "Muon", torch="muon:Muon"),
        _entry("adamw-8bit", "8-bit AdamW", bitsandbytes="bitsandbytes:AdamW8bit", torchao="torchao:AdamW8bit"),
        _entry("adamw-4bit", "4-bit AdamW", torchao="torchao:AdamW4bit"),
        _entry("adamw-fp8", "AdamW with fp8 state", torchao="torchao:AdamWFp8"),
        _entry("paged-adamw-8bit", "Paged 8-bit AdamW", bitsandbytes="bitsandbytes:PagedAdamW8bit"),
        _entry("galore", "GaLore AdamW", galore_torch="galore:GaLoreAdamW"),
        _entry("apollo", "APOLLO AdamW", apollo_torch="apollo:ApolloAdamW"),
        _entry("came", "CAME", came_pytorch="came:Came"),
        _entry("sm3", "SM3", pytorch_optimizer="sm3:Sm3"),
        _entry("soap", "SOAP", official="soap:OfficialSoap", pytorch_optimizer="soap:PortedSoap"),
        _entry("flash-adamw", "FlashAdamW", official="flash_adamw:FlashAdamW"),
    )
}


def optimizer_ids() -> tuple[str, ...]:
    """The ids in the order in which tables show them."""
    return tuple(OPTIMIZERS)


def build_optimizer(id_: str, options: Mapping[str, object] | None = None) -> OptimizerModel:
    """The model of an optimizer with its options read and the defaults filled in.

    Args:
        id_: Optimizer id, such as `adam-mini`.
        options: `implementation` and the options of that implementation, as text (`--set key=value`) or typed.

    Raises:
        ConfigError: The optimizer, the implementation, an option or a value is unknown or out of range.
    """
    if id_ not in OPTIMIZERS:
        raise unknown("optimizer", id_, OPTIMIZERS, more="run `optplan optimizers` for the list")
    entry, given = OPTIMIZERS[id_], dict(options or {})
    implementation = given.pop("implementation", entry.default_implementation)
    if not isinstance(implementation, str):
        raise ConfigError(f"{id_}: implementation must be a name, got {shorten(implementation)}")
    model_class = entry.model_class(implementation)
    declared = {option.name: option for option in model_class.OPTIONS}
    for name in given:
        if name not in declared:
            raise _unknown_option(entry, implementation, name)
    values: dict[str, Any] = {
        name: option.parse(given[name], owner=id_) if name in given else option.default
        for name, option in declared.items()
    }
    return model_class(id_, implementation, values)


def _unknown_option(entry: OptimizerEntry, implementation: str, name: str) -> ConfigError:
    owners = [other for other in entry.implementations if any(option.name == name for option in entry.options(other))]
    if owners:
        where = " or ".join(f"implementation={owner}" for owner in owners)
        return ConfigError(f"{entry.id}: option {shorten(name)} needs {where}, got implementation={implementation}")
    names = ["implementation", *(option.name for option in entry.options(implementation))]
    return unknown(f"option of {entry.id}", name, names)
