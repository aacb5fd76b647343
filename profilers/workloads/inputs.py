"""One micro-batch without contents for a transformers model, by what its class takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def model_inputs(module: Any, *, batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
    """Arguments of the module's forward that yield a loss.

    Language models, causal or masked, get tokens that are their own labels; models with an encoder and a decoder the
    same, so that both sides have `seq_len` tokens; models of images get pictures of the size they are made for, and a
    class each.
    """
    if "pixel_values" in inspect.signature(module.forward).parameters:
        return _image_inputs(module, batch_size)
    tokens = torch.empty(batch_size, seq_len, dtype=torch.int64, device="meta")
    return {"input_ids": tokens, "labels": tokens}


def _image_inputs(module: Any, batch_size: int) -> dict[str, torch.Tensor]:
    config = module.config
    size = (batch_size, config.num_channels, config.image_size, config.image_size)
    return {
        "pixel_values": torch.empty(size, dtype=module.dtype, device="meta"),
        "labels": torch.empty(batch_size, dtype=torch.int64, device="meta"),
    }
