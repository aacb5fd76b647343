"""The model of `train_study.py`: a GPT over bytes, pre-norm, learned positions, untied head, no biases or dropout."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

NUM_BYTES = 256
INIT_STD = 0.02


class Size(NamedTuple):
    """Sizes of the model; those of the study by default, 10.9 million parameters."""

    layers: int = 6
    width: int = 384
    heads: int = 6
    context: int = 256


class Attention(nn.Module):
    """Causal attention; the projections are apart, as the authors' Adam-mini needs them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, length, width]` to the same."""
        parts = (project(x) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention, then a feed-forward block of four times the width with GELU, each after a norm and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, length, width]` to the same. Autocast norms in fp32; one cast serves what reads the result."""
        x = x + self.attention(self.norm_1(x).bfloat16())
        return x + self.mlp(self.norm_2(x).bfloat16())


class ByteGPT(nn.Module):
    """Predicts the next byte.

    Args:
        size: Of the model.
        seed: Of its initial values, drawn on the CPU so that they are the same on every machine.
    """

    def __init__(self, size: Size, *, seed: int) -> None:
        super().__init__()
        self.size = size
        self.embed_tokens = nn.Embedding(NUM_BYTES, size.width)
        self.embed_positions = nn.Embedding(size.context, size.width)
        self.layers = nn.ModuleList(Layer(size.width, size.heads) for _ in range(size.layers))
        self.final_norm = nn.LayerNorm(size.width, bias=False)
        self.lm_head = nn.Linear(size.width, NUM_BYTES, bias=False)
        self._initialize(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator) -> None:
        outputs = {id(last) for layer in self.layers for last in (layer.attention.o_proj.weight, layer.mlp[2].weight)}
        for parameter in self.parameters():
            if parameter.dim() > 1:
                shrink = (2 * self.size.layers) ** -0.5 if id(parameter) in outputs else 1.0
                parameter.normal_(std=INIT_STD * shrink, generator=generator)

    def get_input_embeddings(self) -> nn.Embedding:
        """The tokens', as transformers' models say it."""
        return self.embed_tokens

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, length, 256]` of bytes `[batch, length]`."""
        x = self.embed_tokens(text) + self.embed_positions.weight[: text.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.final_norm(x))


def loss_of(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats a byte, of each byte of `windows` `[batch, length + 1]` after those before it."""
    with torch.autocast(windows.device.type, torch.bfloat16):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
