"""One micro-batch without contents for a transformers model, by what its class takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def model_inputs(module: Any, *, batch_size: int, seq_len: int, padding_mask: bool = False) -> dict[str, torch.Tensor]:
    """Arguments of the module's forward that yield a loss, with a padding mask if asked for.

    Language models, causal or masked, get tokens that are their own labels; models with an encoder and a decoder the
    same, so that both sides have `seq_len` tokens; models of images get pictures of the size they are made for, and a
    class each.
    """
    if "pixel_values" in inspect.signature(module.forward).parameters:
        return _image_inputs(module, batch_size)
    tokens = torch.empty(batch_size, seq_len, dtype=torch.int64, device="meta")
    if padding_mask:
        return {"input_ids": tokens, "attention_mask": torch.empty_like(tokens), "labels": tokens}
    return {"input_ids": tokens, "labels": tokens}


def _image_inputs(module: Any, batch_size: int) -> dict[str, torch.Tensor]:
    config = module.config
    height, width = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
    size = (batch_size, config.num_channels, height, width)
    return {
        "pixel_values": torch.empty(size, dtype=module.dtype, device="meta"),
        "labels": torch.empty(batch_size, dtype=torch.int64, device="meta"),
    }
