"""Job files of other programs: what is read, what is assumed, what is named as not understood, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optplan.planner.errors import ConfigError
from optplan.planner.trainers.importing import _READERS, FORMATS, JobRequest, read_job, request_of
from optplan.planner.trainers.reading import ImportedJob, Reading

STEP = {"gpus": 1, "sharding": "none"}


def job_of(folder: Path, text: str, suffix: str = "yaml") -> ImportedJob:
    path = folder / f"job.{suffix}"
    path.write_text(text)
    return read_job(str(path))


def asked(job: ImportedJob, *, given: tuple[str, ...] = (), **arguments: Any) -> JobRequest:
    step = STEP | {name: arguments.pop(name) for name in given if name in arguments}
    whole: dict[str, Any] = {"model": None, "optimizers": None, "settings": None} | arguments
    return request_of(job, step=step, given=given, **whole)


HF = """
model_name_or_path: meta-llama/Llama-3.1-8B
block_size: 1024
output_dir: out
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
max_grad_norm: 0
optim: paged_adamw_8bit
bf16: true
torch_dtype: float32
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: true}
attn_implementation: flash_attention_2
learning_rate: 1e-5
torch_compile: true
neftune_noise_alpha: null
learnig_rate: 3
"""


def test_hf_arguments(tmp_path: Path) -> None:
    job = job_of(tmp_path, HF)
    assert (job.format, job.model) == ("hf-args", "meta-llama/Llama-3.1-8B")
    assert (job.optimizer, job.options) == (
        "paged-adamw-8bit",
        {"implementation": "bitsandbytes", "hf_embeddings_32bit": "true"},
    )
    assert job.flags == {
        "batch_size": 4,
        "grad_accum": 2,
        "seq_len": 1024,
        "precision": "amp",
        "checkpointing": "full-reentrant",
        "attention": "flash",
    }
    assert (job.not_modelled, job.not_understood, job.assumed) == (["torch_compile"], ["learnig_rate"], [])


def test_what_hf_arguments_leave_open_is_assumed_aloud(tmp_path: Path) -> None:
    job = job_of(tmp_path, json.dumps({"output_dir": "out", "gradient_checkpointing": True}), "json")
    assert job.flags == {
        "batch_size": 8,
        "grad_accum": 1,
        "clip_grad_norm": 1.0,
        "precision": "bf16",
        "checkpointing": "full",
    }
    assert [one.flag for one in job.assumed] == [
        "batch_size",
        "grad_accum",
        "clip_grad_norm",
        "seq_len",
        "precision",
        "optimizer",
        "checkpointing",
    ]
    assert asked(job, model="gpt2", given=("batch_size", "seq_len", "precision"), batch_size=2).notes[1] == (
        "assumed: --grad-accum 1 (the file does not say; the program's default); --clip-grad-norm 1.0 (the file does "
        "not say; the Trainer's default); --optimizer adamw (the file does not say; adamw_torch_fused is the Trainer's "
        "default); --checkpointing full (the file does not say use_reentrant; transformers 5 takes false); --gpus 1 "
        "(the launcher sets the number, with --gpus N its sharding is ddp-copies)"
    )


@pytest.mark.parametrize(
    ("fields", "optimizer", "options"),
    [
        ({"optim": "adamw_torch"}, "adamw", {"implementation": "foreach"}),
        ({"optim": "adamw_torch_4bit"}, "adamw-4bit", {"implementation": "torchao"}),
        ({"optim": "adafactor"}, "adafactor", {"implementation": "transformers"}),
        ({"optim": "sgd"}, "sgd", {"implementation": "foreach", "momentum": "0"}),
        (
            {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
            "sgd",
            {"implementation": "foreach", "momentum": "0.9"},
        ),
        (
            {"optim": "galore_adamw", "optim_args": "rank=64,scale=0.5", "optim_target_modules": "all-linear"},
            "galore",
            {"implementation": "galore_torch", "rank": "64"},
        ),
        ({"optim": "apollo_adamw"}, "apollo", {"implementation": "apollo_torch", "rank": "128"}),
        ({"optim": "lion_32bit"}, None, {}),
    ],
)
def test_optimizers_of_the_trainer(
    fields: dict[str, str], optimizer: str | None, options: dict[str, str], tmp_path: Path
) -> None:
    job = job_of(tmp_path, json.dumps({"output_dir": "out"} | fields), "json")
    assert (job.optimizer, job.options) == (optimizer, options)
    assert ("the optimizer 'lion_32bit' is not modelled: every known one is shown instead" in job.notes) == (
        optimizer is None
    )


def test_axolotl(tmp_path: Path) -> None:
    job = job_of(
        tmp_path,
        """
