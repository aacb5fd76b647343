"""The space that is searched: every value of every dimension, declared in one place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from optplan.planner.candidates import choose_optimizers
from optplan.planner.dtypes import Dtype
from optplan.planner.optimizers.base import OptimizerModel
from optplan.planner.optimizers.registry import OPTIMIZERS, build_optimizer

PRECISIONS = ("bf16", "amp", "mixed", "fp16-amp", "fp32")
CHECKPOINTING = ("none", "selective", "full")
DEFAULT_TOKENS_PER_STEP = 65536

_SETTINGS: dict[tuple[str, str], tuple[dict[str, Any], ...]] = {
    ("adamw", "optplan"): tuple({"rounding": rounding} for rounding in ("nearest", "stochastic", "kahan")),
    ("micro-adam", "optplan"): tuple(
        {"window": window, "density": density} for window in (5, 10, 20) for density in (0.005, 0.01, 0.02)
    ),
    ("adapprox", "optplan"): tuple({"rank": rank, "beta1": beta1} for rank in (32, 128, "max") for beta1 in (0.9, 0)),
    ("sgd", "fused"): ({"momentum": 0.9}, {"momentum": 0.0}),
    ("adafactor", "transformers"): ({"beta1": "none"}, {"beta1": 0.9}),
    ("galore", "galore_torch"): ({"rank": 128}, {"rank": 512}),
    ("apollo", "apollo_torch"): ({"rank": 256}, {"rank": 1, "scale_type": "tensor"}),
}
"""Options searched by optimizer and implementation; the defaults alone of all others."""


class Member(msgspec.Struct, frozen=True):
    """An optimizer with its options and the dtype asked for its state (None: its own choice)."""

    optimizer: OptimizerModel
    state_dtype: Dtype | None = None


class Layout(msgspec.Struct, frozen=True):
    """How many GPUs work together, and what each of them keeps."""

    gpus: int
    sharding: str


class Manner(msgspec.Struct, frozen=True):
    """How forward and backward are run, apart from number formats and batch."""

    checkpointing: str
    fused_loss: str
    step_in_backward: bool


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """Every combination of these values is a configuration.

    Attributes:
        members: Optimizers with their options and state dtypes.
        precisions: As `--precision`; likewise the next three.
        sequences: Sequences of one step over all GPUs.
        micro_batches: Sequences of one micro-batch, by layout; the rest of the step is accumulated.
        layouts: Numbers of GPUs with the shardings tried on them.
    """

    members: tuple[Member, ...]
    precisions: tuple[str, ...]
    checkpointing: tuple[str, ...]
    fused_losses: tuple[str, ...]
    backward_steps: tuple[bool, ...]
    sequences: int
    micro_batches: dict[int, tuple[int, ...]]
    layouts: tuple[Layout, ...]

    @property
    def manners(self) -> list[Manner]:
        """Every way of running forward and backward."""
        return [
            Manner(checkpointing, fused_loss, in_backward)
            for in_backward in self.backward_steps
            for fused_loss in self.fused_losses
            for checkpointing in self.checkpointing
        ]

    @property
    def size(self) -> int:
        """How many configurations it holds."""
        batches = sum(len(self.micro_batches[layout.gpus]) for layout in self.layouts)
        return len(self.members) * len(self.precisions) * len(self.manners) * batches


def all_members(names: Sequence[str] | None, options: Sequence[str] | None) -> tuple[Member, ...]:
    """The optimizers to search: all with the settings of the space, or those named, exactly as set with `--set`.

    Raises:
        ConfigError: An optimizer, an option or a value is unknown.
    """
    if options:
        return tuple(Member(choice.optimizer) for choice in choose_optimizers(names, options))
    chosen = [choice.id for choice in choose_optimizers(names)]
    return tuple(member for name in chosen for member in _members_of(name))


def _members_of(name: str) -> Iterator[Member]:
    for implementation in OPTIMIZERS[name].implementations:
        for settings in _SETTINGS.get((name, implementation), ({},)):
            optimizer = build_optimizer(name, {"implementation": implementation, **settings})
            yield Member(optimizer)
            yield from (Member(optimizer, dtype) for dtype in type(optimizer).STATE_DTYPES)


def divisors(number: int) -> tuple[int, ...]:
    """Every divisor, the smallest first."""
    return tuple(size for size in range(1, number + 1) if number % size == 0)
