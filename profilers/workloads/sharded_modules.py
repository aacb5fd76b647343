"""A module divided among ranks as users divide theirs: FSDP2 on every layer and on the whole, or DDP around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

FULLY_SHARDED: dict[str, bool] = {"fsdp2": True, "fsdp2-noreshard": False}
"""Strategies of `fully_shard`, and whether a layer drops what it gathered after its forward."""
REPLICATED = ("ddp", "ddp-copies", "zero1")
"""Strategies whose ranks hold the whole module, wrapped in DistributedDataParallel."""


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """The module's layers: the members of its outermost `ModuleList`s, in order."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from layers_of(child)


def fully_shard_module(
    module: nn.Module,
    *,
    mesh: Any,
    reshards: bool,
    mixed: bool,
    before_each: Callable[[nn.Module], Any] = lambda _: None,
    after_each: Callable[[], Any] = lambda: None,
) -> None:
    """Apply FSDP2 to every layer, then to the module with what is outside the layers.

    The root's parameters stay gathered from forward to backward, torch's own choice.

    Args:
        module: Changed in place.
        mesh: The ranks, of one dimension.
        reshards: Whether layers drop gathered parameters after forward.
        mixed: Whether fp32 shards are gathered as bf16 and gradients reduced in fp32.
        before_each: Called with each of them before, the module itself last.
        after_each: Called after each of them.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if mixed
        else MixedPrecisionPolicy()
    )
    for layer in layers_of(module):
        before_each(layer)
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshards, mp_policy=policy)
        after_each()
    # Left out, it is torch's own choice, which for the root is to keep what it gathered.
    root: dict[str, Any] = {} if reshards else {"reshard_after_forward": False}
    before_each(module)
    fully_shard(module, mesh=mesh, mp_policy=policy, **root)
    after_each()
