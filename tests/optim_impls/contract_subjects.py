"""Our optimizers with their options, as the contract that all keep to is checked on them."""

from __future__ import annotations

import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from optplan.optim_impls import AdamMini, AdamW, Adapprox, MicroAdam
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Allocation, TimelineBuilder

MINI_CASES = runpy.run_path(str(Path(__file__).parent / "adam_mini" / "mini_cases.py"))["CASES"]
CLASSES: dict[str, Any] = {"adamw": AdamW, "adam-mini": AdamMini, "micro-adam": MicroAdam, "adapprox": Adapprox}


class Agreement(NamedTuple):
    """How near kernels and reference are.

    Attributes:
        num_steps: After so many steps.
        relative: In units of fp32, and of a dtype of 16 bits.
        absolute: In units of the dtype.
        exact: State that is equal bit by bit.
        flipped: Most of a tensor of 16 bits that may be rounded to the other side.
    """

    num_steps: int
    relative: tuple[int, int]
    absolute: float
    exact: tuple[str, ...] = ()
    flipped: float = 0.02


class Subject(NamedTuple):
    """One optimizer with its options.

    Attributes:
        optimizer: Its id in the planner.
        described: Its parameters.
        options: Of the class.
        planned: The same in the planner's words.
        agreement: Of kernels and reference; None where steps do not stay near each other.
        numbers: What may change in a step of a param group without another kernel.
        num_steps: Of runs that are compared bit by bit.
        scaled: Whether rows and columns of gradients are of sizes of their own, as factors need to be right.
    """

    optimizer: str
    described: tuple[Parameter, ...]
    options: Mapping[str, Any]
    planned: Mapping[str, Any]
    agreement: Agreement | None
    numbers: Mapping[str, Any]
    num_steps: int = 6
    scaled: bool = False

    def build(self, parameters: Sequence[torch.nn.Parameter], **more: Any) -> torch.optim.Optimizer:
        """The optimizer of tensors of the shapes described."""
        options = {"lr": 1e-2, **self.options, **more}
        if self.optimizer == "adam-mini":
            options["roles"] = dict(zip(parameters, self.described, strict=True))
        optimizer: torch.optim.Optimizer = CLASSES[self.optimizer](list(parameters), **options)
        return optimizer

    def peak_bytes(self, **planned: Any) -> int:
        """Most bytes that the planner lets a step over bf16 tensors allocate."""
        timeline = TimelineBuilder("step")
        model = build_optimizer(self.optimizer, {**self.planned, **planned}).bind(self.described)
        model.write_step(timeline, self.described, OptimizerContext("bfloat16", "bfloat16"))
        sizes, alive, peak = {}, 0, 0
        for event in timeline.events:
            if isinstance(event, Allocation):
                sizes[event.id] = event.bytes
            alive += sizes[event.id] if isinstance(event, Allocation) else -sizes[event.id]
            peak = max(peak, alive)
        return peak


def _described(*shapes: tuple[int, ...]) -> tuple[Parameter, ...]:
    return tuple(Parameter(f"p{place}", shape, "other", "linear") for place, shape in enumerate(shapes))


_FLAT = _described((1,), (63,), (255,), (4097,), (37, 101), (), (0,), (70001,), (3, 65536), (2050, 3), (200000,))
_MATRICES = _described(
    (300, 520), (129, 1000), (37, 101), (1000, 64), (64, 3, 5, 5), (6000, 40), (40, 9000), (4097,), (1, 9), (), (0,)
)
_OF_MICRO = ("error_feedback", "bucket_min", "bucket_max", "window_indices", "window_values")


def _adamw(rounding: str) -> Subject:
    options, planned = {"rounding": rounding, "weight_decay": 0.1}, {"implementation": "optplan", "rounding": rounding}
    numbers = {"weight_decay": 0.0, "betas": (0.0, 0.5), "eps": 1.0}
    # The arithmetic's last bit may decide a rounding, rarely one in two of the steps.
    return Subject("adamw", _FLAT, options, planned, Agreement(5, (16, 2), 1 / 8), numbers)


def _adam_mini(rounding: str) -> Subject:
    options = {"rounding": rounding, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-6, "lr": 0.02}
    described = tuple(parameter for parameter, _ in MINI_CASES.values())
    numbers = {"weight_decay": 0.2, "betas": (0.0, 0.5), "eps": 1.0}
    return Subject("adam-mini", described, options, {}, Agreement(1, (16, 1), 1 / 8), numbers)


def _micro_adam(**options: Any) -> Subject:
    planned = {name: options[name] for name in ("alpha", "window", "block", "bucket", "density") if name in options}
    # More steps than the window has rows, so that the slot goes round; a last bit of the sums may decide a rounding.
    agreement = Agreement(13, (64, 4), 1.0, exact=_OF_MICRO, flipped=1.0)
    numbers = {"betas": (0.0, 0.5), "eps": 1.0, "seed": 16}
    return Subject("micro-adam", _FLAT, options, planned, agreement, numbers, num_steps=23)


def _adapprox(**options: Any) -> Subject:
    planned = {"rank": options.get("rank", 32), "beta1": options.get("betas", (0.9,))[0]}
    return Subject("adapprox", _MATRICES, options, planned, None, {"weight_decay": 0.2, "clip": 0.7}, scaled=True)


SUBJECTS: dict[str, Subject] = {
    "adamw": _adamw("nearest"),
    "adamw-stochastic": _adamw("stochastic"),
    "adamw-kahan": _adamw("kahan"),
    "adam-mini": _adam_mini("nearest"),
    "adam-mini-stochastic": _adam_mini("stochastic"),
    "micro-adam": _micro_adam(),
    "micro-adam-decay-stochastic": _micro_adam(weight_decay=0.1, rounding="stochastic", seed=3),
    "micro-adam-dense": _micro_adam(alpha=0.25),
    "adapprox": _adapprox(),
    "adapprox-no-momentum": _adapprox(betas=(0.0, 0.999)),
    "adapprox-rank-20": _adapprox(rank=20),
    "adapprox-rank-64": _adapprox(rank=64, clip=0.5),
}
