"""What training on several GPUs allocates by itself: FSDP2's gathered parameters and buffers, DDP's buckets.

While a step is recorded FSDP2's own methods are followed, which allocator event they begin and end at, and what they
make bears the names that a trace of the same step gives it. DDP makes its buckets before; they are known by the
gradients that are views of them, or, where gradients are not, by their sizes.

Source: torch `distributed/fsdp/_fully_shard/_fsdp_param.py`, `_fsdp_param_group.py`, `_fsdp_collectives.py` (the
methods that allocate), `nn/parallel/distributed.py` (`_get_ddp_logging_data`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from optplan.planner.timeline import Category
from optplan.profilers.group_names import reduced_gradient_names
from optplan.profilers.live.owners import Owner

BUCKET = "gradient bucket"
CAST: tuple[Category, str] = ("communication", "cast for communication")
"""What is made on streams of FSDP2's own and by none of the methods that are followed."""

_BUFFERS = {"_all_gather_comm": "all-gather output", "_reduce_scatter_comm": "reduce-scatter buffer"}
"""FSDP2's collectives, and the names of what they allocate."""


class NamedEvents(NamedTuple):
    """Allocations from event `begin` to before `end`, counted from 0, are of this owner."""

    begin: int
    end: int
    owner: Owner


def inner_model(model: nn.Module) -> nn.Module:
    """The module itself, of one in DistributedDataParallel."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def strategy_of(model: nn.Module) -> str | None:
    """`ddp` or `fsdp2` for a module divided so, as `--sharding` names it, None for others."""
    if isinstance(model, DistributedDataParallel):
        return "ddp" if model.gradient_as_bucket_view else "ddp-copies"
    return "fsdp2" if any(True for _ in parameter_groups(model)) else None


def parameter_groups(model: nn.Module) -> Iterator[Any]:
    """FSDP2's groups of parameters that are gathered together."""
    for module in model.modules():
        find_state = getattr(module, "_get_fsdp_state", None)
        if find_state is not None:
            state = find_state()
            groups = getattr(state, "_fsdp_param_groups", None)
            found = [state._fsdp_param_group] if groups is None else groups
            yield from (group for group in found if group is not None)


class GradientNames:
    """Names the memory in which a gradient lies as a trace does: FSDP2's by the layer, DDP's as a bucket."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._reduced: dict[int, str] | None = None
        self._has_buckets = isinstance(model, DistributedDataParallel) and model.gradient_as_bucket_view

    def __call__(self, name: str, parameter: nn.Parameter) -> str:
        """The name for this parameter's gradient."""
        if self._reduced is None:
            # Where there is a gradient, a forward has been, and FSDP2 knows the names of its layers.
            self._reduced = reduced_gradient_names(parameter_groups(self._model))
        return BUCKET if self._has_buckets else self._reduced.get(id(parameter), name)


def bucket_sizes(model: nn.Module) -> frozenset[int]:
    """Bytes of DDP's buckets whose gradients are not views of them."""
    if not isinstance(model, DistributedDataParallel) or model.gradient_as_bucket_view:
        return frozenset()
    facts: dict[str, Any] = model._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    listed = facts.get("rebuilt_bucket_sizes") or facts.get("bucket_sizes") or ""
    return frozenset(int(size) for size in str(listed).split(",") if size.strip().isdigit())


class CommunicationFollower:
    """Notes which allocator events belong to FSDP2's methods.

    Attributes:
        ranges: What was noted, in the order in which the methods began.
    """

    def __init__(self, model: nn.Module, *, count_events: Callable[[], int]) -> None:
        """Prepare to follow.

        Args:
            model: With FSDP2 applied to it, or not: then there is nothing to follow.
            count_events: Allocations and frees so far.
        """
        self.ranges: list[NamedEvents] = []
        self._model = model
        self._count = count_events
        self._wrapped: list[tuple[Any, str]] = []

    def start(self, *, on_reduction: Callable[[Any], None]) -> None:
        """Follow from now on.

        Args:
            on_reduction: Called with a group before its whole gradients are reduced and freed.
        """
        self.ranges.clear()
        for group in parameter_groups(self._model):
            self._wrap(group, "post_backward", partial(_telling, on_reduction, group))
            for collective, name in _BUFFERS.items():
                self._name(getattr(group, collective, None), "allocate", Owner("communication", name))
            for parameter in group.fsdp_params:
                owner = Owner("parameters", f"gathered {parameter._param_fqn}")
                for method in ("init_all_gather_outputs", "alloc_all_gather_outputs"):
                    self._name(parameter, method, owner)

    def stop(self) -> None:
        """Follow no longer; FSDP2's methods are its own again."""
        while self._wrapped:
            owner, name = self._wrapped.pop()
            vars(owner).pop(name, None)

    def _name(self, owner: Any, method: str, label: Owner) -> None:
        """Give what a method allocates a name."""
        if owner is not None and hasattr(owner, method):
            self._wrap(owner, method, lambda original: self._noting(original, label))

    def _wrap(self, owner: Any, method: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        setattr(owner, method, make(getattr(owner, method)))
        self._wrapped.append((owner, method))

    def _noting(self, original: Callable[..., Any], label: Owner) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            begin, place = self._count(), len(self.ranges)
            result = original(*args, **kwargs)
            self.ranges.insert(place, NamedEvents(begin, self._count(), label))
            return result

        return noted


def _telling(on_reduction: Callable[[Any], None], group: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(*args: Any, **kwargs: Any) -> Any:
        on_reduction(group)
        return original(*args, **kwargs)

    return reduce
