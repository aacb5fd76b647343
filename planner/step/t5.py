"""One training step of T5 with its language-model head, written after the modelling code.

Variables are kept and dropped where the modelling code keeps and drops them; see `tape`. Encoder and decoder see the
same number of tokens. The layers are numbered through, those of the encoder first.

Source: transformers `models/t5/modeling_t5.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from optplan.planner.dtypes import Dtype
from optplan.planner.models.spec import ModelSpec
from optplan.planner.step import operations as op
from optplan.planner.step import projections, relative_bias, vocabulary
from optplan.planner.step.attention import Backend, choose_backend, sdpa, takes_efficient
from optplan.planner.step.attention_shape import AttentionShape
from optplan.planner.step.causal_lm import RECOMPUTED, StepModel, kind_of
from optplan.planner.step.graph import Tensor
from optplan.planner.step.masks import bidirectional_mask, causal_mask
from optplan.planner.step.norms import rms_norm
from optplan.planner.step.reentrant import checkpoint_whole
from optplan.planner.step.unfused_attention import eager


class T5Config(msgspec.Struct, frozen=True, kw_only=True):
    """T5's sizes and choices.

    Attributes:
        num_encoder_layers: Layers of the encoder.
        buckets: Relative positions that are told apart.
        is_gated: Whether the MLP has a gate.
        scales_output: Whether the decoder's output is scaled before the head.
    """

    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    vocab: int
    num_encoder_layers: int
    buckets: int
    activation: str
    is_gated: bool
    scales_output: bool
    dropout: float


def t5_config(spec: ModelSpec) -> T5Config:
    """The T5 that `spec` describes."""
    c = spec.config
    return T5Config(
        hidden=c["d_model"],
        intermediate=c["d_ff"],
        heads=c["num_heads"],
        head_dim=c["d_kv"],
        vocab=c["vocab_size"],
        num_encoder_layers=c["num_layers"],
        buckets=c["relative_attention_num_buckets"],
        activation=c["dense_act_fn"],
        is_gated=c["is_gated_act"],
        scales_output=c["scale_decoder_outputs"],
        dropout=c["dropout_rate"],
    )


def t5_layers(spec: ModelSpec) -> tuple[str, ...]:
    """Kind of each layer: of the encoder or of the decoder."""
    return ("encoder",) * int(spec.config["num_layers"]) + ("decoder",) * int(spec.config["num_decoder_layers"])


def t5_layer_names(spec: ModelSpec) -> Callable[[int], str]:
    """From a layer's number to its dotted name."""
    count = int(spec.config["num_layers"])
    return lambda layer: f"encoder.block.{layer}" if layer < count else f"decoder.block.{layer - count}"


Biases = tuple[Tensor, ...]
"""Of a stack's own attention, and in the decoder of that to the encoder."""


