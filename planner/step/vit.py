"""One training step of the vision transformer with its classifier, written after the modelling code.

Variables are kept and dropped where the modelling code keeps and drops them; see `tape`.

Source: transformers `models/vit/modeling_vit.py`.
"""

from __future__ import annotations

from functools import partial
from math import prod

import msgspec

from optplan.planner.models.spec import ModelSpec
from optplan.planner.step import operations as op
from optplan.planner.step import projections, vocabulary
from optplan.planner.step.attention import attend, split_keys
from optplan.planner.step.attention_shape import AttentionShape
from optplan.planner.step.causal_lm import StepModel
from optplan.planner.step.graph import Tensor


class VitConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The vision transformer's sizes and dropout probabilities.

    Attributes:
        positions: Patches of an image and the class token.
        pixels: Pixels of an image, times its channels.
        patch: Pixels of a patch, times its channels.
    """

    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    positions: int
    channels: int
    pixels: int
    patch: int
    num_labels: int
    has_qkv_bias: bool
    activation: str
    hidden_dropout: float
    attention_dropout: float


def vit_config(spec: ModelSpec) -> VitConfig:
    """The vision transformer that `spec` describes."""
    c = spec.config
    return VitConfig(
        hidden=c["hidden_size"],
        intermediate=c["intermediate_size"],
        heads=c["num_attention_heads"],
        head_dim=c["head_dim"],
        positions=spec.max_seq_len,
        channels=c["num_channels"],
        pixels=c["num_channels"] * prod(c["image_size"]),
        patch=c["num_channels"] * prod(c["patch_size"]),
        num_labels=c["num_labels"],
        has_qkv_bias=c["qkv_bias"],
        activation=c["hidden_act"],
        hidden_dropout=c["hidden_dropout_prob"],
        attention_dropout=c["attention_probs_dropout_prob"],
    )


class Vit(StepModel[VitConfig]):
    """The vision transformer at work."""

    def _loss_and_logits(self) -> tuple[Tensor, Tensor | None]:
        t, c = self.t, self.c
        hidden = self._model()
        t.path = "classifier"
        first = projections.part(t, hidden, self.o.batch_size * c.hidden)
        logits = projections.output_head(
            t, first, c.hidden, c.num_labels, name="classifier.weight", bias="classifier.bias"
        )
        del first
        t.path = "loss"
        loss = vocabulary.token_cross_entropy(t, logits, None)
        del hidden
        return loss, logits

    def _model(self) -> Tensor:
        t, c = self.t, self.c
        embedded = self._embedding()
        hidden = embedded
        for layer in range(len(self.kinds)):
            hidden = self.run_layer(layer, partial(self._layer), hidden)
        t.enter(None)
        t.path = "vit.layernorm"
        hidden = op.layer_norm(t, hidden, c.hidden)
        del embedded
        return hidden

    def _embedding(self) -> Tensor:
        t, c, batch = self.t, self.c, self.o.batch_size
        patches = self._patches()
        t.path = "vit.embeddings"
        cls_token = t.parameter("vit.embeddings.cls_token", c.hidden)
        joined = projections.joined_rows(t, cls_token, patches, batch * c.positions * c.hidden)
        del patches
        positions = t.parameter("vit.embeddings.position_embeddings", c.positions * c.hidden)
        embedded = op.add(t, joined, positions, "sum of the embeddings")
        del joined
        return op.dropout(t, embedded, c.hidden_dropout)

    def _patches(self) -> Tensor:
        t, c, batch = self.t, self.c, self.o.batch_size
        t.path = "vit.embeddings.patch_embeddings.projection"
        numel = batch * (c.positions - 1) * c.hidden
        return projections.patch_projection(
            t, batch * c.pixels, numel, c.patch, c.hidden, channels=c.channels, options=self.o
        )

    def _layer(self, hidden: Tensor) -> Tensor:
        t, c = self.t, self.c
        residual = hidden
        t.path = "layernorm_before"
        hidden = op.layer_norm(t, hidden, c.hidden)
        hidden, weights = self._attention(hidden)
        hidden = op.dropout(t, hidden, c.hidden_dropout)
        t.path = "residual"
        hidden = op.add(t, hidden, residual)
        residual = hidden
        t.path = "layernorm_after"
        hidden = op.layer_norm(t, hidden, c.hidden)
        hidden = self._mlp(hidden)
        hidden = op.dropout(t, hidden, c.hidden_dropout)
        t.path = "residual"
        hidden = op.add(t, hidden, residual)
        del residual, weights
        return hidden

    def _mlp(self, hidden: Tensor) -> Tensor:
        t, c = self.t, self.c
        held = hidden
        t.path = "mlp.fc1"
        hidden = projections.linear(t, hidden, c.hidden, c.intermediate, bias=True)
        t.path = "mlp.activation_fn"
        hidden = op.activation(t, hidden, c.activation)
        t.path = "mlp.fc2"
        hidden = projections.linear(t, hidden, c.intermediate, c.hidden, bias=True)
        del held
        return hidden

    def _attention(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        t, c = self.t, self.c
        width = c.heads * c.head_dim
        q, k, v = (self._project(hidden, f"{name}_proj", width) for name in "qkv")
        shape = AttentionShape(self.o.batch_size, c.positions, c.heads, c.heads, c.head_dim, is_causal=False)
        k = split_keys(t, k, self.o, shape)
        t.path = "attention"
        out, weights = attend(t, self.o, (q, k, v), shape, None, drop=c.attention_dropout)
        t.path = "attention.o_proj"
        out = projections.linear(t, out, width, c.hidden, bias=True)
        return out, weights

    def _project(self, hidden: Tensor, name: str, width: int) -> Tensor:
        self.t.path = f"attention.{name}"
        return projections.linear(self.t, hidden, self.c.hidden, width, bias=self.c.has_qkv_bias)