base_model: Qwen/Qwen3-8B
micro_batch_size: 2
gradient_accumulation_steps: 4
optimizer: ao_adamw_fp8
learning_rate: 2e-5
bf16: auto
flash_attention: true
gradient_checkpointing: offload
sample_packing: true
max_grad_norm: 0.5
liger_fused_linear_cross_entropy: true
fsdp_version: 2
fsdp_config: {reshard_after_forward: false, offload_params: false}
datasets: [{path: a, type: b}]
""",
    )
    assert (job.format, job.model, job.optimizer) == ("axolotl", "Qwen/Qwen3-8B", "adamw-fp8")
    assert job.flags == {
        "batch_size": 2,
        "grad_accum": 4,
        "clip_grad_norm": 0.5,
        "seq_len": 512,
        "precision": "bf16",
        "checkpointing": "full",
        "attention": "flash",
        "fused_loss": "liger",
    }
    assert job.sharding == "fsdp2-noreshard"
    assert [one.text for one in job.assumed] == ["--seq-len 512 (the file does not say; the program's default)"]
    assert (job.not_modelled, job.not_understood) == (["gradient_checkpointing", "sample_packing"], [])


def test_llama_factory(tmp_path: Path) -> None:
    job = job_of(
        tmp_path,
        """
model_name_or_path: Qwen/Qwen2.5-7B
stage: sft
do_train: true
finetuning_type: full
dataset: a
template: qwen
cutoff_len: 4096
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
bf16: true
use_adam_mini: true
flash_attn: fa2
deepspeed: examples/deepspeed/ds_z3_config.json
""",
    )
    assert (job.format, job.model) == ("llama-factory", "Qwen/Qwen2.5-7B")
    assert (job.optimizer, job.options) == ("adam-mini", {"implementation": "official"})
    assert job.flags == {
        "batch_size": 1,
        "grad_accum": 8,
        "clip_grad_norm": 1.0,
        "seq_len": 4096,
        "precision": "mixed",
        "checkpointing": "full-reentrant",
        "attention": "flash",
    }
    assert job.notes == [
        "the DeepSpeed file 'examples/deepspeed/ds_z3_config.json' is not opened: give --sharding, or that file "
        "to --from",
        "DeepSpeed keeps fp32 master weights beside 16-bit parameters: --precision mixed",
    ]
    assert job.not_understood == []


TITAN = """
[model]
name = "llama3"
flavor = "8B"
[optimizer]
name = "AdamW"
implementation = "foreach"
[training]
local_batch_size = 2
global_batch_size = 64
seq_len = 8192
max_norm = 1.0
[parallelism]
data_parallel_shard_degree = 8
tensor_parallel_degree = 1
[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"
[metrics]
log_freq = 10
[surprise]
key = 1
"""


def test_torchtitan(tmp_path: Path) -> None:
    job = job_of(tmp_path, TITAN, "toml")
    assert (job.format, job.model, job.optimizer) == ("torchtitan", "llama-3.1-8b", "adamw")
    assert job.options == {"implementation": "foreach"}
    assert job.flags == {
        "batch_size": 2,
        "seq_len": 8192,
        "clip_grad_norm": 1.0,
        "precision": "mixed",
        "grad_accum": 4,
        "checkpointing": "selective",
    }
    assert (job.gpus, job.sharding) == (8, "fsdp2")
    assert (job.not_modelled, job.not_understood) == (["parallelism.tensor_parallel_degree"], ["surprise.key"])
    assert "selective_ac_option 'op' is answered as every second layer" in job.notes
    assert asked(job).step == {**STEP, **job.flags, "gpus": 8, "sharding": "fsdp2"}


def test_torchtune(tmp_path: Path) -> None:
    job = job_of(
        tmp_path,
        """
tokenizer: {_component_: torchtune.models.qwen2_5.qwen2_5_tokenizer, max_seq_len: 4096}
model: {_component_: torchtune.models.qwen2_5.qwen2_5_1_5b_base}
batch_size: 2
gradient_accumulation_steps: 1
optimizer: {_component_: torchao.optim.AdamW4bit, lr: 2e-5}
optimizer_in_bwd: true
clip_grad_norm: null
compile: true
enable_activation_checkpointing: true
dtype: bf16
""",
    )
    assert (job.format, job.model) == ("torchtune", "qwen2.5-1.5b")
    assert (job.optimizer, job.options) == ("adamw-4bit", {"implementation": "torchao"})
    assert job.flags == {
        "batch_size": 2,
        "grad_accum": 1,
        "seq_len": 4096,
        "precision": "bf16",
        "checkpointing": "full",
        "step_in_backward": True,
    }
    assert (job.not_modelled, job.not_understood) == (["compile"], [])


@pytest.mark.parametrize(
    ("component", "model"),
    [
        ("torchtune.models.llama2.llama2_13b", "llama-2-13b"),
        ("torchtune.models.llama3_2.llama3_2_3b", "llama-3.2-3b"),
        ("torchtune.models.gemma2.gemma2_27b", "gemma-2-27b"),
        ("torchtune.models.qwen2_5.qwen2_5_7b_instruct", "qwen2.5-7b"),
        ("torchtune.models.phi4.phi4_14b", "phi-4"),
        ("torchtune.models.qwen2.qwen2_7b", None),
    ],
)
def test_torchtunes_models_are_those_of_the_catalogue(component: str, model: str | None, tmp_path: Path) -> None:
    assert job_of(tmp_path, f"model: {{_component_: {component}}}\nbatch_size: 1\n").model == model


def test_deepspeed(tmp_path: Path) -> None:
    document = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        "steps_per_print": 10,
    }
    job = job_of(tmp_path, json.dumps(document), "json")
    assert (job.format, job.model, job.sharding) == ("deepspeed", None, "zero2")
    assert (job.optimizer, job.options) == ("adamw", {"implementation": "foreach"})
    assert job.flags == {"batch_size": 1, "grad_accum": 4, "clip_grad_norm": 1.0, "precision": "mixed"}
    assert job.not_modelled == ["zero_optimization.offload_optimizer.device", "zero_optimization.overlap_comm"]
    with pytest.raises(ConfigError, match="names no model that is known: add --model NAME"):
        asked(job)


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    job = job_of(tmp_path, HF)
    request = asked(
        job,
        model="gpt2",
        optimizers=["sgd"],
        settings=["momentum=0.5"],
        given=("batch_size", "gpus", "precision"),
        batch_size=1,
        gpus=2,
        precision="fp32",
    )
    assert (request.model, request.optimizers, request.settings) == ("gpt2", ["sgd"], ["momentum=0.5"])
    assert request.step["batch_size"] == 1
    assert request.step["precision"] == "fp32"
    assert (request.step["gpus"], request.step["sharding"]) == (2, "ddp-copies")
    assert request.step["seq_len"] == 1024
    assert request.notes[0] == (
        f"{tmp_path}/job.yaml, a job of hf-args, is read as --grad-accum 2 --seq-len 1024 "
        "--checkpointing full-reentrant --attention flash"
    )


def test_options_of_the_file_come_before_those_of_the_command_line(tmp_path: Path) -> None:
    request = asked(job_of(tmp_path, HF), settings=["hf_embeddings_32bit=false"])
    assert request.settings == [
        "implementation=bitsandbytes",
        "hf_embeddings_32bit=true",
        "hf_embeddings_32bit=false",
    ]


BAD = [
    ("yaml", "a: [", "is not YAML: expected the node content, but found '<stream end>' at line 1 column 5"),
    ("yaml", "- 1\n- 2\n", "must hold a mapping of fields, got [1, 2]"),
    ("yaml", "a: !!python/object/apply:os.system ['true']\n", "is not YAML: could not determine a constructor for the "
     "tag 'tag:yaml.org,2002:python/object/apply:os.system' at line 1 column 4"),
    ("yaml", "a: &x [*x]\n", "is nested more than 32 deep, which no job is"),
    ("yaml", "[" * 5000, "is nested more than 32 deep, which no job is"),
    ("yaml", "a: 1\n", "is no job file of a known program; known: HF TrainingArguments, axolotl, LLaMA-Factory and "
     "torchtune (YAML), torchtitan (TOML), DeepSpeed (JSON)"),
    ("toml", "a = \n", "is not TOML: invalid value (at line 1, column 5)"),
    ("toml", "[model]\nname = 'x'\n", "is no job file of a known program; known: HF TrainingArguments, axolotl, "
     "LLaMA-Factory and torchtune (YAML), torchtitan (TOML), DeepSpeed (JSON)"),
    ("json", "{", "is not JSON: Expecting property name enclosed in double quotes at line 1 column 2"),
    ("txt", "a", "is no job file: its name must end in .yaml, .yml, .json, .toml"),
    ("yaml", "base_model: a\nmicro_batch_size: two\n", ": micro_batch_size must be a whole number, got 'two'"),
    ("yaml", "base_model: a\nmax_grad_norm: [1]\n", ": max_grad_norm must be a number, got [1]"),
    ("yaml", "output_dir: a\ngradient_checkpointing: maybe\n",
     ": gradient_checkpointing must be true or false, got 'maybe'"),
    ("yaml", "base_model: a\noptimizer: [adamw]\n", ": optimizer must be text, got ['adamw']"),
    ("yaml", "base_model: a\nadapter: qlora\n", "has adapter: 'qlora', which trains only a part of the parameters, or "
     "quantized ones; only training of all parameters is modelled"),
    ("yaml", "model_name_or_path: a\nfinetuning_type: lora\n", "has finetuning_type: 'lora', which trains an adapter "
     "(the program's default is lora); only training of all parameters is modelled"),
    ("yaml", "model: {_component_: torchtune.models.llama3.lora_llama3_8b}\n", "has model._component_: "
     "'torchtune.models.llama3.lora_llama3_8b', which trains an adapter; only training of all parameters is modelled"),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "text", "sentence"), BAD, ids=[text[:30] for _, text, _ in BAD])
def test_bad_files_are_one_sentence(suffix: str, text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        job_of(tmp_path, text, suffix)
    assert str(caught.value).removeprefix(f"'{tmp_path}/job.{suffix}'").strip() == sentence


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 1048577 bytes; a job file has at most 1048576"):
        job_of(tmp_path, "a" * (2**20 + 1))


def test_a_document_that_multiplies_is_not_walked(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(ConfigError, match="has more than 10000 fields, which no job has"):
        job_of(tmp_path, "\n".join(lines))


def test_nothing_that_a_file_names_is_imported_or_opened(tmp_path: Path) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    job = job_of(
        tmp_path, f"model: {{_component_: trap.model}}\ncheckpointer: {{checkpoint_dir: {tmp_path}}}\nbatch_size: 1\n"
    )
    assert job.notes[0] == "torchtune's 'model' is not in the catalogue"


def test_the_programs() -> None:
    assert FORMATS == ("axolotl", "torchtune", "torchtitan", "deepspeed", "llama-factory", "hf-args")


WHOLE: dict[str, dict[str, Any]] = {
    "hf-args": {
        "output_dir": "a", "model_name_or_path": "gpt2", "per_device_train_batch_size": 1, "max_grad_norm": 1.0,
        "gradient_accumulation_steps": 1, "block_size": 8, "optim": "sgd", "optim_args": "momentum=0.9",
        "bf16": True, "fp16": False, "dtype": "float32", "gradient_checkpointing": True, "fsdp": "full_shard",
        "gradient_checkpointing_kwargs": {"use_reentrant": True}, "fsdp_config": {"version": 2}, "deepspeed": "a",
        "use_liger_kernel": True, "liger_kernel_config": {"rope": False}, "attn_implementation": "sdpa",
        "use_peft": False,
    },
    "axolotl": {
        "base_model": "gpt2", "micro_batch_size": 1, "sequence_len": 8, "optimizer": "came_pytorch", "bf16": True,
        "fp16": False, "gradient_checkpointing": True, "flash_attention": True, "adapter": None,
        "liger_fused_linear_cross_entropy": True, "deepspeed": {"zero_optimization": {"stage": 2}},
    },
    "llama-factory": {
        "model_name_or_path": "gpt2", "finetuning_type": "full", "cutoff_len": 8, "pure_bf16": True, "bf16": False,
        "use_adam_mini": False, "use_galore": True, "galore_rank": 8, "flash_attn": "fa2", "use_reentrant_gc": True,
        "disable_gradient_checkpointing": False, "enable_liger_kernel": True, "quantization_bit": None,
    },
    "deepspeed": {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}, "fp16": {"enabled": "auto"},
        "torch_autocast": {"enabled": True, "dtype": "float16"}, "optimizer": {"type": "Adam"},
        "zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}},
    },
    "torchtune": {
        "model": {"_component_": "torchtune.models.llama3.llama3_8b"}, "tokenizer": {"max_seq_len": 8},
        "optimizer": {"_component_": "torch.optim.SGD", "momentum": 0.9, "fused": True}, "batch_size": 1,
        "gradient_accumulation_steps": 1, "clip_grad_norm": 1.0, "dtype": "bf16", "optimizer_in_bwd": True,
        "enable_activation_checkpointing": True, "fsdp_cpu_offload": True,
    },
    "torchtitan": {
        "model": {"name": "llama3", "flavor": "8B"}, "optimizer": {"name": "AdamW", "implementation": "fused"},
        "training": {"local_batch_size": 1, "global_batch_size": 8, "seq_len": 8, "max_norm": 1.0,
                     "dtype": "float32", "mixed_precision_param": "bfloat16", "enable_cpu_offload": True},
        "parallelism": {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 4,
                        "fsdp_reshard_after_forward": "never"},
        "activation_checkpoint": {"mode": "selective", "selective_ac_option": "2"},
    },
}  # fmt: skip


def places(document: dict[str, Any], before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in document.items():
        found.append((*before, key))
        if isinstance(value, dict):
            found += places(value, (*before, key))
    return found


def with_value(document: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = place
    return document | {first: with_value(document[first], tuple(rest), value) if rest else value}


@pytest.mark.parametrize("program", WHOLE)
@pytest.mark.parametrize("value", [None, True, -1, 0, 2.5, "surprise", "", [], [1], {}, {"a": 1}], ids=repr)
def test_a_value_of_any_kind_is_read_or_refused(program: str, value: Any) -> None:
    document = WHOLE[program]
    for place in places(document):
        reading = Reading(with_value(document, place, value), path="job", format=program)
        try:
            _READERS[program](reading)
            request_of(reading.finish(), model="gpt2", optimizers=None, settings=None, step=dict(STEP), given=())
        except ConfigError as error:
            assert "\n" not in str(error)
