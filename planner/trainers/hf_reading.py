"""What transformers' `TrainingArguments` say of a step, read back: for every program built on its Trainer.

Source: transformers 5.23, `training_args.py`, `trainer_optimizer.py` and `modeling_utils.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.errors import shorten
from optplan.planner.trainers.hf_fields import OPTIMIZERS
from optplan.planner.trainers.reading import Reading

_SILENT = "the file does not say"
_BY_NAME = {name: pair for pair, name in OPTIMIZERS.items()} | {"adamw_8bit": ("adamw-8bit", "bitsandbytes")}
_ATTENTION = {"sdpa": "sdpa", "eager": "eager", "flash_attention_2": "flash"}
_KNOWN_ARGUMENTS = {"sgd": ("momentum",), "galore": ("rank",), "apollo": ("rank", "scale_type")}
_STAGES = {0: "ddp-copies", 1: "zero1-deepspeed", 2: "zero2", 3: "zero3"}


def read_sizes(r: Reading, *, batch: str, default_batch: int) -> None:
    """Micro-batch, accumulation and clipping."""
    r.set("batch_size", r.integer(batch), default=default_batch, why=f"{_SILENT}; the program's default")
    r.set("grad_accum", r.integer("gradient_accumulation_steps"), default=1, why=f"{_SILENT}; the program's default")
    norm = r.number("max_grad_norm")
    if norm is None:
        r.assume("--clip-grad-norm 1.0", f"{_SILENT}; the Trainer's default", flag="clip_grad_norm")
    if norm is None or norm > 0:
        r.flags["clip_grad_norm"] = 1.0 if norm is None else norm


def read_optimizer(r: Reading, *, key: str) -> None:
    """The optimizer by its name for the Trainer, with the arguments that bear on its state."""
    name = r.text(key)
    if name is None:
        r.assume("--optimizer adamw", f"{_SILENT}; adamw_torch_fused is the Trainer's default", flag="optimizer")
        name = "adamw_torch_fused"
    arguments = _arguments(r)
    r.take("optim_target_modules")
    if name not in _BY_NAME:
        r.notes.append(f"the optimizer {shorten(name)} is not modelled: every known one is shown instead")
        return
    optimizer, implementation = _BY_NAME[name]
    r.optimizer = optimizer
    r.options = {"implementation": implementation}
    r.options |= {key: arguments[key] for key in _KNOWN_ARGUMENTS.get(optimizer, ()) if key in arguments}
    if optimizer == "sgd":
        r.options.setdefault("momentum", "0")
    if optimizer == "apollo":
        # The Trainer's default is another than the package's.
        r.options.setdefault("rank", "128")
    if implementation == "bitsandbytes":
        # The Trainer tells bitsandbytes to keep the state of embeddings in 32 bits.
        r.options["hf_embeddings_32bit"] = "true"


def _arguments(r: Reading) -> dict[str, str]:
    """`optim_args`: text such as `rank=64,scale=0.5`, or a table."""
    text = r.take("optim_args")
    arguments = (
        dict(part.split("=", 1) for part in text.replace(" ", "").split(",") if "=" in part)
        if (isinstance(text, str))
        else {}
    )
    for name in r.keys_under("optim_args"):
        arguments[name.removeprefix("optim_args.")] = str(r.take(name))
    return arguments


def read_checkpointing(r: Reading) -> None:
    """Activation checkpointing; without reentrance unless the file asks for it."""
    active = r.boolean("gradient_checkpointing", "activation_checkpointing")
    reentrant = r.boolean(
        "gradient_checkpointing_kwargs.use_reentrant", "activation_checkpointing_kwargs.use_reentrant"
    )
    if active:
        r.flags["checkpointing"] = "full-reentrant" if reentrant else "full"
        if reentrant is None:
            why = "the file does not say use_reentrant; transformers 5 takes false"
            r.assume("--checkpointing full", why, flag="checkpointing")
    else:
        r.flags["checkpointing"] = "none"


def read_attention(r: Reading, key: str, *others: str) -> None:
    """Attention as transformers names it; what it does not name is left to the model."""
    name = r.text(key, *others)
    if name in _ATTENTION:
        r.flags["attention"] = _ATTENTION[name]
    elif name is not None:
        r.notes.append(f"attention {shorten(name)} is not modelled: the model's default is taken")


def read_precision(r: Reading) -> None:
    """Autocast and the dtype of the parameters; without a dtype, that of the checkpoint, which for most is bf16."""
    bf16, fp16 = r.boolean("bf16"), r.boolean("fp16")
    dtype = str(r.take("dtype", "torch_dtype", "model_init_kwargs.dtype", "model_init_kwargs.torch_dtype") or "")
    dtype = dtype.removeprefix("torch.")
    if fp16:
        r.flags["precision"] = "fp16-amp"
    elif dtype in ("float32", "fp32"):
        r.flags["precision"] = "amp" if bf16 else "fp32"
    else:
        r.flags["precision"] = "bf16"
        if dtype not in ("bfloat16", "bf16"):
            why = "the file does not say in which dtype the model is loaded; transformers 5 takes the checkpoint's"
            r.assume("--precision bf16", why, flag="precision")
        if bf16:
            r.notes.append("autocast over bf16 parameters is answered as --precision bf16")


def read_liger(r: Reading) -> None:
    """Liger's kernels; the fused loss is modelled, the others are not."""
    config = {key.rpartition(".")[2]: r.take(key) for key in r.keys_under("liger_kernel_config")}
    if not r.boolean("use_liger_kernel"):
        return
    if config.get("fused_linear_cross_entropy", True):
        r.flags["fused_loss"] = "liger"
    if any(config.get(name, True) for name in ("rms_norm", "rope", "swiglu")):
        r.notes.append("of Liger's kernels only the fused loss is modelled")


