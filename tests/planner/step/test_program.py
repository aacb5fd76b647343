from itertools import groupby

import pytest

from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.step.program import plan_layers, recorded_layers
from optplan.planner.step.rules import StepOptions, record_step
from optplan.planner.timeline import Allocation, TimelineBuilder

SIZES = {
    "vocab_size": 2003,
    "hidden_size": 384,
    "intermediate_size": 1088,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 2003, "n_embd": 384, "n_head": 6}


def small_model(model_type, num_layers, **more):
    config = {**SIZES, "model_type": model_type, "num_hidden_layers": num_layers, **more}
    if model_type == "gpt2":
        config = {**GPT2, "n_layer": num_layers}
    return family_of(model_type).spec(Fields(config, where="test"), name="test", source="test")


def written(program):
    """The timeline as text, the names of freed allocations filled in, each run of frees in alphabetical order."""
    timeline = TimelineBuilder()
    gradients = program.write(timeline)
    names, lines = {}, []
    for event in timeline.events:
        if isinstance(event, Allocation):
            names[event.id] = f"{event.bytes} {event.category} {event.name}"
            lines.append(("+", f"{event.phase} {names[event.id]}"))
        else:
            lines.append(("-", f"{event.phase} {names[event.id]}"))
    runs = [list(run) for _, run in groupby(lines, key=lambda line: line[0])]
    ordered = [line for run in runs for line in (run if run[0][0] == "+" else sorted(run))]
    return ordered, {name: names[id_] for name, id_ in gradients.items()}


@pytest.mark.parametrize("num_layers", [1, 2, 4, 5, 8, 14, 21])
@pytest.mark.parametrize(
    ("model_type", "more", "options"),
    [
        ("llama", {}, {}),
        ("llama", {}, {"checkpointing": "full"}),
        ("llama", {"tie_word_embeddings": True}, {"precision": "amp"}),
        ("llama", {}, {"precision": "amp", "checkpointing": "full"}),
        ("llama", {}, {"precision": "fp32", "attention": "eager"}),
        ("qwen3", {}, {"precision": "fp32"}),
        ("phi3", {"pad_token_id": 0}, {}),
        ("gemma2", {"sliding_window": 64}, {"attention": "eager", "checkpointing": "full"}),
        ("gemma3_text", {"sliding_window": 64}, {}),
        ("gemma3_text", {"sliding_window": 64}, {"checkpointing": "full", "precision": "amp"}),
        ("olmo2", {}, {"precision": "amp"}),
        ("gpt2", {}, {"checkpointing": "full"}),
        ("gpt2", {}, {"precision": "amp", "attention": "eager"}),
        ("llama", {}, {"checkpointing": "selective"}),
        ("llama", {}, {"checkpointing": "full-reentrant"}),
        ("llama", {}, {"padding_mask": True, "keep_grads": True}),
        ("llama", {}, {"fused_loss": "liger", "step_in_backward": True}),
        ("gpt_neox", {}, {"checkpointing": "selective", "precision": "amp"}),
        ("opt", {"ffn_dim": 1088, "word_embed_proj_dim": 384}, {"padding_mask": True}),
        ("bert", {}, {"attention": "eager"}),
        ("roberta", {}, {}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, {"checkpointing": "full"}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}, {}),
    ],
)
def test_a_compressed_step_is_the_step(model_type, more, options, num_layers):
    spec = small_model(model_type, num_layers, **more)
    step = StepOptions(batch_size=2, seq_len=96, **options)
    compressed, whole = record_step(spec, step), record_step(spec, step, compressed=False)
    assert written(compressed) == written(whole)
    assert compressed.use() == whole.use()


T5 = {"vocab_size": 2003, "d_model": 384, "d_ff": 1088, "num_heads": 6, "d_kv": 64}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


@pytest.mark.parametrize("num_layers", [(1, 1), (3, 8), (6, 5), (7, 6), (9, 12), (14, 4)])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "full-reentrant"])
@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({}, {}),
        (GATED, {"precision": "amp"}),
        ({}, {"precision": "fp32", "attention": "eager", "padding_mask": True}),
        (GATED, {"padding_mask": True, "grad_accum": 2}),
        ({"num_heads": 1, "dropout_rate": 0.0}, {"precision": "amp", "attention": "eager", "step_in_backward": True}),
    ],
)
def test_both_stacks_of_t5_are_compressed(more, options, checkpointing, num_layers):
    encoder, decoder = num_layers
    config = {"model_type": "t5", **T5, **more, "num_layers": encoder, "num_decoder_layers": decoder}
    spec = family_of("t5").spec(Fields(config, where="test"), name="test", source="test")
    step = StepOptions(batch_size=2, seq_len=33, checkpointing=checkpointing, **options)
    compressed, whole = record_step(spec, step), record_step(spec, step, compressed=False)
    assert written(compressed) == written(whole)
    assert compressed.use() == whole.use()
    if checkpointing != "selective":
        assert len(compressed.layers) == sum(min(count, 6) for count in num_layers)


@pytest.mark.parametrize(
    ("kinds", "recorded"),
    [
        ("a" * 3, "a" * 3),
        ("a" * 5, "a" * 4),
        ("a" * 80, "a" * 4),
        ("ab" * 13, "ab" + "ab" + "ab"),
        ("aaaaab" * 10 + "aa", "aaaaab" + "aaaaab" + "aa"),
        ("aaaaab" * 4 + "aa", "aaaaab" + "aaaaab" + "aa"),
        ("aabba", "aabba"),
    ],
)
def test_few_layers_stand_for_many(kinds, recorded):
    plan = plan_layers(tuple(kinds))
    assert "".join(kinds[layer.number] for layer in recorded_layers([plan])) == recorded
    assert plan.first + plan.period * plan.repeats + plan.last == len(kinds)


def test_names_say_layer_module_and_operation():
    timeline = TimelineBuilder()
    record_step(small_model("llama", 12), StepOptions(batch_size=1, seq_len=64)).write(timeline)
    made = [(event.name, event.category) for event in timeline.events if isinstance(event, Allocation)]
    for expected in (
        ("model.layers.7.mlp.gate_proj output", "activations"),
        ("model.layers.7.self_attn attention log-sums", "activations"),
        ("model.layers.11.mlp.down_proj weight gradient", "gradients"),
        ("model.embed_tokens weight gradient", "gradients"),
        ("lm_head output", "logits_and_loss"),
        ("loss log-softmax", "logits_and_loss"),
        ("model.layers.0.self_attn attention backward", "workspace"),
    ):
        assert made.count(expected) == 1, expected
