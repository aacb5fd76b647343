"""Losses that never hold the logits of all tokens, put in the place of a transformers model's own.

`liger` is Liger's fused linear cross entropy. `chunked` is ours, out of torch's own operations, so that it runs with
every torch and for every causal language model: the output head, the cast to fp32 and the cross entropy of one chunk
of tokens after another, each under `torch.utils.checkpoint`, so that backward computes its logits again.

Source: Liger-Kernel `transformers/monkey_patch.py`; transformers `loss/loss_utils.py` (`ForCausalLMLoss`) for the
shifted labels and what is divided by.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from optplan.planner.errors import ConfigError
from optplan.planner.step.fused_losses import NUM_CHUNKS

_IGNORED = -100
"""The label of a token that counts for nothing."""
_OTHER_KERNELS = ("rope", "rms_norm", "swiglu", "geglu", "cross_entropy")
_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier")
"""Fields by which some families scale their logits."""


def fuse_loss(model: Any, kind: str) -> None:
    """Let a transformers model compute its loss as `--fused-loss` says; `none` leaves it as it is.

    Args:
        model: A causal language model.
        kind: `none`, `liger` or `chunked`.

    Raises:
        ConfigError: The package is not installed, or the model's class has no such loss.
    """
    if kind == "liger":
        _apply_liger(model)
    elif kind == "chunked":
        _chunk_loss(model)


def _apply_liger(model: Any) -> None:
    """Liger's loss in the place of the model's own, and none of its other kernels."""
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError:
        raise ConfigError(
            "--fused-loss liger needs the package liger-kernel, which is not installed: pip install liger-kernel"
        ) from None
    if model.config.model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(f"liger-kernel has no fused loss for {type(model).__name__}; use --fused-loss chunked")
    kernels = {**dict.fromkeys(_OTHER_KERNELS, False), "fused_linear_cross_entropy": True}
    monkey_patch._apply_liger_kernel_to_instance(model, **kernels)


def _chunk_loss(model: Any) -> None:
    _check_chunkable(model)
    # In a class of its own: a method bound to the model and kept in it would keep it alive.
    model.__class__ = _chunked_class(type(model))  # type: ignore[arg-type]  # a class is hashable


@cache
def _chunked_class(model_class: type[Any]) -> type[Any]:
    """The class of the same name with the chunked loss."""
    return type(model_class.__name__, (model_class,), {"forward": _forward, "__module__": model_class.__module__})


def _forward(model: Any, labels: torch.Tensor, **inputs: Any) -> Any:
    from transformers.modeling_outputs import CausalLMOutput

    cap = getattr(model.config, "final_logit_softcapping", None)
    hidden = model.base_model(**inputs)[0]
    return CausalLMOutput(loss=chunked_loss(hidden, labels, head=model.get_output_embeddings(), cap=cap))


def chunked_loss(
    hidden: torch.Tensor, labels: torch.Tensor, *, head: Callable[[torch.Tensor], torch.Tensor], cap: float | None
) -> torch.Tensor:
    """The mean loss of next-token prediction, in `NUM_CHUNKS` chunks of tokens as `torch.chunk` cuts them.

    Args:
        hidden: What the head is given, `[sequences, tokens, width]`.
        labels: The tokens themselves, `[sequences, tokens]`; each is predicted from those before it, and those that are
            -100 count for nothing.
        head: From `[rows, width]` to logits `[rows, vocabulary]`.
        cap: Bound to which a hyperbolic tangent brings the logits, None without it.
    """
    labels = functional.pad(labels, (0, 1), value=_IGNORED)[..., 1:].contiguous().view(-1)
    run = partial(_sum_of_chunk, head, cap)
    total: torch.Tensor | None = None
    parts = hidden.view(-1, hidden.shape[-1]).chunk(NUM_CHUNKS)
    for part, wanted in zip(parts, labels.chunk(NUM_CHUNKS), strict=True):
        loss = checkpoint(run, part, wanted, use_reentrant=False, preserve_rng_state=False)
        total = loss if total is None else total + loss
    assert total is not None
    return total / (labels != _IGNORED).sum()


def _sum_of_chunk(head: Any, cap: float | None, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = _capped(head(hidden), cap).float()
    return functional.cross_entropy(logits, labels, ignore_index=_IGNORED, reduction="sum")


def _capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    if cap is None:
        return logits
    logits = logits / cap
    logits = torch.tanh(logits)
    return logits * cap


def _check_chunkable(model: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config, name = model.config, type(model).__name__
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ConfigError(f"--fused-loss chunked is for causal language models, {name} is none; use --fused-loss none")
    scales = [field for field in _SCALES if getattr(config, field, None) not in (None, 1)]
    if scales:
        raise ConfigError(f"--fused-loss chunked does not know how {name} scales its logits ({scales[0]})")
    if getattr(config, "output_router_logits", False):
        raise ConfigError(f"--fused-loss chunked leaves out the loss of the router that {name} adds")
