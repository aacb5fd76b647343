"""The chunked loss that `optplan profile` runs, against the losses of the transformers classes."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from optplan.planner.errors import ConfigError
from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.records import StepConfig
from optplan.profilers.workloads.fused_losses import fuse_loss
from optplan.profilers.workloads.real_step import build_real_step

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 67}
GEMMA2 = {**SMALL, "head_dim": 16, "num_key_value_heads": 1, "final_logit_softcapping": 0.1, "pad_token_id": 0}
GPT2 = {"vocab_size": 67, "n_embd": 32, "n_layer": 1, "n_head": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
OPT = {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0, "max_position_embeddings": 64}
PHI = {**SMALL, "resid_pdrop": 0.0, "pad_token_id": 0}  # its head has a bias


def build(model_type, *, auto=AutoModelForCausalLM, **fields):
    torch.manual_seed(3)
    return auto.from_config(AutoConfig.for_model(model_type, **fields)).train()


def tokens_of(batch, seq):
    return torch.randint(1, 67, (batch, seq), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("size", [(2, 24), (3, 7), (1, 9), (1, 3), (5, 2)], ids=str)
@pytest.mark.parametrize(
    ("model_type", "fields"), [("llama", SMALL), ("gemma2", GEMMA2), ("gpt2", GPT2), ("opt", OPT), ("phi", PHI)]
)
def test_loss_and_gradients_are_those_of_the_class(model_type, fields, size):
    model, tokens = build(model_type, **fields), tokens_of(*size)
    chunked = copy.deepcopy(model)
    fuse_loss(chunked, "chunked")
    labels = tokens.masked_fill(tokens % 5 == 0, -100)
    losses = [m(input_ids=tokens, labels=labels).loss for m in (model, chunked)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for expected, found in zip(model.parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=2e-6, rtol=1e-5)


def test_a_copy_of_the_model_has_its_own_loss():
    model = build("llama", **SMALL)
    fuse_loss(model, "chunked")
    other, tokens = copy.deepcopy(model), tokens_of(2, 8)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert other(input_ids=tokens, labels=tokens).loss.item() == pytest.approx(4.2047, abs=1e-4)  # log 67


def test_no_logits_of_all_tokens_are_kept():
    model, tokens = build("llama", **SMALL), tokens_of(2, 64)
    fuse_loss(model, "chunked")
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=tokens, labels=tokens)
    assert max(kept) <= max(2 * 64 * 48, 67 * 32)  # the widest activation, the head's weight
    assert max(kept) < 2 * 64 * 67


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            {"model_type": "bert", "auto": AutoModelForMaskedLM, **SMALL},
            "--fused-loss chunked is for causal language models, BertForMaskedLM is none; use --fused-loss none",
        ),
        (
            {"model_type": "t5", "auto": AutoModelForSeq2SeqLM, "d_model": 32, "d_ff": 32, "num_layers": 1},
            "--fused-loss chunked is for causal language models, T5ForConditionalGeneration is none; "
            "use --fused-loss none",
        ),
        (
            {"model_type": "granite", **SMALL, "logits_scaling": 8.0},
            "--fused-loss chunked does not know how GraniteForCausalLM scales its logits (logits_scaling)",
        ),
        (
            {"model_type": "mixtral", **SMALL, "num_key_value_heads": 2, "output_router_logits": True},
            "--fused-loss chunked leaves out the loss of the router that MixtralForCausalLM adds",
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_what_has_no_chunked_loss_is_refused(model, sentence):
    with pytest.raises(ConfigError) as refused:
        fuse_loss(build(**model), "chunked")
    assert str(refused.value) == sentence


def test_no_loss_leaves_the_model_alone():
    model = build("llama", **SMALL)
    fuse_loss(model, "none")
    assert "forward" not in vars(model)


def test_liger_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ConfigError) as refused:
        fuse_loss(build("llama", **SMALL), "liger")
    assert str(refused.value) == (
        "--fused-loss liger needs the package liger-kernel, which is not installed: pip install liger-kernel"
    )


def test_liger_has_no_loss_for_some_classes():
    with pytest.raises(ConfigError) as refused:
        fuse_loss(build("gpt2", **GPT2), "liger")
    assert str(refused.value) == "liger-kernel has no fused loss for GPT2LMHeadModel; use --fused-loss chunked"


def step_config(**fields):
    return StepConfig(
        **{
            "precision": "fp32", "batch_size": 2, "seq_len": 12, "grad_accum": 1, "checkpointing": "none",
            "attention": "sdpa", "gpus": 1, "sharding": "none", **fields,
        }
    )  # fmt: skip


def test_a_step_that_is_profiled_takes_it():
    fields = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 64, **SMALL}
    spec = family_of("llama").spec(Fields(fields, where="test"), name="small", source="test")
    losses = [
        build_real_step(
            spec, step_config(fused_loss=loss), build_optimizer("adamw", {}), torch.device("cpu"), seed=3
        ).take()
        for loss in ("none", "chunked")
    ]
    torch.testing.assert_close(losses[1], losses[0])
    with pytest.raises(ConfigError) as refused:
        build_real_step(spec, step_config(fused_loss="liger"), build_optimizer("adamw", {}), torch.device("cpu"))
    assert str(refused.value) == (
        "--fused-loss liger runs Triton kernels, which need a GPU, not --device cpu; use --fused-loss chunked"
    )
