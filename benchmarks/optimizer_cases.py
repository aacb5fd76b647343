"""The optimizers that record_optimizers.py steps, each built as its package's users build it.

A builder takes the model's parameters, the planner's description beside each tensor, and returns the optimizers whose
steps make one step together. Bases and projectors are renewed at every step or at every second one, so that the third
step is one that renews them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch

from optplan.planner.optimizers.low_rank import is_projected
from optplan.planner.optimizers.muon import is_hidden_matrix
from optplan.planner.tensors import Parameter

Pair = tuple[Parameter, torch.nn.Parameter]
Builder = Callable[[Sequence[Pair]], list[torch.optim.Optimizer]]


class Case(NamedTuple):
    """One optimizer: its id and options in the planner, the package it is in, and how to build it."""

    optimizer: str
    options: dict[str, str]
    package: str
    build: Builder


def simple(path: str, **settings: Any) -> Builder:
    """`module:Class` called with the list of tensors and `settings`."""

    def build(pairs: Sequence[Pair]) -> list[torch.optim.Optimizer]:
        module, _, name = path.partition(":")
        return [getattr(import_module(module), name)([tensor for _, tensor in pairs], **settings)]

    return build


def muon(*, nesterov: bool) -> Builder:
    """Muon for the hidden matrices, fused AdamW for the rest."""

    def build(pairs: Sequence[Pair]) -> list[torch.optim.Optimizer]:
        hidden = [tensor for parameter, tensor in pairs if is_hidden_matrix(parameter)]
        rest = [tensor for parameter, tensor in pairs if not is_hidden_matrix(parameter)]
        return [torch.optim.Muon(hidden, nesterov=nesterov), torch.optim.AdamW(rest, fused=True)]

    return build


def adam_mini(pairs: Sequence[Pair]) -> list[torch.optim.Optimizer]:
    """The authors' Adam-mini, told the hidden size and the heads of the first matrix that holds queries."""
    query = next(p for p, _ in pairs if p.heads is not None and p.heads.num_query_heads and len(p.shape) == 2)
    assert query.heads is not None
    return [
        import_module("adam_mini").Adam_mini(
            [(parameter.name, tensor) for parameter, tensor in pairs],
            weight_decay=0.1,
            dim=query.numel // query.num_output_neurons,
            n_heads=query.heads.num_query_heads,
            verbose=False,
        )
    ]


def low_rank(path: str, target: str, **settings: Any) -> Builder:
    """Two param groups as trainers make them: what is not projected first, then what is, with `settings`."""

    def build(pairs: Sequence[Pair]) -> list[torch.optim.Optimizer]:
        dense = [tensor for parameter, tensor in pairs if not is_projected(parameter, target)]
        projected = [tensor for parameter, tensor in pairs if is_projected(parameter, target)]
        group = {"params": projected, "update_proj_gap": 2, "proj_type": "std", "scale": 1.0, **settings}
        module, _, name = path.partition(":")
        return [getattr(import_module(module), name)([{"params": dense}, group], no_deprecation_warning=True)]

    return build


_HF = {"lr": 1e-3, "scale_parameter": False, "relative_step": False}
_FOREACH, _FOR_LOOP = {"implementation": "foreach"}, {"implementation": "for-loop"}
_OFFICIAL, _PORT = {"implementation": "official"}, {"implementation": "pytorch_optimizer"}
_TORCHAO, _TRANSFORMERS = {"implementation": "torchao"}, {"implementation": "transformers"}
_ALL = {"target": "all-matrices"}
_MINI = {"rank": "1", "scale_type": "tensor"}
_GALORE, _APOLLO = "galore_torch:GaLoreAdamW", "apollo_torch:APOLLOAdamW"
_APOLLO_GROUP: dict[str, Any] = {"proj": "random", "rank": 256, "scale_type": "channel"}

