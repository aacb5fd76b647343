import pytest

from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.replay import replay
from optplan.planner.step.rules import (
    RULED_FAMILIES,
    StepOptions,
    has_rules,
    record_step,
    step_memory,
    write_forward_backward,
    write_load,
)
from optplan.planner.timeline import Allocation, TimelineBuilder
from optplan.planner.units import MIB

LLAMA = load_model("tinyllama-1.1b")
FIELDS = {
    "gpt2": {"n_embd": 384, "n_layer": 3, "n_head": 6},
    "opt": {"ffn_dim": 512, "word_embed_proj_dim": 384, "max_position_embeddings": 128},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "mlp_only_layers": [1]},
    "t5": {"d_model": 384, "d_ff": 512, "num_layers": 2, "num_heads": 6, "num_decoder_layers": 3},
    "vit": {"image_size": 128, "patch_size": 16, "num_labels": 10},
}
"""What a family's configuration needs beside the usual fields."""
SMALL = StepOptions(batch_size=1, seq_len=128)


def step_of(spec, options):
    timeline = TimelineBuilder()
    write_load(timeline, spec, options)
    return timeline, write_forward_backward(timeline, spec, options)


def model(**config):
    return family_of(config["model_type"]).spec(Fields(config, where="test"), name="my-model", source="test")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-7b", True),
        ("mistral-7b", True),
        ("qwen2.5-0.5b", True),
        ("qwen3-0.6b", True),
        ("gemma-2-2b", True),
        ("gpt2", True),
        ("bert-base", True),
        ("opt-125m", True),
        ("t5-base", True),
        ("mixtral-8x7b", True),
        ("vit-base", True),
        ("pythia-160m", True),
        ("palm-540b", True),
        ("bloom-560m", False),
        ("falcon-7b", False),
    ],
)
def test_families_with_rules(name, expected):
    assert has_rules(load_model(name)) is expected