def read_sharding(r: Reading) -> None:
    """FSDP, or a DeepSpeed table; a DeepSpeed file that is only named is not opened."""
    r.sharding = "ddp-copies"
    fsdp = r.take("fsdp")
    version = r.take("fsdp_config.version", "fsdp_config.fsdp_version", "fsdp_version")
    reshard = r.take("fsdp_config.reshard_after_forward", "fsdp_config.fsdp_reshard_after_forward")
    offload = r.take("fsdp_config.offload_params", "fsdp_config.fsdp_offload_params")
    named = [key for key in r.keys_under("fsdp_config") if r.take(key) is not None]
    if fsdp or named:
        r.sharding = "fsdp2-offload" if offload else "fsdp2-noreshard" if reshard is False else "fsdp2"
        if version not in (2, "2"):
            r.notes.append("FSDP is answered as FSDP2, torch's fully_shard")
    read_deepspeed(r)


def read_deepspeed(r: Reading) -> None:
    """The stage of an inline DeepSpeed table; its engine has fp32 master weights beside 16-bit parameters."""
    inline = [key for key in r.keys_under("deepspeed") if r.take(key) is not None]
    path = r.take("deepspeed")
    stage = r.take("deepspeed.zero_optimization.stage")
    if isinstance(stage, int) and stage in _STAGES:
        r.sharding = _STAGES[stage]
    elif path:
        r.notes.append(f"the DeepSpeed file {shorten(path)} is not opened: give --sharding, or that file to --from")
    if (inline or path) and r.flags.get("precision") in ("bf16", "amp", "fp16-amp"):
        r.flags["precision"] = "mixed"
        r.notes.append("DeepSpeed keeps fp32 master weights beside 16-bit parameters: --precision mixed")


def refuse_adapters(r: Reading, keys: dict[str, tuple[Any, ...]]) -> None:
    """Refuse a job that trains something else than all parameters.

    Args:
        keys: Key to the values that mean all parameters.

    Raises:
        ConfigError: One of the keys has another value.
    """
    for key, harmless in keys.items():
        value = r.take(key)
        if value is not None and value not in harmless:
            raise r.refuse(key, "trains only a part of the parameters, or quantized ones")


def read_hf_args(r: Reading) -> None:
    """A file of `TrainingArguments`, alone or with the arguments of a script beside them."""
    refuse_adapters(r, {"use_peft": (False,), "lora_r": (0,), "load_in_4bit": (False,), "load_in_8bit": (False,)})
    r.model = r.text("model_name_or_path", "model_name", "model_id", "model")
    read_sizes(r, batch="per_device_train_batch_size", default_batch=8)
    seq_len = r.integer("block_size", "max_seq_length", "max_length", "model_max_length", "max_seq_len")
    if seq_len is None:
        why = f"{_SILENT}; TrainingArguments have no such field"
        r.assume("the model's usual sequence length", why, flag="seq_len")
    else:
        r.flags["seq_len"] = seq_len
    read_precision(r)
    read_optimizer(r, key="optim")
    read_checkpointing(r)
    read_attention(r, "attn_implementation", "model_init_kwargs.attn_implementation")
    read_liger(r)
    read_sharding(r)
