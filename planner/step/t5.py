"""One training step of T5 with its language-model head, written after the modelling code.

Variables are kept and dropped where the modelling code keeps and drops them; see `tape`. Encoder and decoder see the
same number of tokens. The layers are numbered through, those of the encoder first.

Source: transformers `models/t5/modeling_t5.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec

from optplan.planner.models.spec import ModelSpec
from optplan.planner.step import operations as op
from optplan.planner.step import projections, relative_bias, vocabulary
from optplan.planner.step.attention import AttentionShape, choose_backend, sdpa
from optplan.planner.step.causal_lm import StepModel
from optplan.planner.step.graph import Tensor
from optplan.planner.step.norms import rms_norm


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
        t.path = f"{stack}.dropout"
        hidden = op.dropout(t, embedded, c.dropout)
        biases: list[Tensor] = []
        for layer, kind in enumerate(self.kinds):
            if kind.split(" ")[0] == stack:
                run = partial(self._block, stack=stack, given=tuple(biases), made=biases, encoded=encoded)
                hidden = self.run_layer(layer, run, hidden)
                del run
        t.enter(None)
        hidden = rms_norm(t, hidden, f"{stack}.final_layer_norm", c.hidden, "t5")
        hidden = op.dropout(t, hidden, c.dropout)
        del embedded, biases
        return hidden

    def _block(
        self, hidden: Tensor, *, stack: str, given: tuple[Tensor, ...], made: list[Tensor], encoded: Tensor | None
    ) -> Tensor:
        """One layer; the first of a stack makes the biases that all others are given."""
        biases = list(given)
        hidden = self._self_attention(hidden, stack, biases)
        if encoded is not None:
            hidden = self._cross_attention(hidden, encoded, biases)
        if not made:
            made += biases
        del biases
        return self._mlp(hidden, "layer.1" if encoded is None else "layer.2")

    def _self_attention(self, hidden: Tensor, stack: str, biases: list[Tensor]) -> Tensor:
        t, c = self.t, self.c
        normed = rms_norm(t, hidden, "layer.0.layer_norm", c.hidden, "t5")
        q, k, v = (self._project(normed, f"layer.0.SelfAttention.{name}") for name in "qkv")
        if not biases:
            t.path = "layer.0.SelfAttention.relative_attention_bias"
            biases.append(
                relative_bias.position_bias(t, self.o.seq_len, c.buckets, c.heads, is_causal=stack == "decoder")
            )
        t.path = "layer.0.SelfAttention"
        bias = relative_bias.causal_bias(t, biases[0], self.o.seq_len) if stack == "decoder" else biases[0]
        out = relative_bias.biased_attention(t, (q, k, v), self._shape(), bias, drop=c.dropout)
        del bias
        out = self._project(out, "layer.0.SelfAttention.o", is_output=True)
        del q, k, v
        return self._residual(hidden, out, normed)

    def _residual(self, hidden: Tensor, out: Tensor, normed: Tensor) -> Tensor:
        t = self.t
        dropped = op.dropout(t, out, self.c.dropout)
        total = op.add(t, hidden, dropped, "residual sum")
        del out, normed
        return total

    def _cross_attention(self, hidden: Tensor, encoded: Tensor, biases: list[Tensor]) -> Tensor:
        t, c = self.t, self.c
        normed = rms_norm(t, hidden, "layer.1.layer_norm", c.hidden, "t5")
        q = self._project(normed, "layer.1.EncDecAttention.q")
        k, v = (self._project(encoded, f"layer.1.EncDecAttention.{name}") for name in "kv")
        shape = self._shape()
        t.path = "layer.1.EncDecAttention"
        if len(biases) == 1:
            biases.append(t.new(c.heads * self.o.seq_len**2, q.dtype, "bias of zeros"))
        dtype = t.autocast or q.dtype
        backend = choose_backend(dtype, shape, masked=True, capability=self.o.compute_capability)
        out = sdpa(t, (q, k, v), shape, backend, added=biases[1], drops=c.dropout > 0)
        out = self._project(out, "layer.1.EncDecAttention.o", is_output=True)
        del q, k, v
        return self._residual(hidden, out, normed)

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
        forwarded = projections.linear(t, inner, c.intermediate, c.hidden)
        del inner
        dropped = op.dropout(t, forwarded, c.dropout)
        return op.add(t, hidden, dropped, "residual sum")

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
