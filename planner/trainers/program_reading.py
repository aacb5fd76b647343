"""The job files of axolotl, LLaMA-Factory, torchtitan, torchtune and DeepSpeed, read.

Sources: axolotl 0.19.0, LLaMA-Factory 0.9.5, torchtitan 0.2.2, torchtune 0.6.1, DeepSpeed 0.19.8: their schemas and
the defaults in them.
"""

from __future__ import annotations

import re

from optplan.planner.errors import shorten
from optplan.planner.trainers import hf_reading as hf
from optplan.planner.trainers.reading import Reading
from optplan.planner.trainers.torchtitan import FLAVORS

_DEFAULT = "the file does not say; the program's default"


def read_axolotl(r: Reading) -> None:
    """YAML for axolotl, which loads the model in bf16 where bf16 is set."""
    none = (None, False, "")
    hf.refuse_adapters(r, {"adapter": none, "load_in_4bit": none, "load_in_8bit": none, "relora": none, "rl": none})
    r.model = r.text("base_model")
    hf.read_sizes(r, batch="micro_batch_size", default_batch=1)
    r.set("seq_len", r.integer("sequence_len"), default=512, why=_DEFAULT)
    sixteen = r.take("bf16"), r.take("bfloat16"), r.take("fp16"), r.take("float16")
    r.take("float32")
    if sixteen[0] or sixteen[1]:
        r.flags["precision"] = "bf16"
        r.notes.append("autocast over bf16 parameters is answered as --precision bf16")
    elif sixteen[2] or sixteen[3]:
        r.flags["precision"] = "fp16-amp"
        r.notes.append("fp16 parameters are answered as --precision fp16-amp, whose parameters are fp32")
    else:
        r.flags["precision"] = "fp32"
        r.assume("--precision fp32", "the file sets neither bf16 nor fp16", flag="precision")
    own = {"ao_adamw_fp8": ("adamw-fp8", "torchao"), "ao_adamw_8bit": ("adamw-8bit", "torchao"),
           "ao_adamw_4bit": ("adamw-4bit", "torchao"), "came_pytorch": ("came", "came_pytorch"),
           "flash_adamw": ("flash-adamw", "official")}  # fmt: skip
    name = r.text("optimizer")
    if name in own:
        r.optimizer, r.options = own[name][0], {"implementation": own[name][1]}
    else:
        hf.read_optimizer(r, key="optimizer")
    if isinstance(r.take("gradient_checkpointing"), str):
        r.flags["checkpointing"] = "full"
        r.leave_out("gradient_checkpointing")
    else:
        hf.read_checkpointing(r)
    hf.read_attention(r, "attn_implementation")
    for key, attention in (("flash_attention", "flash"), ("sdp_attention", "sdpa"), ("eager_attention", "eager")):
        if r.boolean(key):
            r.flags["attention"] = attention
    if r.boolean("liger_fused_linear_cross_entropy"):
        r.flags["fused_loss"] = "liger"
    hf.read_sharding(r)


def read_llama_factory(r: Reading) -> None:
    """LLaMA-Factory's YAML; bf16 trains fp32 parameters under autocast, pure_bf16 trains bf16 ones."""
    tuning = r.text("finetuning_type")
    if tuning != "full":
        raise r.refuse("finetuning_type", "trains an adapter (the program's default is lora)")
    hf.refuse_adapters(r, {"quantization_bit": (), "adapter_name_or_path": (), "use_badam": (False,)})
    r.model = r.text("model_name_or_path")
    hf.read_sizes(r, batch="per_device_train_batch_size", default_batch=8)
    r.set("seq_len", r.integer("cutoff_len"), default=2048, why=_DEFAULT)
    pure, bf16, fp16 = r.boolean("pure_bf16"), r.boolean("bf16"), r.boolean("fp16")
    r.flags["precision"] = "bf16" if pure else "amp" if bf16 else "fp16-amp" if fp16 else "fp32"
    _llama_factory_optimizer(r)
    disabled, reentrant = r.boolean("disable_gradient_checkpointing"), r.boolean("use_reentrant_gc")
    r.flags["checkpointing"] = "none" if disabled else "full" if reentrant is False else "full-reentrant"
    if disabled is None:
        why = "LLaMA-Factory checkpoints unless told otherwise"
        r.assume(f"--checkpointing {r.flags['checkpointing']}", why, flag="checkpointing")
    attention = {"fa2": "flash", "sdpa": "sdpa", "disabled": "eager"}.get(r.text("flash_attn") or "")
    if attention is not None:
        r.flags["attention"] = attention
    if r.boolean("enable_liger_kernel"):
        r.flags["fused_loss"] = "liger"
        r.notes.append("of Liger's kernels only the fused loss is modelled")
    hf.read_sharding(r)


