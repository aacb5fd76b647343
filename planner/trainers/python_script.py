"""A training script in plain PyTorch: one file that loads the model, builds the optimizer and takes steps."""

from __future__ import annotations

from optplan.planner.trainers import hf_fields
from optplan.planner.trainers.job import LEARNING_RATE, Export, TrainingJob, is_causal
from optplan.planner.trainers.optimizer_code import OptimizerCode, optimizer_code
from optplan.planner.trainers.python_losses import after_model, before_model, loss_functions, loss_imports
from optplan.planner.trainers.python_sharding import sharding_imports, sharding_lines, zero1_optimizer
from optplan.planner.trainers.shardings import DEEPSPEED, is_distributed, is_fsdp, torchrun
from optplan.planner.trainers.text import head

TARGET = "python"
_AUTOCAST = {"amp": "torch.bfloat16", "fp16-amp": "torch.float16"}
_INDENT = "    "


def write(job: TrainingJob) -> Export:
    """The script; it runs as it is, on random tokens until `batches` is given real ones.

    Raises:
        ConfigError: The job is not one that a plain script runs.
    """
    _check(job)
    code = optimizer_code(job, target=TARGET)
    packages = dict.fromkeys(["transformers", *([code.package] if code.package else [])])
    packages |= {"liger-kernel": None} if job.config.fused_loss == "liger" else {}
    by_hand = [
        f"install {' '.join(packages)}",
        "let batches() yield your own tokens: it makes random ones",
        f"choose the learning rate and a schedule: {LEARNING_RATE} is a placeholder",
    ]
    gpus = job.config.gpus
    return Export(
        target=TARGET,
        file_name="train.py",
        text=_script(job, code, by_hand),
        by_hand=by_hand,
        command=hf_fields.launch(job, "python train.py" if gpus == 1 else torchrun(job, "train.py")),
    )


def _check(job: TrainingJob) -> None:
    config = job.config
    if not is_causal(job.spec):
        raise job.refuse(TARGET, "the script trains causal language models only", instead="hf-args")
    if config.sharding in DEEPSPEED:
        raise job.refuse(TARGET, f"{config.sharding} is DeepSpeed's", instead="deepspeed")
    if config.step_in_backward and (config.precision in ("mixed", "fp16-amp") or is_distributed(job)):
        raise job.refuse(TARGET, "the script steps within backward on one GPU, without master weights or loss scaling")


def _script(job: TrainingJob, code: OptimizerCode, by_hand: list[str]) -> str:
    config = job.config
    constants = {
        "MODEL": repr(job.model),
        "BATCH_SIZE": config.batch_size,
        "SEQ_LEN": config.seq_len,
        "GRAD_ACCUM": config.grad_accum,
        "LEARNING_RATE": LEARNING_RATE,
    }
    blocks = [
        _imports(job, code),
        [f"{name} = {value}" for name, value in constants.items()],
        *loss_functions(job),
        _model_function(job),
        _optimizer_function(job, code),
        _batches_function(job),
        _main_function(job),
        ['if __name__ == "__main__":', f"{_INDENT}main()"],
    ]
    return head(by_hand) + "\n\n\n".join("\n".join(block) for block in blocks) + "\n"


def _imports(job: TrainingJob, code: OptimizerCode) -> list[str]:
    lines = ["import argparse", *(["import os"] if is_distributed(job) else []), "", "import torch"]
    lines += ["import torch.distributed as dist"] if is_distributed(job) else []
    lines += sharding_imports(job)
    lines += loss_imports(job)
    if job.config.checkpointing == "selective" or job.config.fused_loss == "chunked":
        lines.append("from torch.utils.checkpoint import checkpoint")
    lines += [line for line in code.imports if line != "import torch"]
    return [*lines, "from transformers import AutoModelForCausalLM"]


def _model_function(job: TrainingJob) -> list[str]:
    config = job.config
    dtype = hf_fields.model_dtype(job)
    if config.precision == "mixed" and is_fsdp(job):
        dtype = "float32"
    attention = hf_fields.ATTENTION[config.attention]
    body = [
        f'model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.{dtype}, attn_implementation="{attention}")',
        "model.to(device).train()",
        *_checkpointing(config.checkpointing),
        *after_model(job),
    ]
    body = [*before_model(job), *body]
    return ["def load_model(device):", *(_INDENT + line for line in [*body, *sharding_lines(job), "return model"])]


def _checkpointing(kind: str) -> list[str]:
    if kind == "none":
        return []
    if kind == "selective":
        return [
            "layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))",
            "for layer in list(layers)[::2]:",
            "    forward = layer.forward",
            "    layer.forward = lambda *a, _f=forward, **k: checkpoint(_f, *a, use_reentrant=False, **k)",
        ]
    reentrant = kind == "full-reentrant"
    return [f'model.gradient_checkpointing_enable({{"use_reentrant": {reentrant}}})']


def _has_masters(job: TrainingJob) -> bool:
    """Whether the script keeps fp32 copies of the parameters itself; FSDP has them in its shards."""
    return job.config.precision == "mixed" and not is_fsdp(job)


