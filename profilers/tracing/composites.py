"""Operations that torch takes apart differently on CUDA, and autocast: both decided above autograd.

The kernels here are registered for a dispatch key that no tensor carries (`AutocastPrivateUse1`); within `as_on_cuda`
every operation passes that key, and tensors without contents are treated as CUDA tensors would be.

Source: pytorch `aten/src/ATen/autocast_mode.h` (the lists), `autocast_mode.cpp` (`cached_cast`),
`native/transformers/attention.cpp`, `native/Dropout.cpp`, `native/SoftMax.cpp`, `native/layer_norm.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.library import Library, fallthrough_kernel

from optplan.profilers.tracing.attention import Chooser, attend
from optplan.profilers.tracing.autocast import CAST_LISTS, cast_arguments

aten = torch.ops.aten

_KEY = "AutocastPrivateUse1"
_LIBRARIES: list[Library] = []


@contextmanager
def as_on_cuda(chooser: Chooser) -> Iterator[None]:
    """Let operations on tensors without contents be composed as on a GPU, with the attention that `chooser` chooses."""
    global _chooser
    _register()
    previous, _chooser = _chooser, chooser
    key = getattr(torch._C.DispatchKey, _KEY)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch._C._IncludeDispatchKeyGuard(key):
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)
        _chooser = previous


_chooser = Chooser((8, 0))


@cache
def _register() -> None:
    """Register the kernels, once in a process; nothing reaches them outside `as_on_cuda`."""
    everything = Library("_", "IMPL")  # type: ignore[no-untyped-call]
    everything.fallback(fallthrough_kernel, _KEY)  # type: ignore[no-untyped-call]
    library = Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    _LIBRARIES.extend((everything, library))
    for policy, names in CAST_LISTS.items():
        for name in names:
            operation = _operation(name)
            if operation is not None and name not in _REPLACED:
                library.impl(name, _casting(operation, policy), _KEY)  # type: ignore[no-untyped-call]
    for name, replacement in _REPLACED.items():
        operation = _operation(name)
        if operation is not None:
            library.impl(name, _replacing(operation, replacement), _KEY)  # type: ignore[no-untyped-call]


def _operation(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet, None), overload or "default", None)


def _below() -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY))
    return torch._C._ExcludeDispatchKeyGuard(keys)


def _casting(operation: Any, policy: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _below():
            if torch.is_autocast_enabled("cuda"):
                args, kwargs = cast_arguments(policy, args, kwargs)
            return operation(*args, **kwargs)

    return run


def _replacing(operation: Any, replacement: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        first = args[0]
        with _below():
            if not isinstance(first, torch.Tensor) or first.device.type != "meta":
                return operation(*args, **kwargs)
            return replacement(operation, *args, **kwargs)

    return run


def _attention(operation: Any, *args: Any, **kwargs: Any) -> Any:
    del operation
    if torch.is_autocast_enabled("cuda"):
        args, kwargs = cast_arguments("lower", args, kwargs)
    ending = list(args)
    del args
    result = attend(_chooser, *ending, **kwargs, composing=_composing)
    while ending:
        del ending[0]  # what was cast last ends first, as temporaries of an expression do
    return result


@contextmanager
def _composing() -> Iterator[None]:
    """Within the context the parts of an operation are replaced too; autocast has done its work on the whole."""
    key = getattr(torch._C.DispatchKey, _KEY)
    enabled = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", False)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)
        torch.set_autocast_enabled("cuda", enabled)


def _dropout(operation: Any, source: torch.Tensor, p: float, train: bool) -> Any:
    """CUDA has one kernel for dropout that keeps a mask of booleans."""
    if not train or not 0 < p < 1 or not source.numel():
        return operation(source, p, train)
    return aten.native_dropout.default(source, p, train)[0]


def _softmax(operation: Any, source: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    """CUDA's softmax reads fp16 and writes fp32 in one kernel."""
    if torch.is_autocast_enabled("cuda") and dtype is None and source.dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    if dtype == torch.float32 and source.dtype == torch.float16:
        is_log = operation is aten.log_softmax.int
        return (aten._log_softmax if is_log else aten._softmax).default(source, dim, True)
    return operation(source, dim, dtype)


def _rms_norm(
    operation: Any, source: torch.Tensor, shape: Any, weight: torch.Tensor | None = None, eps: float | None = None
) -> Any:
    """CUDA has one kernel for the norm; it keeps its input and the roots."""
    if weight is not None and weight.dtype != source.dtype:
        return operation(source, shape, weight, eps)
    return FusedRmsNorm.apply(source, list(shape), weight)  # type: ignore[no-untyped-call]


class FusedRmsNorm(torch.autograd.Function):
    """`_fused_rms_norm` as its CUDA kernel allocates: the result and one root a row."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, shape: list[int], weight: torch.Tensor | None) -> torch.Tensor:
        """The result; input, weight and roots are kept."""
        rows = source.shape[: source.dim() - len(shape)]
        out = torch.empty_like(source, memory_format=torch.contiguous_format)
        roots = source.new_empty((*rows, *(1 for _ in shape)), dtype=torch.float32)
        ctx.save_for_backward(source, weight, roots)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Gradients of the input and of the weight."""
        del gradients
        source, weight, _ = ctx.saved_tensors
        of_source = torch.empty_like(source, memory_format=torch.contiguous_format)
        return of_source, None, None if weight is None else torch.empty_like(weight)


_REPLACED: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _attention,
    "dropout": _dropout,
    "softmax.int": _softmax,
    "log_softmax.int": _softmax,
    "rms_norm": _rms_norm,
}