def _llama_factory_optimizer(r: Reading) -> None:
    if r.boolean("use_adam_mini"):
        r.optimizer, r.options = "adam-mini", {"implementation": "official"}
        r.take("optim")
        return
    for name in ("galore", "apollo"):
        rank = r.integer(f"{name}_rank")
        if r.boolean(f"use_{name}"):
            r.optimizer, r.options = name, {"rank": str(rank or 16)}
            r.take("optim")
            r.notes.append(f"{name} is answered with every nn.Linear projected; LLaMA-Factory leaves out lm_head")
            return
    if r.boolean("use_muon"):
        r.optimizer = "muon"
        r.take("optim")
        return
    hf.read_optimizer(r, key="optim")


def read_torchtitan(r: Reading) -> None:
    """TOML for torchtitan, as its versions up to 0.2 read it."""
    pair = r.text("model.name") or "llama3", r.text("model.flavor") or "debugmodel"
    r.model = FLAVORS.get(pair)
    if r.model is None:
        r.notes.append(f"torchtitan's {shorten(pair[0])} {shorten(pair[1])} is not in the catalogue")
    r.notes.append("torchtitan has its own model code: the estimate is of transformers'")
    r.set("batch_size", r.integer("training.local_batch_size", "training.batch_size"), default=8, why=_DEFAULT)
    r.set("seq_len", r.integer("training.seq_len"), default=2048, why=_DEFAULT)
    norm = r.number("training.max_norm")
    r.set("clip_grad_norm", norm, default=1.0, why=_DEFAULT)
    _titan_parallelism(r)
    _titan_precision(r)
    _titan_accumulation(r)
    name = r.text("optimizer.name") or "AdamW"
    implementation = r.text("optimizer.implementation") or "fused"
    if name in ("Adam", "AdamW"):
        r.optimizer, r.options = "adamw", {"implementation": implementation}
    else:
        r.notes.append(f"the optimizer {shorten(name)} is not modelled: every known one is shown instead")
    if r.boolean("optimizer.early_step_in_backward"):
        r.flags["step_in_backward"] = True
    mode = r.text("activation_checkpoint.mode")
    option = str(r.take("activation_checkpoint.selective_ac_option") or "2")
    r.set("checkpointing", None if mode is None else mode, default="selective", why=_DEFAULT)
    if r.flags["checkpointing"] == "selective" and option != "2":
        r.notes.append(f"selective_ac_option {shorten(option)} is answered as every second layer")


def _titan_parallelism(r: Reading) -> None:
    replicas = r.integer("parallelism.data_parallel_replicate_degree") or 1
    shards = r.integer("parallelism.data_parallel_shard_degree")
    policy = r.text("parallelism.fsdp_reshard_after_forward")
    r.sharding = "fsdp2-noreshard" if policy == "never" else "fsdp2"
    if r.boolean("training.enable_cpu_offload"):
        r.sharding = "fsdp2-offload"
    if shards == 1:
        r.sharding = "ddp-copies"
    if shards is not None and shards > 0:
        r.gpus = shards * replicas
        if shards > 1 and replicas > 1:
            r.sharding = "fsdp2-hybrid"
            r.flags["nodes"] = replicas


