"""What a user asks of the search, checked: the step, the space, the limit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import msgspec

from optplan.planner.catalog import load_model
from optplan.planner.dtypes import Dtype
from optplan.planner.errors import ConfigError, shorten, unknown
from optplan.planner.gpus import Gpu
from optplan.planner.models.spec import ModelSpec
from optplan.planner.request import CHECKPOINTING as KNOWN_CHECKPOINTING
from optplan.planner.request import FUSED_LOSS, StepRequest, check_request
from optplan.planner.search.picks import RULES
from optplan.planner.search.space import (
    CHECKPOINTING,
    DEFAULT_TOKENS_PER_STEP,
    PRECISIONS,
    Layout,
    Member,
    Space,
    all_members,
    divisors,
)
from optplan.planner.sharding.clusters import usual_num_nodes
from optplan.planner.sharding.registry import SHARDINGS
from optplan.planner.step.rules import fused_losses_of, has_rules
from optplan.planner.units import format_gib, parse_size

MOST_GPUS = 1024
"""The most GPUs that are searched."""

_SHARDINGS = ("ddp", "zero1", "zero1-deepspeed", "zero2", "fsdp2", "fsdp2-noreshard")
"""Those tried on several GPUs of one machine."""

_MOST_TOKENS = 2**32


class SearchFlags(TypedDict, total=False):
    """What the search is asked, by the names of the command line; what is left out is searched or has a default.

    Attributes:
        gpu: Name from the GPU catalogue; or give `memory`, which torch may allocate.
        gpus: Number of GPUs, or a range such as `1..8`.
        budget: Take no more than this of each GPU, as bytes or as text such as `38GiB`.
        reserve: Leave this much of each GPU's usable bytes alone.
        tokens_per_step: Tokens of one optimizer step over all GPUs, about 65536 if left out.
        prefer: `quality` (default), `speed` or `memory`.
        seq_len: Tokens of a sequence; likewise the next ones as in `StepFlags`.
        precision: Searched if left out; likewise checkpointing, batch_size, fused_loss, step_in_backward
            and sharding.
    """

    gpu: str | None
    memory: str | int | None
    gpus: int | str
    budget: str | int | None
    reserve: str | int | None
    tokens_per_step: int | None
    prefer: str
    seq_len: int | None
    attention: str | None
    clip_grad_norm: float | None
    keep_grads: bool
    padding_mask: bool
    empty_cache: bool
    alloc_conf: str | None
    state_dtype: str | None
    precision: str | None
    checkpointing: str | None
    batch_size: int | None
    fused_loss: str | None
    step_in_backward: bool | None
    sharding: str | None


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A checked question.

    Attributes:
        model: The model as it was named.
        base: The step with everything that is not searched.
        space: What is searched.
        limit_bytes: What a configuration may take of each GPU.
        reserve_bytes: What is left alone.
        prefer: The rule by which one is picked.
        fixed: The options that were given where they could have been searched.
        asked: Everything that was given, to ask again with a change.
        optimizers: The optimizers named; likewise the settings.
    """

    model: str | ModelSpec
    base: StepRequest
    space: Space
    limit_bytes: int
    reserve_bytes: int
    prefer: str
    fixed: dict[str, Any]
    asked: dict[str, Any]
    optimizers: tuple[str, ...] | None
    settings: tuple[str, ...] | None


_SEARCHED = ("precision", "checkpointing", "batch_size", "fused_loss", "step_in_backward", "sharding")
_STEP = (
    "gpu", "memory", "seq_len", "attention", "clip_grad_norm", "keep_grads", "padding_mask", "empty_cache",
    "alloc_conf", "state_dtype",
)  # fmt: skip


