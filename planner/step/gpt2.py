"""One training step of GPT-2 with its language-model head, written after the modelling code.

Variables are kept and dropped where the modelling code keeps and drops them; see `tape`.

Source: transformers `models/gpt2/modeling_gpt2.py`.
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
from optplan.planner.step.positions import position_ids


class Gpt2Config(msgspec.Struct, frozen=True, kw_only=True):
    """GPT-2's sizes and dropout probabilities."""

    hidden: int
    intermediate: int
    heads: int
    vocab: int
    num_positions: int
    tied: bool
    activation: str
    embedding_dropout: float
    attention_dropout: float
    residual_dropout: float


def gpt2_config(spec: ModelSpec) -> Gpt2Config:
    """The GPT-2 that `spec` describes."""
    c = spec.config
    return Gpt2Config(
        hidden=c["n_embd"],
        intermediate=c["n_inner"],
        heads=c["n_head"],
        vocab=c["vocab_size"],
        num_positions=c["n_positions"],
        tied=c["tie_word_embeddings"],
        activation=c["activation_function"],
        embedding_dropout=c["embd_pdrop"],
        attention_dropout=c["attn_pdrop"],
        residual_dropout=c["resid_pdrop"],
    )


class Gpt2(StepModel[Gpt2Config]):
    """GPT-2 at work."""

    def _loss_and_logits(self) -> tuple[Tensor, Tensor | None]:
        name = "transformer.wte.weight" if self.c.tied else "lm_head.weight"
        return self.language_loss(self._model(), self.c.hidden, self.c.vocab, name=name)

    def _model(self) -> Tensor:
        t, c, batch, seq = self.t, self.c, self.o.batch_size, self.o.seq_len
        t.path = "transformer.wte"
        embedded = vocabulary.embedding(t, self.num_tokens, c.vocab, c.hidden)
        positions = position_ids(t, seq)
        t.path = "transformer.wpe"
        placed = vocabulary.embedding(t, seq, c.num_positions, c.hidden, [positions])
        hidden = op.add(t, embedded, placed, "sum of the embeddings")
        mask = causal_mask(t, self.o, embedded.dtype)
        t.path = "transformer.drop"
        hidden = op.dropout(t, hidden, c.embedding_dropout)
        for layer in range(len(self.kinds)):
            run = partial(self._block, mask=mask, positions=positions)
            hidden = self.run_layer(layer, run, hidden)
            del run
        t.enter(None)
        t.path = "transformer.ln_f"
        hidden = op.layer_norm(t, hidden, c.hidden)
        del embedded, placed, positions, mask, batch
        return hidden

    def _block(self, hidden: Tensor, *, mask: Tensor | None, positions: Tensor) -> Tensor:
        del positions  # a checkpointed block holds on to them
        t, c = self.t, self.c
        residual = hidden
        t.path = "ln_1"
        hidden = op.layer_norm(t, hidden, c.hidden)
        attended, weights = self._attention(hidden, mask)
        t.path = "residual"
        hidden = op.add(t, attended, residual)
        residual = hidden
        t.path = "ln_2"
        hidden = op.layer_norm(t, hidden, c.hidden)
        transformed = self._mlp(hidden)
        t.path = "residual"
        hidden = op.add(t, residual, transformed)
        del residual, attended, weights, transformed
        return hidden

    def _attention(self, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        t, c = self.t, self.c
        t.path = "attn.c_attn"
        q, k, v = projections.split(
            t, projections.conv1d(t, hidden, c.hidden, 3 * c.hidden), (self.num_tokens * c.hidden,) * 3
        )
        q, k, v = (projections.split_heads(t, x) for x in (q, k, v))
        t.path = "attn"
        shape = AttentionShape(self.o.batch_size, self.o.seq_len, c.heads, c.heads, c.hidden // c.heads)
        out, weights = attend(t, self.o, (q, k, v), shape, mask, drop=c.attention_dropout, upcast=False)
        t.path = "attn.c_proj"
        out = projections.conv1d(t, out, c.hidden, c.hidden)
        out = op.dropout(t, out, c.residual_dropout)
        return out, weights

    def _mlp(self, hidden: Tensor) -> Tensor:
        t, c = self.t, self.c
        t.path = "mlp.c_fc"
        hidden = projections.conv1d(t, hidden, c.hidden, c.intermediate)
        t.path = "mlp.act"
        hidden = op.activation(t, hidden, c.activation)
        t.path = "mlp.c_proj"
        hidden = projections.conv1d(t, hidden, c.intermediate, c.hidden)
        return op.dropout(t, hidden, c.residual_dropout)
