"""The optimizers that `bench_optimizers.py` times: how to build each, with which options, and how exact it must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from optplan import optim_impls
from optplan.planner.tensors import Parameter

Pair = tuple[Parameter, torch.nn.Parameter]


class Contender(NamedTuple):
    """One optimizer.

    Attributes:
        build: Makes it for parameters with the planner's descriptions, on the backend `triton` or `torch`, with a
            learning rate.
        options: The planner's options that describe what `build` makes.
        check_limits: Largest allowed difference of kernels and reference after three steps, as part of the update.
        optimizer_id: The planner's name, where it is not the contender's.
    """

    build: Callable[[Sequence[Pair], str, float], torch.optim.Optimizer]
    options: dict[str, Any]
    check_limits: dict[torch.dtype, float]
    optimizer_id: str = ""


def _adamw(pairs: Sequence[Pair], backend: str, lr: float) -> torch.optim.Optimizer:
    return optim_impls.AdamW([t for _, t in pairs], lr=lr, weight_decay=0.01, backend=backend)


def _adapprox(pairs: Sequence[Pair], backend: str, lr: float) -> torch.optim.Optimizer:
    return optim_impls.Adapprox([t for _, t in pairs], lr=lr, rank=32, backend=backend)


def _adapprox_without_momentum(pairs: Sequence[Pair], backend: str, lr: float) -> torch.optim.Optimizer:
    return optim_impls.Adapprox([t for _, t in pairs], lr=lr, betas=(0.0, 0.999), rank=32, backend=backend)


def _adapprox_as_paper(pairs: Sequence[Pair], backend: str, lr: float) -> torch.optim.Optimizer:
    return optim_impls.Adapprox([t for _, t in pairs], lr=lr, rank=32, mode="paper", backend=backend)


def _micro_adam(pairs: Sequence[Pair], backend: str, lr: float) -> torch.optim.Optimizer:
    return optim_impls.MicroAdam([t for _, t in pairs], lr=lr, backend=backend)


def _micro_adam_dense(pairs: Sequence[Pair], backend: str, lr: float) -> torch.optim.Optimizer:
    return optim_impls.MicroAdam([t for _, t in pairs], lr=lr, alpha=0.1, backend=backend)


def _micro_adam_official(pairs: Sequence[Pair], backend: str, lr: float) -> torch.optim.Optimizer:
    """The authors' packages ista-daslab-optimizers and -cuda, which take bf16 alone; window and buckets as ours.

    Its step leaves the update where the gradient was; how long its kernels take does not depend on the numbers there.
    """
    del backend
    from ista_daslab_optimizers import MicroAdam

    tensors = [t for _, t in pairs]
    if any(t.dtype != torch.bfloat16 for t in tensors):
        raise SystemExit("micro-adam-official takes bfloat16 alone; choose --dtypes bfloat16")
    return MicroAdam(tensors, m=10, lr=lr, quant_block_size=64, k_init=0.01)


def _adam_mini(pairs: Sequence[Pair], backend: str, lr: float) -> torch.optim.Optimizer:
    roles = {tensor: parameter for parameter, tensor in pairs}
    return optim_impls.AdamMini([t for _, t in pairs], roles=roles, lr=lr, weight_decay=0.01, backend=backend)


def _adam_mini_official(pairs: Sequence[Pair], backend: str, lr: float) -> torch.optim.Optimizer:
    """The authors' package adam-mini 1.1.1, told the width and heads of the model's first queries, if any."""
    del backend
    from adam_mini import Adam_mini

    named = [(parameter.name, tensor) for parameter, tensor in pairs]
    queries = [p for p, _ in pairs if p.heads is not None and p.heads.num_query_heads and len(p.shape) == 2]
    sizes = {"dim": queries[0].shape[1], "n_heads": queries[0].heads.num_query_heads} if queries else {}  # type: ignore[union-attr]
    return Adam_mini(named, lr=lr, weight_decay=0.01, verbose=False, **sizes)


CONTENDERS = {
    # A difference of the last bit before rounding to bf16 flips single results by a whole bf16 unit.
    "adamw": Contender(_adamw, {"implementation": "optplan"}, {torch.float32: 1e-3, torch.bfloat16: 0.05}),
    # Tensor cores round what they multiply to 11 bits.
    "adapprox": Contender(_adapprox, {"rank": 32}, {torch.float32: 1e-2, torch.bfloat16: 0.05}),
    "adapprox-no-momentum": Contender(
        _adapprox_without_momentum, {"rank": 32, "beta1": 0}, {torch.float32: 1e-2, torch.bfloat16: 0.05}, "adapprox"
    ),
    # The paper's five iterations from noise, with the second moment formed: in torch but for vectors.
    "adapprox-paper": Contender(
        _adapprox_as_paper, {"rank": 32, "mode": "paper"}, {torch.float32: 1e-3, torch.bfloat16: 0.05}, "adapprox"
    ),
    # Selection and codes agree bit by bit; sums of the window may differ in their last.
    "micro-adam": Contender(_micro_adam, {}, {torch.float32: 1e-3, torch.bfloat16: 0.05}),
    "micro-adam-dense": Contender(
        _micro_adam_dense, {"alpha": 0.1}, {torch.float32: 1e-3, torch.bfloat16: 0.05}, "micro-adam"
    ),
    "micro-adam-official": Contender(
        _micro_adam_official, {"implementation": "official"}, {torch.bfloat16: 0}, "micro-adam"
    ),
    "adam-mini": Contender(_adam_mini, {"implementation": "optplan"}, {torch.float32: 1e-3, torch.bfloat16: 0.05}),
    "adam-mini-official": Contender(
        _adam_mini_official, {"implementation": "official"}, {torch.float32: 0, torch.bfloat16: 0}, "adam-mini"
    ),
}