def check_question(
    model: str | ModelSpec,
    *,
    optimizer: str | Sequence[str] | None = None,
    options: Mapping[str, object] | Sequence[str] | None = None,
    **flags: Unpack[SearchFlags],
) -> Question:
    """The question that these flags make.

    Raises:
        ConfigError: A name is unknown, a number out of range, two flags contradict each other, or the model's family
            has no step rules.
        TypeError: A flag is none of `SearchFlags`.
    """
    strange = set(flags) - set(SearchFlags.__annotations__)
    if strange:
        raise TypeError(f"a search has no flag {min(strange)!r}")
    spec = model if isinstance(model, ModelSpec) else load_model(model)
    asked: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    prefer = asked.get("prefer", "quality")
    if prefer not in RULES:
        raise unknown("preference for --prefer", prefer, RULES)
    fixed = {name: asked[name] for name in _SEARCHED if name in asked}
    base = check_request(spec, **{name: asked[name] for name in _STEP if name in asked}, **_checked(fixed))
    if not has_rules(spec):
        raise ConfigError(f"{spec.model_type} models have no step rules in this version: nothing can be searched")
    names = (optimizer,) if isinstance(optimizer, str) else tuple(optimizer) if optimizer else None
    settings = _texts(options)
    reserve = _size(asked.get("reserve", 0))
    return Question(
        model=model,
        base=base,
        space=_space(base, asked, fixed, _members(names, settings, base.state_dtype)),
        limit_bytes=_limit(base.gpu, asked.get("budget"), reserve),
        reserve_bytes=reserve,
        prefer=prefer,
        fixed=fixed | ({"optimizer": list(names)} if names else {}),
        asked=asked,
        optimizers=names,
        settings=settings,
    )


def _space(base: StepRequest, asked: dict[str, Any], fixed: dict[str, Any], members: tuple[Member, ...]) -> Space:
    """The space that is left once some options are fixed."""
    counts = gpu_counts(asked.get("gpus", 1))
    sequences = _sequences(base, asked, counts, fixed)
    sharding = _sharding(fixed, counts)
    return Space(
        members=members,
        precisions=_one(fixed.get("precision"), _usable_precisions(base.gpu)),
        checkpointing=_one(fixed.get("checkpointing"), CHECKPOINTING),
        fused_losses=_one(fixed.get("fused_loss"), ("none", *fused_losses_of(base.model)[:1])),
        backward_steps=_one(fixed.get("step_in_backward"), (False, True)),
        sequences=sequences,
        micro_batches={count: _micro_batches(fixed, sequences, count) for count in counts},
        layouts=tuple(layout for count in counts for layout in _layouts(count, base.gpu, sharding)),
    )


def _members(
    names: tuple[str, ...] | None, settings: tuple[str, ...] | None, state_dtype: Dtype | None
) -> tuple[Member, ...]:
    """The optimizers to search; with a state dtype given, in that one alone."""
    members = all_members(names, settings)
    return members if state_dtype is None else tuple(member for member in members if member.state_dtype is None)


def _checked(fixed: dict[str, Any]) -> dict[str, Any]:
    """The fixed options for `check_request`; those that may contradict others only in some configurations are left."""
    if "checkpointing" in fixed and fixed["checkpointing"] not in KNOWN_CHECKPOINTING:
        raise unknown("checkpointing for --checkpointing", str(fixed["checkpointing"]), KNOWN_CHECKPOINTING)
    if "fused_loss" in fixed and fixed["fused_loss"] not in FUSED_LOSS:
        raise unknown("fused-loss for --fused-loss", str(fixed["fused_loss"]), FUSED_LOSS)
    if "sharding" in fixed and fixed["sharding"] not in SHARDINGS:
        raise unknown("sharding for --sharding", str(fixed["sharding"]), SHARDINGS)
    # What no other choice could make up for is refused here, such as a step in backward with clipping.
    always = {"step_in_backward": True} if fixed.get("step_in_backward") else {}
    return always | {name: value for name, value in fixed.items() if name in ("precision", "batch_size")}


def gpu_counts(text: int | str) -> tuple[int, ...]:
    """The numbers of GPUs that `--gpus` means: one, or the powers of two and the ends of a range such as `1..8`.

    Raises:
        ConfigError: The text is neither, or the numbers are out of range.
    """
    match = re.fullmatch(r"([0-9]{1,6})(?:\.\.([0-9]{1,6}))?", str(text))
    if not match:
        raise ConfigError(f"--gpus takes a number or a range such as 1..8, got {shorten(text)}")
    low, high = int(match[1]), int(match[2] or match[1])
    if not 1 <= low <= high:
        raise ConfigError(f"--gpus takes a number or a range such as 1..8, got {shorten(text)}")
    if high > MOST_GPUS:
        raise ConfigError(f"--gpus {text} is beyond the {MOST_GPUS} that are searched")
    return tuple(count for count in range(low, high + 1) if count in (low, high) or count & (count - 1) == 0)