CASES: tuple[Case, ...] = (
    # Compiled for every shape, or slow: first, so that nobody waits for them at the end.
    Case("adamw-8bit", _TORCHAO, "torchao", simple("torchao.optim:AdamW8bit")),
    Case("adamw-4bit", {}, "torchao", simple("torchao.optim:AdamW4bit")),
    Case("adamw-fp8", {}, "torchao", simple("torchao.optim:AdamWFp8")),
    Case("soap", _PORT, "pytorch_optimizer", simple("pytorch_optimizer:SOAP", precondition_frequency=1)),
    Case("galore", _ALL, "galore-torch", low_rank(_GALORE, "all-matrices", rank=128)),
    Case("galore", {}, "galore-torch", low_rank(_GALORE, "linear", rank=128)),
    Case("apollo", _ALL, "apollo-torch", low_rank(_APOLLO, "all-matrices", **_APOLLO_GROUP)),
    Case("apollo", {}, "apollo-torch", low_rank(_APOLLO, "linear", **_APOLLO_GROUP)),
    Case(
        "apollo", _MINI, "apollo-torch", low_rank(_APOLLO, "linear", proj="random", rank=1, scale_type="tensor")
    ),
    Case("adamw", {}, "torch", simple("torch.optim:AdamW", fused=True)),
    Case("adamw", _FOREACH, "torch", simple("torch.optim:AdamW", foreach=True)),
    Case("adamw", _FOR_LOOP, "torch", simple("torch.optim:AdamW", foreach=False)),
    Case("adamw", _FOREACH | {"amsgrad": "true"}, "torch", simple("torch.optim:AdamW", foreach=True, amsgrad=True)),
    Case("sgd", {}, "torch", simple("torch.optim:SGD", momentum=0.9, fused=True)),
    Case(
        "sgd", _FOREACH | {"weight_decay": "0.1"}, "torch",
        simple("torch.optim:SGD", momentum=0.9, weight_decay=0.1, foreach=True),
    ),
    Case(
        "sgd", _FOR_LOOP | {"weight_decay": "0.1", "nesterov": "true"}, "torch",
        simple("torch.optim:SGD", momentum=0.9, weight_decay=0.1, nesterov=True, foreach=False),
    ),
    Case("adafactor", {}, "torch", simple("torch.optim:Adafactor")),
    Case("adafactor", {"foreach": "true"}, "torch", simple("torch.optim:Adafactor", foreach=True)),
    Case("adafactor", _TRANSFORMERS, "transformers", simple("transformers.optimization:Adafactor", **_HF)),
    Case(
        "adafactor", _TRANSFORMERS | {"beta1": "0.9"}, "transformers",
        simple("transformers.optimization:Adafactor", beta1=0.9, **_HF),
    ),
    Case("lion", {}, "pytorch_optimizer", simple("pytorch_optimizer:Lion", foreach=True)),
    Case("lion", {"foreach": "false"}, "pytorch_optimizer", simple("pytorch_optimizer:Lion", foreach=False)),
    Case("muon", {}, "torch", muon(nesterov=True)),
    Case("muon", {"nesterov": "false"}, "torch", muon(nesterov=False)),
    Case("adam-mini", _OFFICIAL, "adam-mini", adam_mini),
    Case(
        "micro-adam", _OFFICIAL, "ista-daslab-optimizers",
        simple("ista_daslab_optimizers.micro_adam:MicroAdam", m=10, lr=1e-4, quant_block_size=64),
    ),
    Case(
        "micro-adam", _OFFICIAL | {"bucket": "100000"}, "ista-daslab-optimizers",
        simple("ista_daslab_optimizers.micro_adam:MicroAdam", m=10, lr=1e-4, quant_block_size=100_000),
    ),
    Case("adamw-8bit", {}, "bitsandbytes", simple("bitsandbytes.optim:AdamW8bit")),
    Case("paged-adamw-8bit", {}, "bitsandbytes", simple("bitsandbytes.optim:PagedAdamW8bit")),
    Case("came", {}, "came-pytorch", simple("came_pytorch.CAME:CAME", lr=1e-3, weight_decay=0.1)),
    Case("sm3", {}, "pytorch_optimizer", simple("pytorch_optimizer:SM3")),
    Case("sm3", {"momentum": "0.9"}, "pytorch_optimizer", simple("pytorch_optimizer:SM3", momentum=0.9)),
    Case("flash-adamw", {"master": "24bit"}, "flashoptim", simple("flashoptim:FlashAdamW", master_weight_bits=24)),
    Case("flash-adamw", {"master": "none"}, "flashoptim", simple("flashoptim:FlashAdamW", master_weight_bits=None)),
)  # fmt: skip