@pytest.mark.parametrize("family", RULED_FAMILIES)
def test_every_ruled_family_takes_a_step_and_leaves_its_gradients(family):
    sizes = {"hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
    fields = {"vocab_size": 503, "intermediate_size": 512, "head_dim": 64, **sizes, **FIELDS.get(family, {})}
    spec = model(model_type=family, **fields)
    timeline, gradients = step_of(
        spec, StepOptions(batch_size=2, seq_len=65, attention="sdpa" if family == "t5" else "eager")
    )
    assert list(gradients) == [parameter.name for parameter in spec.unique_parameters]
    sizes = {event.id: event.bytes for event in timeline.events if isinstance(event, Allocation)}
    assert [sizes[id_] for id_ in gradients.values()] == [2 * p.numel for p in spec.unique_parameters]
    timeline.free(*gradients.values())
    resident = [event for event in timeline.events if event.phase == "load"]
    assert replay(timeline.events).end_bytes == replay(resident).end_bytes


def test_a_family_without_rules_is_refused():
    with pytest.raises(ConfigError) as refused:
        record_step(load_model("bloom-560m"), SMALL)
    assert (
        str(refused.value) == "unknown family with step rules 'bloom'; known: llama, mistral, qwen2, qwen3 and 16 more"
    )


@pytest.mark.parametrize(
    ("spec", "changes", "sentence"),
    [
        (
            LLAMA,
            {"attention": "flash", "precision": "fp32"},
            "flash attention does not run in fp32; use bf16, amp, mixed or fp16-amp, or attention sdpa",
        ),
        (
            LLAMA,
            {"attention": "flash", "compute_capability": (7, 5)},
            "flash attention needs compute capability 8.0 or newer, got 7.5; use attention sdpa",
        ),
        (
            model(
                model_type="llama",
                vocab_size=503,
                hidden_size=1024,
                intermediate_size=512,
                num_hidden_layers=2,
                num_attention_heads=2,
            ),
            {"attention": "flash"},
            "flash attention takes heads of at most 256 elements, my-model has 512",
        ),
        (
            load_model("gemma-2-2b"),
            {},
            "gemma-2-2b caps its attention scores, which sdpa cannot; use attention eager or flash",
        ),
        (
            LLAMA,
            {"step_in_backward": True, "grad_accum": 2},
            "step_in_backward uses each gradient up as it comes, so that grad_accum must be 1 and keep_grads off",
        ),
        (
            LLAMA,
            {"attention": "flash", "padding_mask": True},
            "flash attention takes padding out of the batch, which no rule describes; use attention sdpa",
        ),
        (
            load_model("gpt2"),
            {"fused_loss": "liger"},
            "liger-kernel has no fused loss for gpt2 models; "
            "known: llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, phi3, gemma, gemma2, gemma3_text, olmo2; "
            "use --fused-loss chunked",
        ),
        (
            load_model("bert-base"),
            {"fused_loss": "chunked"},
            "--fused-loss chunked is for causal language models, bert-base is none; use --fused-loss none",
        ),
        (
            load_model("vit-base"),
            {},
            "vit-base cuts an image into 197 positions: seq_len must be that, got 128",
        ),
        (
            load_model("vit-base"),
            {"seq_len": 197, "padding_mask": True},
            "vit-base classifies images: it takes no padding mask and no fused loss",
        ),
        (
            load_model("t5-base"),
            {"attention": "flash"},
            "t5-base adds numbers to its attention scores, which flash cannot; use attention sdpa",
        ),
        (
            model(
                model_type="olmoe",
                vocab_size=503,
                hidden_size=96,
                intermediate_size=100,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_experts=4,
                num_experts_per_tok=2,
            ),
            {},
            "my-model has experts of intermediate_size 100, which the grouped product of their weights in bfloat16 "
            "refuses: it must be a multiple of 8",
        ),
        (LLAMA, {"checkpointing": "ful"}, "unknown checkpointing 'ful'; nearest: full"),
        (LLAMA, {"fused_loss": "lige"}, "unknown fused_loss 'lige'; nearest: liger"),
        (LLAMA, {"attention": "spda"}, "unknown attention 'spda'; nearest: sdpa"),
        (LLAMA, {"precision": "fp8"}, "unknown precision 'fp8'; nearest: fp32"),
        (LLAMA, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (LLAMA, {"seq_len": -3}, "seq_len must be at least 1, got -3"),
        (LLAMA, {"grad_accum": 0}, "grad_accum must be at least 1, got 0"),
        (
            model(model_type="gpt2", vocab_size=503, n_embd=96, n_layer=2, n_head=2, activation_function="tanh"),
            {},
            "unknown activation for the step rules 'tanh'; known: silu, swish, gelu, gelu_pytorch_tanh, gelu_new, "
            "gelu_fast, relu",
        ),
        (
            model(model_type="gpt2", vocab_size=503, n_embd=96, n_layer=2, n_head=2, reorder_and_upcast_attn=True),
            {"attention": "eager"},
            "my-model sets reorder_and_upcast_attn, which the step rules do not model; use attention sdpa",
        ),
    ],
)
def test_what_no_rule_describes_is_refused(spec, changes, sentence):
    fields = {"batch_size": 1, "seq_len": 128, **changes}
    with pytest.raises(ConfigError) as refused:
        step_memory(spec, StepOptions(**fields))
    assert str(refused.value) == sentence


@pytest.mark.parametrize(
    ("capability", "workspace"), [((9, 0), 32 * MIB), ((8, 0), 8_519_680), ((8, 9), 8_519_680), ((10, 0), 8_519_680)]
)
def test_two_blas_workspaces_by_capability(capability, workspace):
    timeline = TimelineBuilder()
    write_load(timeline, LLAMA, StepOptions(batch_size=1, seq_len=8, compute_capability=capability))
    assert [event.bytes for event in timeline.events if event.category == "workspace"] == [workspace, workspace]


@pytest.mark.parametrize(
    ("name", "checkpointing", "count"),
    [("gpt2", "none", 1), ("gpt2", "full", 2), ("qwen2.5-0.5b", "none", 1), ("tinyllama-1.1b", "full", 0)],
)
def test_a_bias_brings_a_workspace_for_each_thread_that_adds_it(name, checkpointing, count):
    timeline = TimelineBuilder()
    write_load(timeline, load_model(name), StepOptions(batch_size=1, seq_len=8, checkpointing=checkpointing))
    assert [event.bytes for event in timeline.events if "cuBLASLt" in event.name] == [MIB] * count


def test_accumulated_gradients_exist_before_the_forward_and_are_added_to():
    timeline, gradients = step_of(LLAMA, StepOptions(batch_size=1, seq_len=128, grad_accum=4))
    phases = {event.id: event.phase for event in timeline.events if isinstance(event, Allocation)}
    assert {phases[id_] for id_ in gradients.values()} == {"load"}
    alive = replay(timeline.events)
    timeline.free(*gradients.values())
    assert alive.end_bytes - replay(timeline.events).end_bytes == 2 * LLAMA.num_parameters


def test_mixed_precision_steps_like_bf16():
    assert step_memory(LLAMA, StepOptions(batch_size=2, seq_len=256, precision="mixed")) == step_memory(
        LLAMA, StepOptions(batch_size=2, seq_len=256)
    )


def test_fp16_autocast_steps_like_bf16_autocast():
    assert step_memory(LLAMA, StepOptions(batch_size=2, seq_len=256, precision="fp16-amp")) == step_memory(
        LLAMA, StepOptions(batch_size=2, seq_len=256, precision="amp")
    )


def test_checkpointing_keeps_one_input_a_layer():
    plain, full = (
        step_memory(LLAMA, StepOptions(batch_size=1, seq_len=2048, checkpointing=kind)) for kind in ("none", "full")
    )
    inputs = 22 * 2048 * 2048 * 2
    assert inputs < full.forward["activations"] < inputs + 150 * MIB < plain.forward["activations"]


def test_eager_attention_keeps_its_weights_in_float32_and_in_bf16():
    sdpa, eager = (
        step_memory(LLAMA, StepOptions(batch_size=1, seq_len=2048, attention=attention)).forward["activations"]
        for attention in ("sdpa", "eager")
    )
    weights = 22 * 32 * 2048 * 2048
    assert 6 * weights < eager - sdpa < 6.6 * weights


def test_a_larger_batch_needs_more():
    peaks = [sum(step_memory(LLAMA, StepOptions(batch_size=b, seq_len=512)).backward.values()) for b in (1, 2, 3, 4, 8)]
    assert peaks == sorted(peaks)
