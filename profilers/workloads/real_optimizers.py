"""The real optimizer of a planner's description, built as its package's users build it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from optplan.planner.dtypes import Dtype
from optplan.planner.errors import ConfigError
from optplan.planner.models.spec import ModelSpec
from optplan.planner.optimizers import registry
from optplan.planner.optimizers.base import OptimizerModel
from optplan.profilers.workloads.muon import build_muon

Parameters = Sequence[nn.Parameter]
_Builder = Callable[[nn.Module, Parameters, Mapping[str, Any], ModelSpec], torch.optim.Optimizer]
"""Takes the module, what is stepped, the options and `state_dtype` with their values, and the module's description."""

LEARNING_RATE = 1e-4
_FLAGS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}


def build_optimizer(
    description: OptimizerModel,
    model: nn.Module,
    parameters: Parameters,
    spec: ModelSpec,
    *,
    state_dtype: Dtype | None = None,
) -> torch.optim.Optimizer:
    """Build what `description` describes.

    Args:
        description: From the planner's registry, its options resolved.
        model: The module whose parameters are trained; some optimizers read their partition from it.
        parameters: What is updated: the module's trained parameters, or master weights in the same order.
        spec: The planner's description of the module.
        state_dtype: Dtype asked for the moments; the optimizer's own choice if None.

    Raises:
        ConfigError: This version cannot build it, or not with these options, or its package is not installed.
    """
    key = (description.id, description.implementation)
    build = _BUILDERS.get(key)
    if build is None:
        known = ", ".join(f"{name} ({implementation})" for name, implementation in _BUILDERS)
        raise ConfigError(f"{key[0]} ({key[1]}) cannot be run by the profiler; allowed: {known}")
    _check_options(description)
    # What the planner would not count is not asked for: of most the only dtype is the parameters' own.
    wish = state_dtype if state_dtype in type(description).STATE_DTYPES else None
    given = {**description.options, "state_dtype": None if wish is None else getattr(torch, wish)}
    try:
        return build(model, parameters, given, spec)
    except ImportError as error:
        raise ConfigError(f"{key[0]} ({key[1]}) needs a package that is not installed: {error}") from None


def _check_options(description: OptimizerModel) -> None:
    """Refuse an option that would be left aside: what is measured is what was asked for."""
    known = _OPTIONS.get((description.id, description.implementation), ())
    usual = registry.build_optimizer(description.id, {"implementation": description.implementation}).options
    for name, value in description.options.items():
        if name not in known and value != usual.get(name):
            raise ConfigError(
                f"{description.id} ({description.implementation}) with {name}={value} cannot be run by the profiler; "
                f"allowed: {name}={usual.get(name)}"
            )


def _torch(name: str, implementation: str, *options: str) -> _Builder:
    def build(_: nn.Module, parameters: Parameters, given: Mapping[str, Any], __: ModelSpec) -> torch.optim.Optimizer:
        chosen = {option: given[option] for option in options if option in given}
        cls = getattr(torch.optim, name)
        return cls(parameters, lr=LEARNING_RATE, **_FLAGS[implementation], **chosen)  # type: ignore[no-any-return]

    return build


def _ours(name: str, *options: str) -> _Builder:
    def build(_: nn.Module, parameters: Parameters, given: Mapping[str, Any], __: ModelSpec) -> torch.optim.Optimizer:
        cls = getattr(import_module("optplan.optim_impls"), name)
        chosen = {option: given[option] for option in options if option in given}
        return cls(parameters, lr=LEARNING_RATE, **chosen)  # type: ignore[no-any-return]

    return build


def _adapprox(_: nn.Module, parameters: Parameters, given: Mapping[str, Any], __: ModelSpec) -> torch.optim.Optimizer:
    cls = import_module("optplan.optim_impls").Adapprox
    rank = {"min": 1}.get(given["rank"], given["rank"])
    chosen = {"rank": rank, "mode": given["mode"], "betas": (given["beta1"], 0.999)}
    return cls(parameters, lr=LEARNING_RATE, state_dtype=given["state_dtype"], **chosen)  # type: ignore[no-any-return]


