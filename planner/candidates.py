"""The optimizers a request is answered for, and the step that each of them would run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from optplan.planner.errors import ConfigError, shorten, unknown
from optplan.planner.footprint import Footprint
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.optimizers.registry import OPTIMIZERS, build_optimizer, optimizer_ids
from optplan.planner.request import StepRequest
from optplan.planner.sharding.optimizer_state import check_takes_shards
from optplan.planner.sharding.rank import rank_footprint

BASELINE = "adamw"
"""The optimizer that savings are counted against."""

_MAX_OPTION_LENGTH = 200


class OptimizerChoice(msgspec.Struct, frozen=True):
    """An optimizer asked for, with its options; `explicit` when it was named rather than taken with all."""

    optimizer: OptimizerModel
    explicit: bool

    @property
    def id(self) -> str:
        """Name in the registry."""
        return self.optimizer.id


class Candidate(msgspec.Struct, frozen=True):
    """An optimizer bound to the request's model, with the state it keeps there."""

    optimizer: OptimizerModel
    footprint: Footprint

    @property
    def id(self) -> str:
        """Name in the registry."""
        return self.optimizer.id

    @property
    def implementation(self) -> str:
        """The implementation modelled."""
        return self.optimizer.implementation

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its value, those that follow from the model filled in."""
        return self.optimizer.options

    @property
    def settings(self) -> dict[str, Any]:
        """What `--set` must say to choose this candidate: the implementation and the options that are not defaults."""
        return settings_of(self.optimizer)


def settings_of(optimizer: OptimizerModel) -> dict[str, Any]:
    """The implementation and the options of an optimizer that are not defaults."""
    settings: dict[str, Any] = {}
    if optimizer.implementation != OPTIMIZERS[optimizer.id].default_implementation:
        settings["implementation"] = optimizer.implementation
    defaults = {option.name: option.default for option in optimizer.OPTIONS}
    return settings | {key: value for key, value in optimizer.options.items() if value != defaults[key]}


def choose_optimizers(
    names: str | Sequence[str] | None, options: Mapping[str, object] | Sequence[str] | None = None
) -> list[OptimizerChoice]:
    """The optimizers to answer for, in the order asked.

    Args:
        names: Optimizer ids; every one of the registry when None.
        options: As a mapping, or as `key=value` texts. A key applies to every chosen optimizer that has the option;
            `adam-mini.implementation=official` addresses one.

    Raises:
        ConfigError: An optimizer, an option or a value is unknown, or an option fits none of the chosen optimizers.
    """
    chosen = optimizer_ids() if names is None else (names,) if isinstance(names, str) else tuple(names)
    chosen = tuple(dict.fromkeys(chosen))
    for name in chosen:
        if name not in OPTIMIZERS:
            build_optimizer(name)
    settings = _settings(options, chosen)
    return [OptimizerChoice(build_optimizer(name, settings[name]), names is not None) for name in chosen]


def _settings(
    options: Mapping[str, object] | Sequence[str] | None, chosen: tuple[str, ...]
) -> dict[str, dict[str, object]]:
    settings: dict[str, dict[str, object]] = {name: {} for name in chosen}
    for key, value in _pairs(options):
        owner, _, bare = key.rpartition(".")
        if owner:
            if owner not in settings:
                raise ConfigError(
                    f"--set {shorten(key)}: {shorten(owner)} is not among the optimizers chosen: {', '.join(chosen)}"
                )
            settings[owner][bare] = value
            continue
        takers = [name for name in chosen if bare in _option_names(name)]
        if not takers and len(chosen) > 1:
            raise unknown("option", bare, sorted({known for name in chosen for known in _option_names(name)}))
        for name in takers or chosen:
            settings[name][bare] = value
    return settings


def _pairs(options: Mapping[str, object] | Sequence[str] | None) -> list[tuple[str, object]]:
    if options is None:
        return []
    if isinstance(options, Mapping):
        return list(options.items())
    pairs: list[tuple[str, object]] = []
    for text in options:
        key, equals, value = text[:_MAX_OPTION_LENGTH].partition("=")
        if not equals or not key.strip() or not value.strip():
            raise ConfigError(f"--set takes key=value, such as window=10, got {shorten(text)}")
        pairs.append((key.strip(), value.strip()))
    return pairs


def _option_names(name: str) -> set[str]:
    entry = OPTIMIZERS[name]
    return {"implementation"} | {option.name for kind in entry.implementations for option in entry.options(kind)}


def optimizer_context(request: StepRequest) -> OptimizerContext:
    """The dtypes that the optimizer meets under the request's precision."""
    policy = request.policy
    gradient_dtype = policy.master_dtype or policy.gradient_dtype
    return OptimizerContext(policy.updated_dtype, gradient_dtype, request.state_dtype)


def bind_candidates(
    request: StepRequest, choices: Sequence[OptimizerChoice]
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """The choices bound to the request's model, and those left out with the reason.

    Raises:
        ConfigError: An optimizer that was named cannot run this step.
    """
    candidates: list[Candidate] = []
    left_out: list[tuple[str, str]] = []
    for choice in choices:
        if choice.explicit:
            candidates.append(bind_candidate(request, choice.optimizer))
            continue
        try:
            candidates.append(bind_runnable(request, choice.optimizer))
        except ConfigError as error:
            left_out.append((choice.id, str(error)))
    return candidates, left_out


def bind_runnable(request: StepRequest, optimizer: OptimizerModel) -> Candidate:
    """The optimizer bound to the request's model, in another implementation if it has no settings and cannot run.

    Raises:
        ConfigError: No implementation can run this step; the sentence is that of the one given.
    """
    try:
        return bind_candidate(request, optimizer)
    except ConfigError:
        if settings_of(optimizer):
            raise
        for implementation in list(OPTIMIZERS[optimizer.id].implementations)[1:]:
            with suppress(ConfigError):
                return bind_candidate(request, build_optimizer(optimizer.id, {"implementation": implementation}))
        raise


def bind_candidate(request: StepRequest, optimizer: OptimizerModel) -> Candidate:
    """One optimizer bound to the request's model.

    Raises:
        ConfigError: The implementation cannot run on these parameters or keep the state dtype asked for.
    """
    parameters, context = request.rank_model.trained_parameters, optimizer_context(request)
    bound = optimizer.bind(parameters)
    reason = bound.unsupported_reason(parameters, context)
    if reason:
        raise ConfigError(reason)
    if request.config.tensor_parallel > 1:
        check_takes_shards(bound, flag=f"--tensor-parallel {request.config.tensor_parallel}", flat=True)
    return Candidate(bound, rank_footprint(bound, parameters, context, request.strategy))
