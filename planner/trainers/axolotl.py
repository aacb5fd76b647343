"""An axolotl configuration in YAML.

Source: axolotl 0.19.0, `utils/schemas/*.py`, `utils/config/__init__.py`, `core/builders/base.py`. With `bf16: true` it
trains bf16 parameters under autocast; the `full` of its older versions is no longer accepted.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.trainers import hf_fields
from optplan.planner.trainers.job import LEARNING_RATE, Export, TrainingJob, is_causal
from optplan.planner.trainers.optimizer_code import optimizer_code
from optplan.planner.trainers.shardings import DEEPSPEED, ddp_remark, is_fsdp
from optplan.planner.trainers.text import yaml_text

TARGET = "axolotl"
_OWN = {("adamw-fp8", "torchao"): "ao_adamw_fp8", ("came", "came_pytorch"): "came_pytorch",
        ("flash-adamw", "official"): "flash_adamw"}  # fmt: skip
_LIGER = "axolotl.integrations.liger.LigerPlugin"


def write(job: TrainingJob) -> Export:
    """The configuration, with a placeholder for the dataset.

    Raises:
        ConfigError: axolotl cannot run the job.
    """
    _check(job)
    by_hand = ["name your own dataset under datasets"]
    if job.config.precision == "bf16":
        by_hand.append("axolotl trains its bf16 parameters under autocast, the estimate is of a step without it")
    fields: dict[str, Any] = {
        "base_model": job.model,
        "datasets": [{"path": "mhenrichsen/alpaca_2k_test", "type": "alpaca"}],
        "output_dir": "./out",
        "sequence_len": job.config.seq_len,
        "sample_packing": False,
        "pad_to_sequence_len": True,
        "micro_batch_size": job.config.batch_size,
        "gradient_accumulation_steps": job.config.grad_accum,
        "max_grad_norm": job.config.clip_grad_norm or 0.0,
        "num_epochs": 1,
        "learning_rate": LEARNING_RATE,
        **_precision(job),
        "attn_implementation": hf_fields.ATTENTION[job.config.attention],
        **hf_fields.checkpointing_fields(job, target=TARGET),
    }
    optimizer, remarks = _optimizer(job)
    fields |= optimizer
    if job.config.fused_loss == "liger":
        fields |= {"plugins": [_LIGER], "liger_fused_linear_cross_entropy": True}
    fields |= _sharding(job)
    if "deepspeed" in fields:
        by_hand.append("write ds_config.json beside it with --export deepspeed")
    by_hand += [*remarks, *ddp_remark(job, "axolotl"), *hf_fields.common_remarks(job)]
    return Export(
        target=TARGET,
        file_name="axolotl.yaml",
        text=yaml_text(fields, by_hand=by_hand),
        by_hand=by_hand,
        command=hf_fields.launch(job, _command(job)),
    )


def _command(job: TrainingJob) -> str:
    many = f" -- --num-processes={job.config.gpus}" if job.config.gpus > 1 else ""
    return f"axolotl train axolotl.yaml{many}"


def _check(job: TrainingJob) -> None:
    if not is_causal(job.spec):
        raise job.refuse(TARGET, "it trains causal language models only", instead="hf-args")
    if job.config.step_in_backward:
        raise job.refuse(TARGET, "its Trainer takes no optimizer step within backward")
    if job.config.sharding in ("zero1", "fsdp2-hybrid"):
        raise job.refuse(TARGET, f"it has no sharding like {job.config.sharding}")
    if job.config.fused_loss == "chunked":
        raise job.refuse(TARGET, "its chunked_cross_entropy casts the logits chunk by chunk and holds all of them")


def _precision(job: TrainingJob) -> dict[str, Any]:
    precision = job.config.precision
    if precision == "bf16" or (precision == "mixed" and job.config.sharding in DEEPSPEED):
        return {"bf16": True}
    if precision == "fp32":
        return {"bf16": False, "fp16": False, "tf32": False}
    raise job.refuse(TARGET, f"it loads the model in 16 bits for autocast, which --precision {precision} is not",
                     instead="llama-factory")  # fmt: skip


def _optimizer(job: TrainingJob) -> tuple[dict[str, Any], list[str]]:
    """The optimizer's fields, or the plugin that must build it."""
    own = _OWN.get((job.optimizer, job.implementation))
    if own is not None and not job.settings:
        return {"optimizer": own}, []
    named = hf_fields.optimizer_fields(job)
    if named is not None:
        fields = {"optimizer": named["optim"]} | {
            key: named[key] for key in ("optim_args", "optim_target_modules") if key in named
        }
        if fields.get("optim_target_modules") == "all-linear":
            fields["optim_target_modules"] = "all_linear"
        return fields, hf_fields.optimizer_remarks(job)
    code = optimizer_code(job, target=TARGET)
    imports = "; ".join([*code.imports, *(line.strip() for line in code.before)])
    remarks = [f"install {code.package}"] if code.package else []
    remarks.append(
        f"axolotl has no name for {job.optimizer} ({job.implementation}): list a plugin of your own under plugins, a "
        f"BasePlugin whose create_optimizer(self, cfg, trainer) is: {imports}; model = trainer.model; "
        f"return {code.expression('cfg.learning_rate')}; without it adamw_torch_fused would run"
    )
    return {}, remarks


def _sharding(job: TrainingJob) -> dict[str, Any]:
    sharding = job.config.sharding
    if sharding in DEEPSPEED:
        return {"deepspeed": "ds_config.json"}
    if is_fsdp(job):
        policy = {"reshard_after_forward": sharding != "fsdp2-noreshard", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        return {"fsdp_version": 2, "fsdp_config": policy | {"offload_params": sharding == "fsdp2-offload"}}
    return {}