def _adam_mini(
    model: nn.Module, parameters: Parameters, given: Mapping[str, Any], __: ModelSpec
) -> torch.optim.Optimizer:
    cls = import_module("optplan.optim_impls").AdamMini
    return cls.from_module(  # type: ignore[no-any-return]
        model, masters=parameters, lr=LEARNING_RATE, state_dtype=given["state_dtype"]
    )


def _adam_mini_official(
    _: nn.Module, parameters: Parameters, options: Mapping[str, Any], spec: ModelSpec
) -> torch.optim.Optimizer:
    query = next(p for p in spec.unique_parameters if p.heads is not None and p.heads.num_query_heads)
    assert query.heads is not None
    named = [(p.name, tensor) for p, tensor in zip(spec.unique_parameters, parameters, strict=True)]
    optimizer = import_module("adam_mini").Adam_mini(
        named,
        lr=LEARNING_RATE,
        dim=options.get("dim") or query.numel // query.num_output_neurons,
        n_heads=options.get("n_heads") or query.heads.num_query_heads,
        verbose=False,
    )
    # The package takes the GPUs it sees for ranks, and asks the others of them although there is no group of ranks.
    optimizer.world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return optimizer  # type: ignore[no-any-return]


def _muon(_: nn.Module, parameters: Parameters, given: Mapping[str, Any], spec: ModelSpec) -> torch.optim.Optimizer:
    return build_muon(parameters, spec, lr=LEARNING_RATE, nesterov=given["nesterov"])


def _adafactor_torch(
    _: nn.Module, parameters: Parameters, options: Mapping[str, Any], __: ModelSpec
) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameters, lr=LEARNING_RATE, foreach=bool(options.get("foreach", False)))


def _adafactor_transformers(
    _: nn.Module, parameters: Parameters, options: Mapping[str, Any], __: ModelSpec
) -> torch.optim.Optimizer:
    beta1 = options.get("beta1")
    return import_module("transformers.optimization").Adafactor(  # type: ignore[no-any-return]
        parameters,
        lr=LEARNING_RATE,
        beta1=None if beta1 in (None, "none") else float(beta1),
        scale_parameter=False,
        relative_step=False,
    )


def _eight_bit(
    _: nn.Module, parameters: Parameters, options: Mapping[str, Any], __: ModelSpec
) -> torch.optim.Optimizer:
    return import_module("bitsandbytes.optim").AdamW8bit(  # type: ignore[no-any-return]
        parameters, lr=LEARNING_RATE, min_8bit_size=options.get("min_8bit_size", 4096)
    )


_BUILDERS: dict[tuple[str, str], _Builder] = {
    **{("adamw", name): _torch("AdamW", name, "amsgrad") for name in _FLAGS},
    ("adamw", "optplan"): _ours("AdamW", "rounding", "capturable", "state_dtype"),
    ("adam-mini", "optplan"): _adam_mini,
    ("adam-mini", "official"): _adam_mini_official,
    ("micro-adam", "optplan"): _ours("MicroAdam", "window", "density", "block", "bucket", "alpha", "capturable"),
    ("adapprox", "optplan"): _adapprox,
    **{("sgd", name): _torch("SGD", name, "momentum", "weight_decay", "nesterov") for name in _FLAGS},
    ("muon", "torch"): _muon,
    ("adafactor", "torch"): _adafactor_torch,
    ("adafactor", "transformers"): _adafactor_transformers,
    ("adamw-8bit", "bitsandbytes"): _eight_bit,
}

_OPTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    **{("adamw", name): ("amsgrad",) for name in _FLAGS},
    ("adamw", "optplan"): ("rounding", "capturable"),
    ("adam-mini", "official"): ("dim", "n_heads"),
    ("micro-adam", "optplan"): ("window", "density", "block", "bucket", "alpha", "capturable"),
    ("adapprox", "optplan"): ("rank", "mode", "beta1"),
    **{("sgd", name): ("momentum", "weight_decay", "nesterov") for name in _FLAGS},
    ("muon", "torch"): ("nesterov",),
    ("adafactor", "torch"): ("foreach",),
    ("adafactor", "transformers"): ("beta1",),
    ("adamw-8bit", "bitsandbytes"): ("min_8bit_size",),
}
"""The options that a builder passes on; the others have to have their usual values."""
