"""One training step of BERT or RoBERTa with its masked-language-model head, written after the modelling code.

Variables are kept and dropped where the modelling code keeps and drops them; see `tape`.

Source: transformers `models/bert/modeling_bert.py` and `models/roberta/modeling_roberta.py`.
"""

from __future__ import annotations

from functools import partial

import msgspec

from optplan.planner.models.spec import ModelSpec
from optplan.planner.step import kernels, projections, vocabulary
from optplan.planner.step import operations as op
from optplan.planner.step.attention import attend, split_keys
from optplan.planner.step.attention_shape import AttentionShape
from optplan.planner.step.causal_lm import StepModel
from optplan.planner.step.graph import Tensor
from optplan.planner.step.masks import bidirectional_mask


class BertConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The encoder's sizes, dropout probabilities, and the names in which BERT and RoBERTa differ.

    Attributes:
        counts_positions: Whether positions are counted along the tokens that are no padding (RoBERTa).
        head_dense: The head's dense layer.
        head_norm: The norm after it.
        head_weight: Weight of the projection onto the vocabulary: the embedding's where they are tied.
        head_bias: Its bias.
    """

    model: str
    hidden: int
    intermediate: int
    heads: int
    vocab: int
    num_positions: int
    num_types: int
    counts_positions: bool
    head_dense: str
    head_norm: str
    head_weight: str
    head_bias: str
    activation: str
    hidden_dropout: float
    attention_dropout: float


def bert_config(spec: ModelSpec) -> BertConfig:
    """The BERT or RoBERTa that `spec` describes."""
    c, family = spec.config, spec.model_type
    head, dense, norm = ("cls.predictions", "transform.dense", "transform.LayerNorm")
    if family == "roberta":
        head, dense, norm = "lm_head", "dense", "layer_norm"
    tied = c["tie_word_embeddings"]
    return BertConfig(
        model=family,
        hidden=c["hidden_size"],
        intermediate=c["intermediate_size"],
        heads=c["num_attention_heads"],
        vocab=c["vocab_size"],
        num_positions=c["max_position_embeddings"],
        num_types=c["type_vocab_size"],
        counts_positions=family == "roberta",
        head_dense=f"{head}.{dense}",
        head_norm=f"{head}.{norm}",
        head_weight=f"{family}.embeddings.word_embeddings.weight" if tied else f"{head}.decoder.weight",
        head_bias=f"{head}.bias" if tied else f"{head}.decoder.bias",
        activation=c["hidden_act"],
        hidden_dropout=c["hidden_dropout_prob"],
        attention_dropout=c["attention_probs_dropout_prob"],
    )


class Bert(StepModel[BertConfig]):
    """BERT or RoBERTa at work."""

    def _loss_and_logits(self) -> tuple[Tensor, Tensor | None]:
        t, hidden = self.t, self._model()
        logits = self._head(hidden)
        t.path = "loss"
        loss = vocabulary.token_cross_entropy(t, logits, None)
        del hidden
        return loss, logits

    def _head(self, hidden: Tensor) -> Tensor:
        t, c = self.t, self.c
        t.path = c.head_dense
        hidden = projections.linear(t, hidden, c.hidden, c.hidden, bias=True)
        t.path = "head activation"
        hidden = op.activation(t, hidden, c.activation if not c.counts_positions else "gelu")
        t.path = c.head_norm
        hidden = op.layer_norm(t, hidden, c.hidden)
        t.path = "head decoder"
        return projections.output_head(t, hidden, c.hidden, c.vocab, name=c.head_weight, bias=c.head_bias)

    def _model(self) -> Tensor:
        embedded = self._counted_embedding() if self.c.counts_positions else self._embedding()
        mask = bidirectional_mask(self.t, self.o, embedded.dtype)
        hidden = embedded
        for layer in range(len(self.kinds)):
            run = partial(self._layer, mask=mask)
            hidden = self.run_layer(layer, run, hidden)
            del run
        self.t.enter(None)
        del embedded, mask
        return hidden

    def _embedding(self) -> Tensor:
        t, seq = self.t, self.o.seq_len
        t.path = "bert.embeddings"
        types = t.new(seq, "int64", "token types")
        # The types are read once for all sequences: the index is written out to be used, and again in backward.
        return self._normalised_embedding(types, is_expanded=self.o.batch_size > 1, positions=None, num_placed=seq)

    def _counted_embedding(self) -> Tensor:
        t, count = self.t, self.num_tokens
        t.path = "roberta.embeddings"
        positions = self._counted_positions()
        types = t.new(count, "int64", "token types")
        return self._normalised_embedding(types, is_expanded=False, positions=positions, num_placed=count)

    def _counted_positions(self) -> Tensor:
        t, count = self.t, self.num_tokens
        visible = t.new(count, "bool", "tokens that are no padding")
        numbers = t.new(count, "int32", "tokens that are no padding")
        del visible
        counted = t.new(count, "int64", "positions so far")
        wide = t.new(count, "int64", "tokens that are no padding")
        if self.o.batch_size == 1:
            t.scratch(kernels.SCAN_SCRATCH, operation="scan")
        del wide
        narrow = t.new(count, "int32", "positions so far")
        del counted
        shifted = t.new(count, "int32", "positions so far")
        del narrow
        masked = t.new(count, "int32", "positions so far")
        del shifted
        long = t.new(count, "int64", "positions so far")
        positions = t.new(count, "int64", "positions")
        del long, masked, numbers
        return positions

    def _normalised_embedding(
        self, types: Tensor, *, is_expanded: bool, positions: Tensor | None, num_placed: int
    ) -> Tensor:
        t, c = self.t, self.c
        place = t.path
        t.path = f"{place}.word_embeddings"
        words = vocabulary.embedding(t, self.num_tokens, c.vocab, c.hidden)
        t.path = f"{place}.token_type_embeddings"
        typed = vocabulary.embedding(t, self.num_tokens, c.num_types, c.hidden, [types], is_expanded=is_expanded)
        t.path = place
        embedded = op.add(t, words, typed, "sum of words and types")
        t.path = f"{place}.position_embeddings"
        placed = vocabulary.embedding(
            t, num_placed, c.num_positions, c.hidden, [] if positions is None else [positions]
        )
        t.path = place
        embedded = op.add(t, embedded, placed, "sum of the embeddings")
        t.path = f"{place}.LayerNorm"
        embedded = op.layer_norm(t, embedded, c.hidden)
        embedded = op.dropout(t, embedded, c.hidden_dropout)
        del words, typed, placed, types, positions
        return embedded

    def _layer(self, hidden: Tensor, *, mask: Tensor | None) -> Tensor:
        t, c = self.t, self.c
        attended, weights = self._attention(hidden, mask)
        projected = self._output(attended, hidden, "attention.output", c.hidden)
        del attended
        t.path = "intermediate.dense"
        expanded = projections.linear(t, projected, c.hidden, c.intermediate, bias=True)
        t.path = "intermediate.intermediate_act_fn"
        expanded = op.activation(t, expanded, c.activation)
        hidden = self._output(expanded, projected, "output", c.intermediate)
        del expanded, weights, projected
        return hidden

    def _output(self, x: Tensor, residual: Tensor, path: str, num_in: int) -> Tensor:
        t, c = self.t, self.c
        t.path = f"{path}.dense"
        hidden = projections.linear(t, x, num_in, c.hidden, bias=True)
        t.path = f"{path}.dropout"
        hidden = op.dropout(t, hidden, c.hidden_dropout)
        t.path = f"{path}.residual"
        total = op.add(t, hidden, residual)
        t.path = f"{path}.LayerNorm"
        normalised = op.layer_norm(t, total, c.hidden)
        del total
        return normalised

    def _attention(self, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        t, c = self.t, self.c
        q, k, v = (self._project(hidden, name) for name in ("query", "key", "value"))
        shape = AttentionShape(
            self.o.batch_size, self.o.seq_len, c.heads, c.heads, c.hidden // c.heads, is_causal=False
        )
        k = split_keys(t, k, self.o, shape, masked=mask is not None)
        t.path = "attention.self"
        return attend(t, self.o, (q, k, v), shape, mask, drop=c.attention_dropout, upcast=False, casts_back=False)

    def _project(self, hidden: Tensor, name: str) -> Tensor:
        self.t.path = f"attention.self.{name}"
        return projections.linear(self.t, hidden, self.c.hidden, self.c.hidden, bias=True)
