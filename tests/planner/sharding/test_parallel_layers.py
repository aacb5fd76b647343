"""Tensor, sequence and pipeline parallelism against the published formulas and sizes that can be counted by hand."""

import pytest

from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.estimate import estimate
from optplan.planner.request import check_request
from optplan.planner.sharding.base import Ranks
from optplan.planner.sharding.fsdp2 import Fsdp2
from optplan.planner.sharding.pipeline import Stage, stage_part
from optplan.planner.sharding.tensor_parallel import tensor_parallel_part
from optplan.planner.step.options import StepOptions
from optplan.planner.step.rules import record_step, step_memory
from optplan.planner.step.simulation import StepSimulator
from optplan.planner.timeline import TimelineBuilder

LLAMA = load_model("llama-2-7b")
HIDDEN, WIDTH, HEADS, VOCABULARY, LAYERS = 4096, 11008, 32, 32000, 32


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_ranks_matrices_are_a_part_and_its_norms_whole(ranks):
    matrices = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * WIDTH) + 2 * VOCABULARY * HIDDEN
    norms = (2 * LAYERS + 1) * HIDDEN
    assert tensor_parallel_part(LLAMA, ranks).num_parameters == matrices // ranks + norms


@pytest.mark.parametrize(("ranks", "sequence"), [(1, False), (2, False), (2, True), (8, False), (8, True)])
def test_a_layer_saves_what_the_formula_says(ranks, sequence):
    # bf16 Llama, bytes a token: norms 16 h + 8 (of them their outputs, 4 h, are what the products take), heads 8 h + 4
    # a head, MLP 8 f. Tensor parallelism divides heads and MLP; sequence parallelism the norms too, but for the
    # gathered tokens that the products take, beside which the rank's own part of the norm's output is let go.
    norms, inputs = 16 * HIDDEN + 8 - 4 * HIDDEN, 4 * HIDDEN
    inside = (8 * HIDDEN + 4 * HEADS + 8 * WIDTH) // ranks
    per_token = (norms // ranks if sequence else norms) + inputs + inside
    options = StepOptions(batch_size=1, seq_len=2048, tensor_parallel=ranks, sequence_parallel=sequence, ends=False)
    few, more = (
        step_memory(tensor_parallel_part(stage_part(LLAMA, Stage(0, stages)), ranks), options).saved
        for stages in (4, 2)
    )
    assert (more - few) / 8 / 2048 == pytest.approx(per_token, rel=0.001)


@pytest.mark.parametrize(
    ("schedule", "stage", "expected"),
    [
        ("gpipe", 0, 16),
        ("gpipe", 3, 16),
        ("1f1b", 0, 4),
        ("1f1b", 3, 1),
        # Megatron warms up with 2 x (stages after) + stages chunks of half a stage, and one more is run.
        ("interleaved", 0, 6),
        ("interleaved", 3, 3),
    ],
)
def test_micro_batches_in_flight(schedule, stage, expected):
    assert Stage(stage, 4).num_in_flight(schedule, 16) == expected


def test_no_more_micro_batches_are_in_flight_than_there_are():
    assert [Stage(0, 8).num_in_flight(schedule, 2) for schedule in ("gpipe", "1f1b", "interleaved")] == [2, 2, 2]


def test_stages_share_the_layers_and_the_ends():
    parts = [stage_part(LLAMA, Stage(index, 3)) for index in range(3)]
    assert [part.config["num_hidden_layers"] for part in parts] == [11, 11, 10]
    assert sum(part.num_parameters for part in parts) == LLAMA.num_parameters
    names = [{p.name for p in part.parameters if "layers" not in p.name} for part in parts]
    assert names == [{"model.embed_tokens.weight"}, set(), {"model.norm.weight", "lm_head.weight"}]


def test_waiting_micro_batches_are_saved_once_each():
    part = stage_part(LLAMA, Stage(0, 4))
    options = StepOptions(batch_size=1, seq_len=2048, grad_accum=8, ends=False)
    few, more = (
        StepSimulator(part, options, num_in_flight=count).simulate([], []).phases["backward"] for count in (4, 8)
    )
    # Eight layers of 186 504 B a token; blocks of 43 MiB come out of segments of 44 MiB.
    assert (more - few) / 4 == pytest.approx(8 * 186_504 * 2048, rel=0.025)


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("index", [0, 1, 3])
def test_layers_written_once_stand_for_all_of_a_sharded_stage(index, stored):
    stage = Stage(index, 4)
    part = stage_part(load_model("llama-2-70b"), stage)
    options = StepOptions(batch_size=1, seq_len=256, stored_dtype=stored, starts=stage.starts, ends=stage.ends)
    timelines = [TimelineBuilder(), TimelineBuilder()]
    for timeline, compressed in zip(timelines, (True, False), strict=True):
        record_step(part, options, compressed=compressed, strategy=Fsdp2(Ranks(8))).write(timeline)
    written, in_full = ([str(event) for event in timeline.events] for timeline in timelines)
    assert len(written) > 1000
    assert written == in_full


@pytest.mark.parametrize(("schedule", "stage", "count"), [("1f1b", 0, 4), ("gpipe", 3, 8)])
def test_the_largest_stage_is_shown(schedule, stage, count):
    report = estimate(
        LLAMA, gpu="h200", gpus=4, pipeline_parallel=4, grad_accum=8, pipeline_schedule=schedule, optimizer="sgd"
    )
    assert report.notes == [f"stage {stage} of 0 to 3 is shown, the largest: it holds what {count} micro-batches saved"]


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (
            {"gpus": 4, "tensor_parallel": 3},
            "--tensor-parallel times --pipeline-parallel must divide --gpus: got 3 times 1 of 4 GPUs",
        ),
        (
            {"gpus": 6, "tensor_parallel": 3, "sharding": "ddp"},
            "--tensor-parallel must divide the num_attention_heads of llama-2-7b, 32, got 3",
        ),
        (
            {"gpus": 64, "pipeline_parallel": 64},
            "--pipeline-parallel must be at most the 32 layers of llama-2-7b, got 64",
        ),
        (
            {"gpus": 2, "sequence_parallel": True, "sharding": "ddp"},
            "--sequence-parallel needs --tensor-parallel of at least 2, whose ranks share the tokens, got 1",
        ),
        (
            {"gpus": 2, "tensor_parallel": 2, "sequence_parallel": True, "seq_len": 7},
            "--sequence-parallel deals out the tokens of a sequence: --seq-len must be a multiple of 2, got 7",
        ),
        (
            {"gpus": 2, "tensor_parallel": 2, "sharding": "fsdp2"},
            "--sharding fsdp2 needs --gpus of at least 4, got 2, which --tensor-parallel and --pipeline-parallel use "
            "up (2)",
        ),
        (
            {"gpus": 4, "tensor_parallel": 2},
            "--gpus 4 in 2 copies of the model needs a --sharding strategy: ddp, ddp-copies, zero1, zero1-deepspeed, "
            "zero2, zero3, fsdp2, fsdp2-noreshard, fsdp2-hybrid, fsdp2-offload",
        ),
        (
            {"gpus": 8, "sharding": "fsdp2-hybrid"},
            "--sharding fsdp2-hybrid shards within a node and repeats the shards across nodes: it needs several nodes "
            "of several GPUs, got 8 GPUs on 1 node; use fsdp2",
        ),
        (
            {"gpus": 2, "sharding": "zero2"},
            "--sharding zero2 is DeepSpeed's, which keeps fp32 master weights: use --precision mixed, got bf16",
        ),
        (
            {"gpus": 2, "sharding": "zero1", "precision": "mixed"},
            "--sharding zero1 is torch's ZeroRedundancyOptimizer, which has no master weights: use --sharding "
            "zero1-deepspeed with --precision mixed",
        ),
        (
            {"gpus": 2, "sharding": "ddp", "step_in_backward": True},
            "--sharding ddp and --step-in-backward contradict each other: gradients are passed on in groups",
        ),
        (
            {"gpus": 2, "sharding": "fsdp2", "checkpointing": "full-reentrant"},
            "--sharding fsdp2 and --checkpointing full-reentrant are not modelled together; use --checkpointing full",
        ),
        (
            {"gpus": 2, "pipeline_parallel": 2, "fused_loss": "liger"},
            "--pipeline-parallel and --fused-loss are not modelled together",
        ),
        ({"gpus": 2, "nodes": 0, "sharding": "ddp"}, "--nodes must be an integer between 1 and 65536, got 0"),
        (
            {"gpus": 2, "pipeline_parallel": 2, "pipeline_schedule": "zigzag"},
            "unknown pipeline-schedule for --pipeline-schedule 'zigzag'; known: gpipe, 1f1b, interleaved",
        ),
    ],
)
def test_what_contradicts_itself_is_one_sentence(step, sentence):
    with pytest.raises(ConfigError) as error:
        check_request(LLAMA, gpu="h200", **step)
    assert str(error.value) == sentence


def test_a_model_of_another_family_is_not_divided():
    with pytest.raises(ConfigError) as error:
        check_request(load_model("gpt2"), gpu="h200", gpus=2, tensor_parallel=2)
    assert str(error.value) == (
        "--tensor-parallel is modelled for llama, mistral, qwen2, qwen3, gpt2 is of the family gpt2"
    )


@pytest.mark.parametrize(
    ("optimizer", "flags"), [("galore", {"sharding": "fsdp2"}), ("adam-mini", {"tensor_parallel": 2})]
)
def test_an_optimizer_that_is_not_described_on_parts_is_refused(optimizer, flags):
    with pytest.raises(ConfigError) as error:
        estimate(LLAMA, gpu="h200", gpus=2, optimizer=optimizer, **flags)
    what = "rows of parameters" if "sharding" in flags else "pieces of tensors"
    flag = "--sharding fsdp2" if "sharding" in flags else "--tensor-parallel 2"
    implementation = {"galore": "galore_torch", "adam-mini": "optplan"}[optimizer]
    assert str(error.value) == (
        f"{optimizer} with implementation={implementation} is not modelled on {what}, as {flag} hands it; "
        "--sharding ddp and zero1 take every optimizer"
    )
