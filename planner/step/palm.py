"""One training step of PaLM with its language-model head, as a transformers class would run the paper's layer.

Attention and MLP read one norm and are added to their input together; queries have many heads, keys and values one.
Nothing of PaLM is public, so that these rules follow its equations and, in the order of operations, the other decoders;
the scale of the logits is taken to be folded into the head.

Source: Chowdhery et al., arXiv:2204.02311, section 2.
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
from optplan.planner.step.positions import Tables, position_ids, rotary_tables, rotate


class PalmConfig(msgspec.Struct, frozen=True, kw_only=True):
    """PaLM's sizes."""

    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    vocab: int
    activation: str


def palm_config(spec: ModelSpec) -> PalmConfig:
    """The PaLM that `spec` describes."""
    c = spec.config
    return PalmConfig(
        hidden=c["hidden_size"],
        intermediate=c["intermediate_size"],
        heads=c["num_attention_heads"],
        head_dim=c["head_dim"],
        vocab=c["vocab_size"],
        activation=c["hidden_act"],
    )


class Palm(StepModel[PalmConfig]):
    """PaLM at work."""

    def _loss_and_logits(self) -> tuple[Tensor, Tensor | None]:
        return self.language_loss(self._model(), self.c.hidden, self.c.vocab, name="embedding.weight")

    def _model(self) -> Tensor:
        t, c = self.t, self.c
        t.path = "embedding"
        embedded = vocabulary.embedding(t, self.num_tokens, c.vocab, c.hidden)
        positions = position_ids(t, self.o.seq_len)
        mask = causal_mask(t, self.o, embedded.dtype)
        rope = rotary_tables(t, self.o.seq_len, c.head_dim, embedded.dtype)
        hidden = embedded
        for layer in range(len(self.kinds)):
            run = partial(self._layer, mask=mask, positions=positions, rope=rope)
            hidden = self.run_layer(layer, run, hidden)
            del run
        t.enter(None)
        t.path = "norm"
        hidden = op.layer_norm(t, hidden, c.hidden, bias=False)
        del embedded, positions, mask, rope
        return hidden

    def _layer(self, hidden: Tensor, *, mask: Tensor | None, positions: Tensor, rope: Tables) -> Tensor:
        del positions  # a checkpointed layer holds on to them
        t, c = self.t, self.c
        t.path = "norm"
        normalised = op.layer_norm(t, hidden, c.hidden, bias=False)
        attended, weights = self._attention(normalised, mask, rope)
        transformed = self._mlp(normalised)
        del normalised
        t.path = "residual"
        hidden = op.add(t, op.add(t, attended, transformed, "sum of attention and MLP"), hidden)
        del attended, weights, transformed
        return hidden

    def _attention(self, hidden: Tensor, mask: Tensor | None, rope: Tables) -> tuple[Tensor, Tensor | None]:
        t, c = self.t, self.c
        q, k, v = (self._project(hidden, name, heads) for name, heads in (("query", c.heads), ("key", 1), ("value", 1)))
        t.path = "attention"
        q, k = rotate(t, q, rope, c.heads), rotate(t, k, rope, 1)
        shape = AttentionShape(self.o.batch_size, self.o.seq_len, c.heads, 1, c.head_dim)
        out, weights = attend(t, self.o, (q, k, v), shape, mask)
        if out.permuted:
            out = projections.clone(t, out, "attention output with its heads joined")
        t.path = "attention.output"
        return projections.linear(t, out, c.heads * c.head_dim, c.hidden), weights

    def _project(self, hidden: Tensor, name: str, heads: int) -> Tensor:
        self.t.path = f"attention.{name}"
        return projections.linear(self.t, hidden, self.c.hidden, heads * self.c.head_dim)

    def _mlp(self, x: Tensor) -> Tensor:
        t, c = self.t, self.c
        t.path = "mlp.gate"
        gate = projections.linear(t, x, c.hidden, c.intermediate)
        t.path = "mlp.activation"
        activated = op.activation(t, gate, c.activation)
        del gate
        t.path = "mlp.up"
        up = projections.linear(t, x, c.hidden, c.intermediate)
        t.path = "mlp"
        product = op.multiply(t, activated, up, "gate times up")
        del activated, up
        t.path = "mlp.down"
        return projections.linear(t, product, c.intermediate, c.hidden)
