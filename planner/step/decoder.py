"""One training step of a Llama-like decoder with its language-model head, written after the modelling code.

Variables are kept and dropped where the modelling code keeps and drops them; see `tape`.

Source: transformers `models/{llama,mistral,qwen2,qwen3,phi3,gemma,gemma2,gemma3,olmo2}/modeling_*.py`.
"""

from __future__ import annotations

from functools import partial

from optplan.planner.dtypes import Dtype
from optplan.planner.step import operations as op
from optplan.planner.step import projections, vocabulary
from optplan.planner.step.attention import attend
from optplan.planner.step.attention_shape import AttentionShape
from optplan.planner.step.causal_lm import StepModel, kind_of
from optplan.planner.step.decoder_config import DENSE, SLIDING, DecoderConfig, mask_of
from optplan.planner.step.experts import mixture
from optplan.planner.step.graph import Tensor
from optplan.planner.step.masks import causal_mask
from optplan.planner.step.norms import rms_norm
from optplan.planner.step.parallel import enter_block, leave_block, received
from optplan.planner.step.positions import position_ids, rotary_tables, rotate

Tables = tuple[Tensor, Tensor]


class Decoder(StepModel[DecoderConfig]):
    """A Llama-like decoder at work."""

    def _loss_and_logits(self) -> tuple[Tensor, Tensor | None]:
        if not self.o.ends:
            return self._model(), None
        name = "model.embed_tokens.weight" if self.c.tied else "lm_head.weight"
        return self.language_loss(self._model(), self.c.hidden, self.c.vocab, name=name)

    def _capped(self, logits: Tensor) -> Tensor:
        if not self.c.caps_logits:
            return logits
        logits = op.scale(self.t, logits, "logits over cap")
        logits = op.pointwise(self.t, logits, "tanh", saves_output=True)
        return op.scale(self.t, logits, "capped logits")

    def _model(self) -> Tensor:
        t, c, seq = self.t, self.c, self.o.seq_len
        embedded = self._embed()
        positions = position_ids(t, seq)
        masks = self._masks(embedded.dtype)
        hidden = embedded
        tables = {
            kind: rotary_tables(t, seq, c.rotary_width, self._rotary_dtype(hidden.dtype)) for kind in c.rotary_kinds
        }
        for layer, kind in enumerate(map(kind_of, self.kinds)):
            rope = tables.get(mask_of(kind)) or tables[""]
            mixes = c.experts is not None and not kind.endswith(DENSE)
            run = partial(self._layer_at, positions=positions, rope=rope, mask=masks[mask_of(kind)], mixes=mixes)
            hidden = self.run_layer(layer, run, hidden)
            del run, rope
        t.enter(None)
        if not self.o.ends:
            return hidden
        hidden = enter_block(t, rms_norm(t, hidden, "model.norm", c.hidden, c.norm), self.o)
        if c.maps_masks:
            del embedded
        del positions, masks
        return hidden

    def _rotary_dtype(self, dtype: Dtype) -> Dtype:
        return "float32" if self.c.rotates_in_float32 else dtype

    def _embed(self) -> Tensor:
        t, c = self.t, self.c
        if not self.o.starts:
            return received(t, self.num_tokens * c.hidden, self.o)
        t.path = "model.embed_tokens"
        embedded = leave_block(t, vocabulary.embedding(t, self.num_tokens, c.vocab, c.hidden), self.o)
        if c.scales_embedding:
            embedded = op.multiply_constant(t, embedded, Tensor(None, 1, embedded.dtype), "scaled output")
        return embedded

    def _masks(self, dtype: Dtype) -> dict[str, Tensor | None]:
        """The mask of each kind of layer; none where the kernel knows that attention is causal."""
        return {
            kind: causal_mask(self.t, self.o, dtype, window=self.c.window if kind == SLIDING else None)
            for kind in self.c.mask_kinds
        }

    def _layer_at(self, hidden: Tensor, *, positions: Tensor, rope: Tables, mask: Tensor | None, mixes: bool) -> Tensor:
        del positions  # a checkpointed layer holds on to them
        t, c = self.t, self.c
        residual = hidden
        if c.norms_before:
            hidden = rms_norm(t, hidden, "input_layernorm", c.hidden, c.norm)
        hidden, weights = self._attention(enter_block(t, hidden, self.o), rope, mask)
        hidden = leave_block(t, hidden, self.o)
        if c.norms_after:
            hidden = rms_norm(t, hidden, "post_attention_layernorm", c.hidden, c.norm)
        t.path = "residual"
        hidden = op.add(t, residual, op.dropout(t, hidden, c.residual_dropout))
        residual = hidden
        if c.norms_before:
            hidden = rms_norm(t, hidden, c.second_norm, c.hidden, c.norm)
        hidden = enter_block(t, hidden, self.o)
        hidden = self._mlp(hidden) if not mixes or c.experts is None else mixture(t, hidden, c.experts)
        hidden = leave_block(t, hidden, self.o)
        if c.norms_after:
            hidden = rms_norm(t, hidden, "post_feedforward_layernorm", c.hidden, c.norm)
        t.path = "residual"
        hidden = op.add(t, residual, op.dropout(t, hidden, c.residual_dropout))
        del residual, weights
        return hidden

    def _mlp(self, x: Tensor) -> Tensor:
        t, c = self.t, self.c
        if c.is_fused:
            return self._fused_mlp(x)
        t.path = "mlp.gate_proj"
        gate = projections.linear(t, x, c.hidden, c.intermediate, bias=c.mlp_bias)
        t.path = "mlp.act_fn"
        activated = op.activation(t, gate, c.activation)
        del gate
        t.path = "mlp.up_proj"
        up = projections.linear(t, x, c.hidden, c.intermediate, bias=c.mlp_bias)
        t.path = "mlp"
        product = op.multiply(t, activated, up, "gate times up")
        del activated, up
        t.path = "mlp.down_proj"
        return projections.linear(t, product, c.intermediate, c.hidden, bias=c.mlp_bias)

    def _fused_mlp(self, x: Tensor) -> Tensor:
        t, c = self.t, self.c
        t.path = "mlp.gate_up_proj"
        both = projections.linear(t, x, c.hidden, 2 * c.intermediate)
        gate, up = projections.split(t, both, (self.num_tokens * c.intermediate,) * 2)
        del both
        t.path = "mlp.activation_fn"
        activated = op.activation(t, gate, c.activation)
        t.path = "mlp"
        up = op.multiply(t, up, activated, "gate times up")
        del activated
        t.path = "mlp.down_proj"
        return projections.linear(t, up, c.intermediate, c.hidden)

    def _attention(self, hidden: Tensor, rope: Tables, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        t, c = self.t, self.c
        q, k, v = self._fused_projections(hidden) if c.is_fused else self._projections(hidden)
        t.path = "self_attn"
        q, k = self._rotated(q, k, rope)
        shape = AttentionShape(self.o.batch_size, self.o.seq_len, c.heads, c.kv_heads, c.head_dim)
        out, weights = attend(t, self.o, (q, k, v), shape, mask, drop=c.attention_dropout, capped=c.caps_scores)
        if out.permuted:
            out = projections.clone(t, out, "attention output with its heads joined")
        t.path = "self_attn.o_proj"
        out = projections.linear(t, out, c.heads * c.head_dim, c.hidden, bias=c.output_bias)
        return out, weights

    def _projections(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.c
        if c.qk_norm == "late":
            q = self._project(hidden, "q_proj", c.heads)
            k = self._project(hidden, "k_proj", c.kv_heads)
            v = self._project(hidden, "v_proj", c.kv_heads)
            q = self._normalised(q, "q_norm", c.head_dim)
            return q, self._normalised(k, "k_norm", c.head_dim), v
        q = self._normalised(self._project(hidden, "q_proj", c.heads), "q_norm", c.qk_norm_width(c.heads))
        k = self._normalised(self._project(hidden, "k_proj", c.kv_heads), "k_norm", c.qk_norm_width(c.kv_heads))
        v = self._project(hidden, "v_proj", c.kv_heads)
        if c.qk_norm == "flat":
            q, k, v = (projections.split_heads(self.t, x) for x in (q, k, v))
        return q, k, v

    def _project(self, hidden: Tensor, name: str, heads: int) -> Tensor:
        self.t.path = f"self_attn.{name}"
        return projections.linear(self.t, hidden, self.c.hidden, heads * self.c.head_dim, bias=self.c.qkv_bias)

    def _normalised(self, x: Tensor, name: str, width: int) -> Tensor:
        return rms_norm(self.t, x, f"self_attn.{name}", width, self.c.norm) if self.c.qk_norm else x

    def _fused_projections(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t, c = self.t, self.c
        t.path = "self_attn.qkv_proj"
        sizes = [heads * c.head_dim for heads in (c.heads, c.kv_heads, c.kv_heads)]
        qkv = projections.linear(t, hidden, c.hidden, sum(sizes))
        parts = [projections.part(t, qkv, self.num_tokens * size) for size in sizes]
        del qkv
        q, k, v = (projections.split_heads(t, x) for x in parts)
        return q, k, v

    def _rotated(self, q: Tensor, k: Tensor, rope: Tables) -> tuple[Tensor, Tensor]:
        c = self.c
        if c.is_fused:
            return self._partly_rotated(q, k, rope)
        rotated_q = rotate(self.t, q, rope, c.heads)
        rotated_k = rotate(self.t, k, rope, c.kv_heads)
        if c.rotates_in_float32:
            return op.cast(self.t, rotated_q, q.dtype), op.cast(self.t, rotated_k, k.dtype)
        return rotated_q, rotated_k

    def _partly_rotated(self, q: Tensor, k: Tensor, rope: Tables) -> tuple[Tensor, Tensor]:
        """Phi-3 cuts each head into what is rotated and the rest (often nothing) and joins them again."""
        t, c = self.t, self.c
        turned_q, rest_q = self._cut(q, c.heads)
        turned_k, rest_k = self._cut(k, c.kv_heads)
        joined = projections.concatenated(
            t, (rotate(t, turned_q, rope, c.heads), rest_q), "rotated queries", heads=c.heads
        )
        return joined, projections.concatenated(
            t, (rotate(t, turned_k, rope, c.kv_heads), rest_k), "rotated keys", heads=c.kv_heads
        )

    def _cut(self, x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        turned = x.numel // self.c.head_dim * self.c.rotary_width
        return projections.part(self.t, x, turned, heads=heads), projections.part(
            self.t, x, x.numel - turned, heads=heads
        )
