"""One training step of GPT-NeoX (Pythia) with its language-model head, written after the modelling code.

Variables are kept and dropped where the modelling code keeps and drops them; see `tape`.

Source: transformers `models/gpt_neox/modeling_gpt_neox.py`.
"""

from __future__ import annotations

from functools import partial

import msgspec

from optplan.planner.models.spec import ModelSpec
from optplan.planner.step import operations as op
from optplan.planner.step import projections, vocabulary
from optplan.planner.step.attention import attend
from optplan.planner.step.attention_shape import AttentionShape
from optplan.planner.step.causal_lm import StepModel
from optplan.planner.step.graph import Tensor
from optplan.planner.step.masks import causal_mask
from optplan.planner.step.positions import Tables, position_ids, rotary_tables, rotate_part


class GptNeoxConfig(msgspec.Struct, frozen=True, kw_only=True):
    """GPT-NeoX's sizes, dropout probabilities and choices.

    Attributes:
        rotary_width: Elements of a head that are rotated.
        is_parallel: Whether attention and MLP read the same hidden states.
    """

    hidden: int
    intermediate: int
    heads: int
    vocab: int
    rotary_width: int
    tied: bool
    has_bias: bool
    is_parallel: bool
    activation: str
    hidden_dropout: float
    attention_dropout: float


def gpt_neox_config(spec: ModelSpec) -> GptNeoxConfig:
    """The GPT-NeoX that `spec` describes."""
    c = spec.config
    return GptNeoxConfig(
        hidden=c["hidden_size"],
        intermediate=c["intermediate_size"],
        heads=c["num_attention_heads"],
        vocab=c["vocab_size"],
        rotary_width=(int(c["hidden_size"] // c["num_attention_heads"] * c["rotary_pct"]) + 1) // 2 * 2,
        tied=c["tie_word_embeddings"],
        has_bias=c["attention_bias"],
        is_parallel=c["use_parallel_residual"],
        activation=c["hidden_act"],
        hidden_dropout=c["hidden_dropout"],
        attention_dropout=c["attention_dropout"],
    )


class GptNeox(StepModel[GptNeoxConfig]):
    """GPT-NeoX at work."""

    def _loss_and_logits(self) -> tuple[Tensor, Tensor | None]:
        name = "gpt_neox.embed_in.weight" if self.c.tied else "lm_head.weight"
        return self.language_loss(self._model(), self.c.hidden, self.c.vocab, name=name)

    def _model(self) -> Tensor:
        t, c = self.t, self.c
        t.path = "gpt_neox.embed_in"
        embedded = vocabulary.embedding(t, self.num_tokens, c.vocab, c.hidden)
        positions = position_ids(t, self.o.seq_len)
        mask = causal_mask(t, self.o, embedded.dtype)
        t.path = "gpt_neox.emb_dropout"
        hidden = op.dropout(t, embedded, c.hidden_dropout)
        rope = rotary_tables(t, self.o.seq_len, c.rotary_width, hidden.dtype)
        for layer in range(len(self.kinds)):
            run = partial(self._layer, mask=mask, positions=positions, rope=rope)
            hidden = self.run_layer(layer, run, hidden)
            del run
        t.enter(None)
        t.path = "gpt_neox.final_layer_norm"
        hidden = op.layer_norm(t, hidden, c.hidden)
        del embedded, positions, mask, rope
        return hidden

    def _layer(self, hidden: Tensor, *, mask: Tensor | None, positions: Tensor, rope: Tables) -> Tensor:
        del positions  # a checkpointed layer holds on to them
        t, c = self.t, self.c
        t.path = "input_layernorm"
        normalised = op.layer_norm(t, hidden, c.hidden)
        attended, weights = self._attention(normalised, mask, rope)
        del normalised
        t.path = "post_attention_dropout"
        attended = op.dropout(t, attended, c.hidden_dropout)
        if not c.is_parallel:
            t.path = "residual"
            attended = op.add(t, attended, hidden)
        t.path = "post_attention_layernorm"
        normalised = op.layer_norm(t, hidden if c.is_parallel else attended, c.hidden)
        transformed = self._mlp(normalised)
        del normalised
        t.path = "post_mlp_dropout"
        transformed = op.dropout(t, transformed, c.hidden_dropout)
        t.path = "residual"
        if not c.is_parallel:
            hidden = op.add(t, transformed, attended)
        else:
            hidden = op.add(t, op.add(t, transformed, attended, "sum of attention and MLP"), hidden)
        del attended, weights, transformed
        return hidden

    def _attention(self, hidden: Tensor, mask: Tensor | None, rope: Tables) -> tuple[Tensor, Tensor | None]:
        t, c = self.t, self.c
        t.path = "attention.query_key_value"
        qkv = projections.linear(t, hidden, c.hidden, 3 * c.hidden, bias=c.has_bias)
        qkv = projections.split_heads(t, qkv)
        q, k, v = projections.split(t, qkv, (self.num_tokens * c.hidden,) * 3, heads=c.heads)
        t.path = "attention"
        width = c.hidden // c.heads
        q, k = rotate_part(t, (q, k), rope, (c.heads, c.heads), width=width, rotated=c.rotary_width)
        shape = AttentionShape(self.o.batch_size, self.o.seq_len, c.heads, c.heads, width)
        out, weights = attend(t, self.o, (q, k, v), shape, mask, drop=c.attention_dropout)
        if out.permuted:
            out = projections.clone(t, out, "attention output with its heads joined")
        t.path = "attention.dense"
        out = projections.linear(t, out, c.hidden, c.hidden, bias=c.has_bias)
        return out, weights

    def _mlp(self, hidden: Tensor) -> Tensor:
        t, c = self.t, self.c
        t.path = "mlp.dense_h_to_4h"
        hidden = projections.linear(t, hidden, c.hidden, c.intermediate, bias=True)
        t.path = "mlp.act"
        hidden = op.activation(t, hidden, c.activation)
        t.path = "mlp.dense_4h_to_h"
        return projections.linear(t, hidden, c.intermediate, c.hidden, bias=True)
