"""The optimizers of `train_study.py`: how each is built, which learning rates it tries, and whose it takes over.

Betas are (0.9, 0.95), as is usual for language models, but for MicroAdam's, whose short window of gradients wants the
slow decay of its paper; weight decay is 0.1 on matrices, none on vectors. A new optimizer is a row of `SUBJECTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from train_study_model import ByteGPT

from optplan import optim_impls

Betas = tuple[float, float]
Build = Callable[[ByteGPT, float, Betas], torch.optim.Optimizer]

BETAS: Betas = (0.9, 0.95)
WEIGHT_DECAY = 0.1


class Subject(NamedTuple):
    """One optimizer of the study.

    Attributes:
        build: Makes it for a model, a learning rate and betas.
        options: What distinguishes it, for the record.
        learning_rates: Tried with the first seed, from low to high; empty to take over those of `follows`.
        follows: The subject whose best learning rate this one runs with, as a control.
        num_seeds: Runs at the best learning rate.
        dtype: Of the parameters; the passes are bf16 (autocast) in every case.
        package: What must be importable; without it the subject is left out.
        betas: Decays of the moments.
        part: Length of its runs, as part of the study's.
    """

    build: Build
    options: dict[str, Any]
    learning_rates: tuple[float, ...] = ()
    follows: str = ""
    num_seeds: int = 3
    dtype: torch.dtype = torch.float32
    package: str = ""
    betas: Betas = BETAS
    part: float = 1.0

    def is_available(self) -> bool:
        """Whether its package is there."""
        return not self.package or find_spec(self.package) is not None


def param_groups(model: ByteGPT) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors without."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _plain(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Build:
    return lambda model, lr, betas: make(param_groups(model), lr=lr, betas=betas, **options)


def _torch_adamw(model: ByteGPT, lr: float, betas: Betas) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model), lr=lr, betas=betas, fused=True)


def _adam_mini(model: ByteGPT, lr: float, betas: Betas) -> torch.optim.Optimizer:
    return optim_impls.AdamMini.from_module(model, params=param_groups(model), lr=lr, betas=betas)


def _adam_mini_official(model: ByteGPT, lr: float, betas: Betas) -> torch.optim.Optimizer:
    """The authors' package; it takes roles from names, and exempts what is called a norm from weight decay."""
    from adam_mini import Adam_mini

    size, named = model.size, list(model.named_parameters())
    how = {"weight_decay": WEIGHT_DECAY, "dim": size.width, "n_heads": size.heads, "verbose": False}
    return Adam_mini(named, lr=lr, betas=betas, **how)


def _micro_adam_official(model: ByteGPT, lr: float, betas: Betas) -> torch.optim.Optimizer:
    """The authors' package, which takes bf16 alone; window, density and buckets as ours."""
    from ista_daslab_optimizers import MicroAdam

    return MicroAdam(param_groups(model), m=10, lr=lr, quant_block_size=64, k_init=0.01, betas=betas)


_RATES = (1e-3, 2e-3, 4e-3)
_MICRO = {"window": 10, "density": 0.01}
_DENSE = {"window": 10, "density": 0.1}
_SLOW = (0.9, 0.999)
_BF16 = {"parameters": "bfloat16"}
_FAST, _PAPER = {"mode": "fast", "rank": 32}, {"mode": "paper", "rank": 32}

SUBJECTS = {
    "torch-adamw": Subject(_torch_adamw, {"implementation": "torch fused"}, _RATES),
    "adamw": Subject(_plain(optim_impls.AdamW), {}, follows="torch-adamw"),
    "adam-mini": Subject(_adam_mini, {}, _RATES),
    "adam-mini-official": Subject(
        _adam_mini_official, {"implementation": "adam-mini 1.1.1"}, follows="adam-mini", num_seeds=1,
        package="adam_mini",
    ),
    "adapprox": Subject(_plain(optim_impls.Adapprox, **_FAST), _FAST, (5e-4, 1e-3, 2e-3)),
    # The paper's mode takes a hundred times as long, so it is held against the fast mode over shorter runs.
    "adapprox-short": Subject(
        _plain(optim_impls.Adapprox, **_FAST), _FAST, follows="adapprox", num_seeds=1, part=0.2
    ),
    "adapprox-paper": Subject(
        _plain(optim_impls.Adapprox, **_PAPER), _PAPER, follows="adapprox", num_seeds=1, part=0.2
    ),
    "micro-adam": Subject(_plain(optim_impls.MicroAdam, **_MICRO), _MICRO, _RATES, betas=_SLOW),
    "micro-adam-dense": Subject(_plain(optim_impls.MicroAdam, **_DENSE), _DENSE, _RATES, betas=_SLOW),
    "micro-adam-bf16": Subject(
        _plain(optim_impls.MicroAdam, **_MICRO), {**_MICRO, **_BF16}, follows="micro-adam", num_seeds=1,
        dtype=torch.bfloat16, betas=_SLOW,
    ),
    "micro-adam-official": Subject(
        _micro_adam_official, {"implementation": "ista-daslab-optimizers 1.1.15", **_MICRO, **_BF16},
        follows="micro-adam", num_seeds=1, dtype=torch.bfloat16, package="ista_daslab_optimizers", betas=_SLOW,
    ),
}  # fmt: skip


def families(names: list[str]) -> list[list[str]]:
    """The named subjects, each leader with those that follow it."""
    leaders = [name for name in names if not SUBJECTS[name].follows]
    orphans = [name for name in names if SUBJECTS[name].follows and SUBJECTS[name].follows not in leaders]
    if orphans:
        raise SystemExit(f"{orphans[0]} takes its learning rate from {SUBJECTS[orphans[0]].follows}: name that one too")
    return [[leader, *(name for name in names if SUBJECTS[name].follows == leader)] for leader in leaders]
