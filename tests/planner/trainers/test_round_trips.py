"""What is written for a program is read back as the same job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optplan.planner.records import StepConfig
from optplan.planner.trainers.export import export
from optplan.planner.trainers.importing import read_job, request_of

CASES: list[tuple[str, str, str, dict[str, Any], dict[str, Any]]] = [
    ("hf-args", "adamw", "fused", {}, {"checkpointing": "full", "grad_accum": 4, "clip_grad_norm": 0.5}),
    ("hf-args", "apollo", "apollo_torch", {"rank": "64", "scale_type": "tensor"}, {"precision": "fp16-amp"}),
    ("torchtitan", "adamw", "foreach", {}, {"clip_grad_norm": 1.0, "checkpointing": "selective"}),
    ("torchtitan", "adamw", "fused", {}, {"clip_grad_norm": 1.0, "precision": "amp", "step_in_backward": True}),
    (
        "torchtitan",
        "adamw",
        "fused",
        {},
        {"clip_grad_norm": 1.0, "precision": "mixed", "gpus": 4, "sharding": "fsdp2-noreshard", "grad_accum": 2},
    ),
    ("axolotl", "came", "came_pytorch", {}, {"fused_loss": "liger", "seq_len": 777}),
    ("axolotl", "adamw-8bit", "torchao", {}, {"precision": "fp32", "checkpointing": "full-reentrant"}),
    ("llama-factory", "adam-mini", "official", {}, {"attention": "flash", "checkpointing": "full"}),
    ("llama-factory", "adamw", "foreach", {}, {"precision": "amp", "attention": "eager"}),
    ("deepspeed", "adamw", "fused", {}, {"precision": "mixed", "clip_grad_norm": 1.0, "grad_accum": 8}),
    ("deepspeed", "adamw", "foreach", {}, {"precision": "amp"}),
]


@pytest.mark.parametrize(("target", "optimizer", "implementation", "options", "step"), CASES)
def test_a_job_survives_the_way_there_and_back(
    target: str, optimizer: str, implementation: str, options: dict[str, Any], step: dict[str, Any], tmp_path: Path
) -> None:
    base: dict[str, Any] = {
        "precision": "bf16",
        "batch_size": 3,
        "seq_len": 1024,
        "grad_accum": 1,
        "checkpointing": "none",
        "attention": "sdpa",
        "gpus": 1,
        "sharding": "none",
    }
    config = StepConfig(**base | step)
    written = export(
        target, model="qwen3-8b", optimizer=optimizer, implementation=implementation, options=options, config=config
    )
    path = tmp_path / written.file_name
    path.write_text(written.text)
    job = read_job(str(path))
    request = request_of(
        job, model="qwen3-8b", optimizers=None, settings=None, step={"gpus": 1, "sharding": "none"}, given=()
    )
    assert (job.format, job.optimizer, job.not_understood) == (target, optimizer, [])
    settings = dict(setting.split("=") for setting in request.settings)
    assert {key: settings[key] for key in options} == options
    for name, value in request.step.items():
        if name == "seq_len" and target in ("hf-args", "deepspeed"):
            continue  # their files have no such field
        assert value == getattr(config, name), name
    default = StepConfig(**base)
    silent = {"seq_len", "attention"} if target in ("hf-args", "deepspeed", "torchtitan") else set()
    for name in StepConfig.__struct_fields__:
        if getattr(config, name) != getattr(default, name) and name not in silent:
            assert request.step[name] == getattr(config, name), name
