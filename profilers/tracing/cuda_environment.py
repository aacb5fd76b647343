"""Makes torch and transformers treat the simulated device as the GPU that it stands for, while a step is traced."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from optplan.profilers.tracing.autocast import clear_cache


@contextmanager
def cuda_environment() -> Iterator[None]:
    """Within the context: autocast for CUDA can be entered without a GPU, optimizers take CUDA's implementations."""
    with ExitStack() as stack:
        for owner, name, value in _patches():
            stack.enter_context(replaced(owner, name, value))
        yield


def _patches() -> Iterator[tuple[Any, str, Any]]:
    import torch.optim.optimizer as optimizer_module
    import torch.utils._foreach_utils as foreach_module
    import torch.utils.checkpoint as checkpoint_module

    yield torch.cuda.amp.common, "amp_definitely_not_available", lambda: False
    yield torch.cuda, "is_bf16_supported", lambda *_, **__: True
    yield torch, "clear_autocast_cache", _clearing(torch.clear_autocast_cache)
    yield checkpoint_module, "_infer_device_type", lambda *_: "cuda"
    for name in ("_get_foreach_kernels_supported_devices", "_get_fused_kernels_supported_devices"):
        for module in (optimizer_module, foreach_module):
            yield module, name, lambda: ["cuda", "meta"]
    for module in list(sys.modules.values()):
        if module is not None and getattr(module, "__name__", "").startswith("transformers."):
            original = vars(module).get("maybe_autocast")
            if original is not None:
                yield module, "maybe_autocast", _on_cuda(original)


def _clearing(original: Callable[[], None]) -> Callable[[], None]:
    def clear() -> None:
        original()
        clear_cache()

    return clear


def _on_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """Transformers' own `maybe_autocast`, which leaves alone what is on the simulated device, as on CUDA."""

    def maybe_autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        enabled = kwargs.get("enabled", True)
        if device_type == "meta" and not enabled and not torch.is_autocast_enabled("cuda"):
            return nullcontext()
        return original("cuda" if device_type == "meta" else device_type, *args, **kwargs)

    return maybe_autocast


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the context `owner` has another attribute `name`."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