def _sharding(fixed: dict[str, Any], counts: tuple[int, ...]) -> str | None:
    """The sharding that was given, if it can hold on any of these numbers of GPUs."""
    sharding = fixed.get("sharding")
    if sharding == "none" and counts[-1] > 1:
        known = ", ".join(name for name in SHARDINGS if name != "none")
        raise ConfigError(f"--gpus {counts[-1]} needs a --sharding strategy: {known}")
    if sharding not in (None, "none") and counts[-1] == 1:
        raise ConfigError(f"--sharding {sharding} needs --gpus of at least 2, got 1")
    return None if sharding == "none" else sharding


def _layouts(count: int, gpu: Gpu, sharding: str | None) -> tuple[Layout, ...]:
    """The shardings tried on so many GPUs; the one asked for wherever there are several."""
    if count == 1:
        return (Layout(1, "none"),)
    hybrid = ("fsdp2-hybrid",) if 1 < usual_num_nodes(count, gpu.id) < count else ()
    return tuple(Layout(count, name) for name in ((sharding,) if sharding else (*_SHARDINGS, *hybrid)))


def _sequences(base: StepRequest, asked: dict[str, Any], counts: tuple[int, ...], fixed: dict[str, Any]) -> int:
    """Sequences of one step: what `--tokens-per-step` holds, or a power of two; a multiple of all micro-batches."""
    tokens = asked.get("tokens_per_step", DEFAULT_TOKENS_PER_STEP)
    if type(tokens) is not int or not 1 <= tokens <= _MOST_TOKENS:
        raise ConfigError(f"--tokens-per-step must be an integer between 1 and {_MOST_TOKENS}, got {shorten(tokens)}")
    seq_len = base.config.seq_len
    sequences = max(1, tokens // seq_len)
    if "tokens_per_step" not in asked:
        sequences = 1 << (sequences.bit_length() - 1)
    if "tokens_per_step" in asked and tokens % seq_len:
        raise ConfigError(f"--tokens-per-step {tokens} is not a whole number of sequences of {seq_len} tokens")
    largest = counts[-1] * int(fixed.get("batch_size", 1))
    if sequences % largest == 0:
        return sequences
    if "tokens_per_step" in asked:
        per_gpu = f"micro-batches of {fixed.get('batch_size', 1)} on {counts[-1]} GPUs"
        raise ConfigError(f"--tokens-per-step {tokens} makes {sequences} sequences, which {per_gpu} do not divide")
    return -(-sequences // largest) * largest


def _micro_batches(fixed: dict[str, Any], sequences: int, count: int) -> tuple[int, ...]:
    if "batch_size" in fixed:
        return (int(fixed["batch_size"]),)
    return divisors(sequences // count)


def _usable_precisions(gpu: Gpu) -> tuple[str, ...]:
    """The number formats that the GPU computes in natively."""
    return PRECISIONS if gpu.supports_bf16 else ("fp16-amp", "fp32")


def _one(fixed: Any, searched: tuple[Any, ...]) -> tuple[Any, ...]:
    return searched if fixed is None else (fixed,)


def _texts(options: Mapping[str, object] | Sequence[str] | None) -> tuple[str, ...] | None:
    if isinstance(options, Mapping):
        return tuple(f"{name}={value}" for name, value in options.items())
    return tuple(options) if options else None


def _size(value: str | int) -> int:
    return parse_size(value) if isinstance(value, str) and value != "0" else int(value)


def _limit(gpu: Gpu, budget: str | int | None, reserve: int) -> int:
    limit = gpu.usable_bytes if budget is None else min(gpu.usable_bytes, _size(budget))
    if limit < 1:
        raise ConfigError(f"--budget must be more than 0, got {shorten(budget)}")
    if reserve >= limit:
        raise ConfigError(f"--reserve {format_gib(reserve)} leaves nothing of {format_gib(limit)}")
    return limit - reserve
