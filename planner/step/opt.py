"""One training step of OPT with its language-model head, written after the modelling code.

Variables are kept and dropped where the modelling code keeps and drops them; see `tape`. No layer is dropped
(`layerdrop` is 0 in every published model).

Source: transformers `models/opt/modeling_opt.py`.
"""

from __future__ import annotations

from functools import partial

import msgspec

from optplan.planner.dtypes import Dtype
from optplan.planner.models.spec import ModelSpec
from optplan.planner.step import kernels, projections, vocabulary
from optplan.planner.step import operations as op
from optplan.planner.step.attention import attend, split_keys
from optplan.planner.step.attention_shape import AttentionShape
from optplan.planner.step.causal_lm import StepModel
from optplan.planner.step.graph import Tensor
from optplan.planner.step.masks import causal_mask

_POSITION_OFFSET = 2
"""Rows of the position embedding before the first position's."""


class OptConfig(msgspec.Struct, frozen=True, kw_only=True):
    """OPT's sizes, dropout probabilities and choices.

    Attributes:
        embedding: Width of the token embedding, projected to `hidden` where it is another.
        norms_before: Whether the norms precede attention and MLP, or follow them.
        has_final_norm: Whether a norm follows the last layer.
    """

    hidden: int
    intermediate: int
    heads: int
    vocab: int
    embedding: int
    num_positions: int
    tied: bool
    has_bias: bool
    norms_before: bool
    has_final_norm: bool
    activation: str
    dropout: float
    attention_dropout: float


def opt_config(spec: ModelSpec) -> OptConfig:
    """The OPT that `spec` describes."""
    c = spec.config
    return OptConfig(
        hidden=c["hidden_size"],
        intermediate=c["ffn_dim"],
        heads=c["num_attention_heads"],
        vocab=c["vocab_size"],
        embedding=c["word_embed_proj_dim"],
        num_positions=c["max_position_embeddings"] + _POSITION_OFFSET,
        tied=c["tie_word_embeddings"],
        has_bias=c["enable_bias"],
        norms_before=c["do_layer_norm_before"],
        has_final_norm=c["do_layer_norm_before"] and not c["_remove_final_layer_norm"],
        activation=c["activation_function"],
        dropout=c["dropout"],
        attention_dropout=c["attention_dropout"],
    )


class Opt(StepModel[OptConfig]):
    """OPT at work."""

    def _loss_and_logits(self) -> tuple[Tensor, Tensor | None]:
        name = "model.decoder.embed_tokens.weight" if self.c.tied else "lm_head.weight"
        return self.language_loss(self._model(), self.c.embedding, self.c.vocab, name=name)

    def _model(self) -> Tensor:
        t, c = self.t, self.c
        t.path = "model.decoder.embed_tokens"
        embedded = vocabulary.embedding(t, self.num_tokens, c.vocab, c.embedding)
        t.path = "positions"
        ones = None if self.o.padding_mask else t.new(self.num_tokens, "float32", "attention mask of ones")
        positions = self._positions()
        mask = causal_mask(t, self.o, embedded.dtype, finds_packed=False, has_ones=ones is not None)
        placed = self._placed()
        if c.embedding != c.hidden:
            t.path = "model.decoder.project_in"
            embedded = projections.linear(t, embedded, c.embedding, c.hidden)
        t.path = "model.decoder"
        hidden = op.add(t, embedded, placed, "sum of the embeddings")
        for layer in range(len(self.kinds)):
            run = partial(self._layer, mask=mask, positions=positions)
            hidden = self.run_layer(layer, run, hidden)
            del run
        t.enter(None)
        hidden = self._end(hidden)
        del embedded, ones, positions, mask, placed
        return hidden

    def _positions(self) -> Tensor:
        """Each token's position, counted along the attention mask."""
        t = self.t
        dtype: Dtype = "int64" if self.o.padding_mask else "float32"
        counted = t.new(self.num_tokens, dtype, "visible tokens so far")
        if self.o.batch_size == 1:
            t.scratch(kernels.SCAN_SCRATCH, operation="scan")
        masked = t.new(self.num_tokens, dtype, "visible tokens so far, masked")
        positions = t.new(self.num_tokens, dtype, "positions")
        del masked
        if dtype != "int64":
            positions = t.new(self.num_tokens, "int64", "positions as integers")
        del counted
        return positions

    def _placed(self) -> Tensor:
        self.t.path = "model.decoder.embed_positions"
        shifted = self.t.new(self.num_tokens, "int64", "shifted positions")
        return vocabulary.embedding(self.t, self.num_tokens, self.c.num_positions, self.c.hidden, [shifted])

    def _end(self, hidden: Tensor) -> Tensor:
        t, c = self.t, self.c
        if c.has_final_norm:
            t.path = "model.decoder.final_layer_norm"
            hidden = op.layer_norm(t, hidden, c.hidden)
        if c.embedding != c.hidden:
            t.path = "model.decoder.project_out"
            hidden = projections.linear(t, hidden, c.hidden, c.embedding)
        return hidden

    def _layer(self, hidden: Tensor, *, mask: Tensor | None, positions: Tensor) -> Tensor:
        del positions  # a checkpointed layer holds on to them
        t, c = self.t, self.c
        residual = hidden
        if c.norms_before:
            hidden = self._norm(hidden, "self_attn_layer_norm")
        hidden, weights = self._attention(hidden, mask)
        hidden = op.dropout(t, hidden, c.dropout)
        t.path = "residual"
        hidden = op.add(t, residual, hidden)
        if not c.norms_before:
            hidden = self._norm(hidden, "self_attn_layer_norm")
        hidden = projections.reshaped(t, hidden)
        residual = hidden
        if c.norms_before:
            hidden = self._norm(hidden, "final_layer_norm")
        hidden = self._linear(hidden, "fc1", c.hidden, c.intermediate)
        t.path = "activation_fn"
        hidden = op.activation(t, hidden, c.activation)
        hidden = self._linear(hidden, "fc2", c.intermediate, c.hidden)
        hidden = op.dropout(t, hidden, c.dropout)
        t.path = "residual"
        hidden = projections.reshaped(t, op.add(t, residual, hidden))
        if not c.norms_before:
            hidden = self._norm(hidden, "final_layer_norm")
        del residual, weights
        return hidden

    def _norm(self, hidden: Tensor, path: str) -> Tensor:
        self.t.path = path
        return op.layer_norm(self.t, hidden, self.c.hidden)

    def _linear(self, x: Tensor, path: str, num_in: int, num_out: int) -> Tensor:
        self.t.path = path
        return projections.linear(self.t, x, num_in, num_out, bias=self.c.has_bias)

    def _attention(self, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        t, c = self.t, self.c
        q = op.scale(t, self._project(hidden, "q_proj"), "scaled queries")
        q = projections.split_heads(t, q)
        k, v = self._project(hidden, "k_proj"), self._project(hidden, "v_proj")
        shape = AttentionShape(self.o.batch_size, self.o.seq_len, c.heads, c.heads, c.hidden // c.heads)
        k, v = split_keys(t, k, self.o, shape, masked=mask is not None), projections.split_heads(t, v)
        t.path = "self_attn"
        out, weights = attend(t, self.o, (q, k, v), shape, mask, drop=c.attention_dropout)
        out = self._project(out, "out_proj")
        return out, weights

    def _project(self, hidden: Tensor, name: str) -> Tensor:
        return self._linear(hidden, f"self_attn.{name}", self.c.hidden, self.c.hidden)