def _titan_precision(r: Reading) -> None:
    dtype = r.text("training.dtype") or "float32"
    compute = r.text("training.mixed_precision_param") or "bfloat16"
    if dtype == "bfloat16":
        r.flags["precision"] = "bf16"
    elif compute == "float32":
        r.flags["precision"] = "fp32"
    else:
        # FSDP's policy casts the shards; on one GPU the same is autocast.
        sharded = r.sharding.startswith("fsdp2") and r.gpus not in (None, 1)
        r.flags["precision"] = "mixed" if sharded else "amp"


def _titan_accumulation(r: Reading) -> None:
    total = r.integer("training.global_batch_size")
    each = max(1, r.flags["batch_size"] * (r.gpus or 1))
    if total is not None and total > 0:
        r.flags["grad_accum"] = max(1, total // each)


_TUNE_MODELS = (
    (r"llama2_(7b|13b|70b)", "llama-2-{}"),
    (r"code_llama2_(7b|13b|70b)", "codellama-{}"),
    (r"llama3_(8b|70b)", "llama-3-{}"),
    (r"llama3_1_(8b|70b|405b)", "llama-3.1-{}"),
    (r"llama3_2_(1b|3b)", "llama-3.2-{}"),
    (r"mistral_(7b)", "mistral-{}-v0.1"),
    (r"gemma_(2b|7b)", "gemma-{}"),
    (r"gemma2_(2b|9b|27b)", "gemma-2-{}"),
    (r"phi3_(mini)", "phi-3-{}"),
    (r"phi(4)_14b", "phi-{}"),
    (r"qwen2_5_(\d+(?:_\d)?b)(?:_base|_instruct)?", "qwen2.5-{}"),
)
_TUNE_OPTIMIZERS = {
    "torch.optim.AdamW": "adamw",
    "torch.optim.SGD": "sgd",
    "torch.optim.Adafactor": "adafactor",
    "bitsandbytes.optim.AdamW8bit": "adamw-8bit",
    "bitsandbytes.optim.PagedAdamW8bit": "paged-adamw-8bit",
}


def read_torchtune(r: Reading) -> None:
    """YAML for torchtune; its components are named by import path, which is compared and never imported."""
    component = r.text("model._component_") or ""
    name = component.rpartition(".")[2]
    if name.startswith(("lora_", "qlora_", "dora_")):
        raise r.refuse("model._component_", "trains an adapter")
    r.model = _tune_model(name)
    if r.model is None:
        r.notes.append(f"torchtune's {shorten(name)} is not in the catalogue")
    r.notes.append("torchtune has its own model code: the estimate is of transformers'")
    r.set("batch_size", r.integer("batch_size"), default=1, why="the file does not say")
    r.set("grad_accum", r.integer("gradient_accumulation_steps"), default=1, why="the file does not say")
    seq_len = r.integer("tokenizer.max_seq_len")
    if seq_len is None:
        why = "tokenizer.max_seq_len is not set: samples have any length"
        r.assume("the model's usual sequence length", why, flag="seq_len")
    else:
        r.flags["seq_len"] = seq_len
    norm = r.number("clip_grad_norm")
    if norm is not None:
        r.flags["clip_grad_norm"] = norm
    r.set("precision", r.text("dtype"), default="bf16", why="the file does not say")
    r.flags["checkpointing"] = "full" if r.boolean("enable_activation_checkpointing") else "none"
    if r.boolean("optimizer_in_bwd"):
        r.flags["step_in_backward"] = True
    _tune_optimizer(r)
    r.sharding = "fsdp2-noreshard" if r.boolean("fsdp_reshard_after_forward") is False else "fsdp2"
    if r.boolean("fsdp_cpu_offload"):
        r.sharding = "fsdp2-offload"


def _tune_model(name: str) -> str | None:
    for pattern, model in _TUNE_MODELS:
        found = re.fullmatch(pattern, name)
        if found:
            return model.format(found.group(1).replace("_", "."))
    return None


def _tune_optimizer(r: Reading) -> None:
    component = r.text("optimizer._component_") or ""
    fused, foreach = r.boolean("optimizer.fused"), r.boolean("optimizer.foreach")
    momentum = r.number("optimizer.momentum")
    torchao = re.fullmatch(r"torchao\..*\.(AdamW8bit|AdamW4bit|AdamWFp8)", component)
    if torchao:
        names = {"AdamW8bit": "adamw-8bit", "AdamW4bit": "adamw-4bit", "AdamWFp8": "adamw-fp8"}
        r.optimizer, r.options = names[torchao.group(1)], {"implementation": "torchao"}
        return
    if component not in _TUNE_OPTIMIZERS:
        r.notes.append(f"the optimizer {shorten(component)} is not modelled: every known one is shown instead")
        return
    r.optimizer = _TUNE_OPTIMIZERS[component]
    if r.optimizer in ("adamw", "sgd"):
        kind = "fused" if fused else "for-loop" if foreach is False else "foreach"
        r.options = {"implementation": kind} | ({"momentum": str(momentum or 0)} if r.optimizer == "sgd" else {})


def read_deepspeed(r: Reading) -> None:
    """A DeepSpeed configuration, which knows neither model nor sequence length; `auto` is the Trainer's to fill in."""
    numbers = {"batch_size": "train_micro_batch_size_per_gpu", "grad_accum": "gradient_accumulation_steps"}
    for flag, key in numbers.items():
        value = r.take(key)
        r.set(flag, None if value == "auto" else r.integer(key), default=1, why="the file does not say, or says auto")
    norm = r.take("gradient_clipping")
    if norm not in (None, "auto", 0, 0.0):
        r.flags["clip_grad_norm"] = r.number("gradient_clipping")
    r.assume("the model's usual sequence length", "a DeepSpeed file has no such field", flag="seq_len")
    _deepspeed_precision(r)
    stage = r.integer("zero_optimization.stage") or 0
    r.sharding = {0: "ddp-copies", 1: "zero1-deepspeed", 2: "zero2", 3: "zero3"}.get(stage, "ddp-copies")
    for key in ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device"):
        if r.take(key) not in (None, "none"):
            r.leave_out(key)
    name = r.text("optimizer.type")
    torch_adam = r.boolean("optimizer.params.torch_adam")
    r.take("zero_allow_untested_optimizer")
    if name is None or name.lower() not in ("adam", "adamw"):
        r.notes.append("the file names no optimizer that is modelled: every known one is shown")
        return
    r.optimizer, r.options = "adamw", {"implementation": "foreach" if torch_adam else "fused"}


def _deepspeed_precision(r: Reading) -> None:
    """`bf16` keeps fp32 master weights unless told otherwise; autocast leaves the parameters in fp32."""
    bf16, fp16 = r.take("bf16.enabled"), r.take("fp16.enabled")
    pure = r.take("bf16.bf16_master_weights_and_grads") and r.take("bf16.bf16_optimizer_states")
    autocast, dtype = r.take("torch_autocast.enabled"), r.take("torch_autocast.dtype")
    if autocast is True:
        r.flags["precision"] = "fp16-amp" if dtype in ("float16", "torch.float16") else "amp"
    elif bf16 is True:
        r.flags["precision"] = "bf16" if pure else "mixed"
    elif fp16 is True:
        r.flags["precision"] = "mixed"
        r.notes.append("fp16 with fp32 master weights is answered as --precision mixed: the bytes are the same")
    elif bf16 == "auto" or fp16 == "auto":
        r.flags["precision"] = "mixed"
        r.assume("--precision mixed", "the file says auto", flag="precision")
    else:
        r.flags["precision"] = "fp32"
        why = "the file enables neither bf16, fp16 nor torch_autocast"
        r.assume("--precision fp32", why, flag="precision")