class T5(StepModel[T5Config]):
    """T5 at work."""

    def _loss_and_logits(self) -> tuple[Tensor, Tensor | None]:
        t, c = self.t, self.c
        encoded = self._stack("encoder", [], None)
        t.path = "decoder tokens"
        tokens = t.new(self.num_tokens, "int64", "shifted tokens")
        t.new(self.o.batch_size * (self.o.seq_len - 1), "int64", "tokens")
        t.new(self.num_tokens, "bool", "tokens that do not count")
        decoded = self._stack("decoder", [tokens], encoded)
        t.path = "lm_head"
        hidden = op.scale(t, decoded, "scaled input") if c.scales_output else decoded
        logits = projections.output_head(t, hidden, c.hidden, c.vocab, name="shared.weight")
        t.path = "loss"
        loss = vocabulary.token_cross_entropy(t, logits, None)
        del encoded, tokens, decoded, hidden
        return loss, logits

    def _stack(self, stack: str, tokens: list[Tensor], encoded: Tensor | None) -> Tensor:
        t, c = self.t, self.c
        t.enter(None)
        t.path = "shared"
        embedded = vocabulary.embedding(t, self.num_tokens, c.vocab, c.hidden, tokens)
        mask, across = self._masks(embedded.dtype, stack)
        t.path = f"{stack}.dropout"
        hidden = op.dropout(t, embedded, c.dropout)
        biases: Biases = ()
        for layer, kind in enumerate(self.kinds):
            if kind_of(kind) == stack:
                hidden, biases = self._run_block(layer, (hidden, mask, across, encoded, *biases), stack)
        t.enter(None)
        hidden = rms_norm(t, hidden, f"{stack}.final_layer_norm", c.hidden, "t5")
        hidden = op.dropout(t, hidden, c.dropout)
        del mask, embedded, across, biases
        return hidden

    def _masks(self, dtype: Dtype, stack: str) -> tuple[Tensor | None, Tensor | None]:
        """What hides tokens from a stack's own attention, and in the decoder from that to the encoder.

        The encoder's tokens are hidden by padding, the decoder's by coming later.
        """
        if stack == "encoder":
            return bidirectional_mask(self.t, self.o, dtype), None
        unpadded = msgspec.structs.replace(self.o, padding_mask=False)
        own = causal_mask(self.t, unpadded, dtype, finds_packed=False)
        return own, bidirectional_mask(self.t, self.o, dtype)

    def _run_block(self, layer: int, given: tuple[Tensor | None, ...], stack: str) -> tuple[Tensor, Biases]:
        """A layer's output and the biases of its stack, checkpointed as the options say."""
        t, hooks, checkpointing = self.t, self.t.hooks, self.o.checkpointing
        t.enter(layer)

        def wrapped(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            out, biases = self._block(hooks.before_layer(t, layer, hidden), *rest, stack=stack)
            return hooks.after_layer(t, layer, out), *biases

        hidden, *rest = given
        assert hidden is not None
        if checkpointing == "full-reentrant":
            out, *biases = checkpoint_whole(t, wrapped, given)
        elif checkpointing == "full" or self.kinds[layer].endswith(RECOMPUTED):
            out, *biases = t.checkpoint(lambda x: wrapped(x, *rest), hidden)
        else:
            out, *biases = wrapped(hidden, *rest)
        return out, tuple(biases)

    def _block(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        across: Tensor | None,
        encoded: Tensor | None,
        *biases: Tensor,
        stack: str,
    ) -> tuple[Tensor, Biases]:
        """One layer; the first of a stack makes the biases that all others are given."""
        own, *other = biases or (None,)
        hidden, own, weights = self._self_attention(hidden, stack, own, mask)
        if encoded is None:
            return self._mlp(hidden, "layer.1"), (own,)
        hidden, zeros, weights = self._cross_attention(hidden, encoded, other[0] if other else None, across)
        hidden = self._mlp(hidden, "layer.2")
        del weights
        return hidden, (own, zeros)

    def _self_attention(
        self, hidden: Tensor, stack: str, bias: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        t, c = self.t, self.c
        normed = rms_norm(t, hidden, "layer.0.layer_norm", c.hidden, "t5")
        q, k, v = (self._project(normed, f"layer.0.SelfAttention.{name}") for name in "qkv")
        if bias is None:
            t.path = "layer.0.SelfAttention.relative_attention_bias"
            is_causal = stack == "decoder"
            bias = relative_bias.position_bias(t, self.o.seq_len, c.buckets, c.heads, is_causal=is_causal)
        t.path = "layer.0.SelfAttention"
        out, weights = self._attend((q, k, v), bias, mask, is_causal=stack == "decoder")
        out = self._project(out, "layer.0.SelfAttention.o", is_output=True)
        del q, k, v
        return self._residual(hidden, out, normed), bias, weights

    def _attend(
        self, qkv: tuple[Tensor, Tensor, Tensor], bias: Tensor, mask: Tensor | None, *, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention with numbers added to its scores: the result with its heads joined, and eager's weights."""
        t, shape, drop = self.t, self._shape(), self.c.dropout
        if self.o.attention == "eager":
            q, k, v = qkv
            k = projections.transposed_keys(t, k, shape.batch, shape.seq)
            return eager(t, (q, k, v), shape, mask, drop=drop, upcast=False, casts_back=False, bias=bias)
        if mask is not None:
            bias = relative_bias.hidden_bias(t, bias, mask, shape)
        elif is_causal and shape.seq > 1:
            bias = relative_bias.causal_bias(t, bias, shape)
        backend = self._backend(bias, qkv[0].dtype)
        if backend == "math":
            qkv = (qkv[0], projections.transposed_keys(t, qkv[1], shape.batch, shape.seq), qkv[2])
        return sdpa(t, qkv, shape, backend, added=bias, drops=drop > 0), None

    def _backend(self, bias: Tensor, dtype: Dtype) -> Backend:
        """The kernel: the fused ones read a bias row by row, and only one of them makes the gradient of a bias."""
        if bias.permuted:
            return "math"
        dtype, shape, capability = self.t.autocast or dtype, self._shape(), self.o.compute_capability
        if bias.node is not None:
            return "efficient" if takes_efficient(dtype, shape, capability) else "math"
        return choose_backend(dtype, shape, masked=True, capability=capability)

    def _residual(self, hidden: Tensor, out: Tensor, normed: Tensor) -> Tensor:
        t = self.t
        dropped = op.dropout(t, out, self.c.dropout)
        total = op.add(t, hidden, dropped, "residual sum")
        del out, normed
        return total

    def _cross_attention(
        self, hidden: Tensor, encoded: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        t, c = self.t, self.c
        normed = rms_norm(t, hidden, "layer.1.layer_norm", c.hidden, "t5")
        q = self._project(normed, "layer.1.EncDecAttention.q")
        k, v = (self._project(encoded, f"layer.1.EncDecAttention.{name}") for name in "kv")
        t.path = "layer.1.EncDecAttention"
        if bias is None:
            bias = relative_bias.zero_bias(t, self._shape(), q.dtype, asks_gradient=self.o.recomputes)
        out, weights = self._attend((q, k, v), bias, mask, is_causal=False)
        out = self._project(out, "layer.1.EncDecAttention.o", is_output=True)
        del q, k, v
        return self._residual(hidden, out, normed), bias, weights

    def _shape(self) -> AttentionShape:
        return AttentionShape(self.o.batch_size, self.o.seq_len, self.c.heads, self.c.heads, self.c.head_dim)

    def _project(self, x: Tensor, path: str, *, is_output: bool = False) -> Tensor:
        self.t.path = path
        sizes = (self.c.hidden, self.c.heads * self.c.head_dim)
        return projections.linear(self.t, x, *(reversed(sizes) if is_output else sizes))

    def _mlp(self, hidden: Tensor, layer: str) -> Tensor:
        t, c = self.t, self.c
        forwarded = rms_norm(t, hidden, f"{layer}.layer_norm", c.hidden, "t5")
        path = f"{layer}.DenseReluDense"
        inner = self._gated(forwarded, path) if c.is_gated else self._plain(forwarded, path)
        t.path = f"{path}.dropout"
        inner = op.dropout(t, inner, c.dropout)
        inner = op.cast(t, inner, t.parameter_dtype)
        t.path = f"{path}.wo"
        out = projections.linear(t, inner, c.intermediate, c.hidden)
        del inner
        forwarded = out
        del out
        dropped = op.dropout(t, forwarded, c.dropout)
        total = op.add(t, hidden, dropped, "residual sum")
        del dropped
        return total

    def _plain(self, x: Tensor, path: str) -> Tensor:
        t, c = self.t, self.c
        t.path = f"{path}.wi"
        return op.activation(t, projections.linear(t, x, c.hidden, c.intermediate), c.activation)

    def _gated(self, x: Tensor, path: str) -> Tensor:
        t, c = self.t, self.c
        t.path = f"{path}.wi_0"
        gate = op.activation(t, projections.linear(t, x, c.hidden, c.intermediate), c.activation)
        t.path = f"{path}.wi_1"
        return op.multiply(t, gate, projections.linear(t, x, c.hidden, c.intermediate), "gate times linear")