def _optimizer_function(job: TrainingJob, code: OptimizerCode) -> list[str]:
    before = list(code.before)
    if job.config.sharding == "zero1":
        return zero1_optimizer(job, code, target=TARGET)
    if job.config.step_in_backward:
        return _optimizers_in_backward(job, code)
    if _has_masters(job):
        if not code.takes_parameters_alone:
            raise job.refuse(TARGET, f"{job.optimizer} needs the model itself, not master weights beside it")
        masters = "masters = [p.detach().float().requires_grad_() for p in model.parameters()]"
        built = code.expression("LEARNING_RATE", arguments="masters")
        return ["def make_optimizer(model):", _INDENT + masters, f"{_INDENT}return {built}, masters"]
    built = code.expression("LEARNING_RATE")
    return ["def make_optimizer(model):", *(_INDENT + line for line in [*before, f"return {built}"])]


def _optimizers_in_backward(job: TrainingJob, code: OptimizerCode) -> list[str]:
    if not code.takes_parameters_alone:
        raise job.refuse(TARGET, f"{job.optimizer} needs the model itself, not one parameter at a time")
    built = code.expression("LEARNING_RATE", arguments="[p]")
    return [
        "def step_in_backward(model):",
        f"    optimizers = {{p: {built} for p in model.parameters()}}",
        "",
        "    def step(p):",
        "        optimizers[p].step()",
        "        optimizers[p].zero_grad()",
        "",
        "    for p in model.parameters():",
        "        p.register_post_accumulate_grad_hook(step)",
    ]


def _batches_function(job: TrainingJob) -> list[str]:
    mask = ', "attention_mask": torch.ones_like(tokens)' if job.config.padding_mask else ""
    return [
        "def batches(vocab_size, device):",
        "    while True:",
        "        tokens = torch.randint(vocab_size, (BATCH_SIZE, SEQ_LEN), device=device)",
        f'        yield {{"input_ids": tokens, "labels": tokens{mask}}}',
    ]


def _main_function(job: TrainingJob) -> list[str]:
    device = 'torch.device("cuda" if torch.cuda.is_available() else "cpu")'
    body = [
        "parser = argparse.ArgumentParser()",
        'parser.add_argument("--steps", type=int, default=1000)',
        "num_steps = parser.parse_args().steps",
    ]
    if is_distributed(job):
        device = 'torch.device("cuda", int(os.environ["LOCAL_RANK"]))'
        body += [f"device = {device}", "torch.cuda.set_device(device)", 'dist.init_process_group("nccl")']
    else:
        body.append(f"device = {device}")
    body.append("model = load_model(device)")
    owner = "model.module" if is_distributed(job) and not is_fsdp(job) else "model"
    body += _setup(job)
    body += [
        f"data = batches({owner}.config.vocab_size, device)",
        "for step in range(num_steps):",
        *(_INDENT + line for line in _step(job)),
        '    print(f"step {step + 1}: loss {loss.item():.4f}")',
    ]
    if is_distributed(job):
        body.append("dist.destroy_process_group()")
    return ["def main():", *(_INDENT + line for line in body)]


def _setup(job: TrainingJob) -> list[str]:
    if job.config.step_in_backward:
        return ["step_in_backward(model)"]
    target = "optimizer, masters" if _has_masters(job) else "optimizer"
    lines = [f"{target} = make_optimizer(model)"]
    return [*lines, "scaler = torch.amp.GradScaler(device.type)"] if job.config.precision == "fp16-amp" else lines


def _step(job: TrainingJob) -> list[str]:
    """One optimizer step: the micro-batches, clipping, the step itself, and the gradients let go."""
    config = job.config
    scaled = config.precision == "fp16-amp"
    loss = "loss = model(**next(data)).loss"
    lines = (
        [f"with torch.autocast(device.type, {_AUTOCAST[config.precision]}):", _INDENT + loss]
        if (config.precision in _AUTOCAST)
        else [loss]
    )
    part = " / GRAD_ACCUM" if config.grad_accum > 1 else ""
    value = f"(loss{part})" if part else "loss"
    lines.append(f"scaler.scale({value}).backward()" if scaled else f"{value}.backward()")
    if config.grad_accum > 1:
        lines = ["for _ in range(GRAD_ACCUM):", *(_INDENT + line for line in lines)]
    return lines + _after_backward(job)


def _after_backward(job: TrainingJob) -> list[str]:
    config = job.config
    if config.step_in_backward:
        return ["torch.cuda.empty_cache()"] if config.empty_cache else []
    scaled, norm = config.precision == "fp16-amp", config.clip_grad_norm
    lines = ["scaler.unscale_(optimizer)"] if scaled and norm is not None else []
    if norm is not None:
        lines.append(f"torch.nn.utils.clip_grad_norm_(model.parameters(), {norm})")
    if _has_masters(job):
        lines += ["for p, master in zip(model.parameters(), masters):", "    master.grad = p.grad.float()"]
    lines += ["scaler.step(optimizer)", "scaler.update()"] if scaled else ["optimizer.step()"]
    if _has_masters(job):
        lines += [
            "with torch.no_grad():",
            "    for p, master in zip(model.parameters(), masters):",
            "        p.copy_(master)",
            "        master.grad = None",
        ]
    kept = "set_to_none=False" if config.keep_grads else ""
    lines.append(f"model.zero_grad({kept})")
    return [*lines, "torch.cuda.empty_cache()"] if config.empty_cache else lines
