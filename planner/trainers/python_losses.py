"""The loss of a training script: Liger's, or one in chunks written out."""

from __future__ import annotations

from optplan.planner.step.fused_losses import NUM_CHUNKS
from optplan.planner.trainers.job import TrainingJob


def loss_imports(job: TrainingJob) -> list[str]:
    """What the script imports for its loss."""
    if job.config.fused_loss != "chunked":
        return []
    return ["from types import MethodType", "from transformers.modeling_outputs import CausalLMOutput"]


def loss_functions(job: TrainingJob) -> list[list[str]]:
    """The script's functions for its loss."""
    if job.config.fused_loss != "chunked":
        return []
    cap = job.spec.config.get("final_logit_softcapping")
    capped = [f"    logits = logits / {cap}", "    logits = torch.tanh(logits)", f"    logits = logits * {cap}"]
    return [
        [
            "def chunk_loss(model, hidden, labels):",
            "    logits = model.get_output_embeddings()(hidden)",
            *(capped if cap else []),
            '    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")',
        ],
        [
            "def chunked_forward(model, labels, **inputs):",
            "    hidden = model.base_model(**inputs)[0].flatten(0, 1)",
            "    labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()",
            "    total = 0",
            f"    for part, wanted in zip(hidden.chunk({NUM_CHUNKS}), labels.chunk({NUM_CHUNKS})):",
            "        total = total + checkpoint(chunk_loss, model, part, wanted, use_reentrant=False)",
            "    return CausalLMOutput(loss=total / (labels != -100).sum())",
        ],
    ]


def before_model(job: TrainingJob) -> list[str]:
    """What the script does before the model is built."""
    if job.config.fused_loss != "liger":
        return []
    return [
        "from liger_kernel.transformers.monkey_patch import _apply_liger_kernel",
        "",
        "kernels = dict(rope=False, cross_entropy=False, rms_norm=False, swiglu=False)",
        f"_apply_liger_kernel({job.spec.model_type!r}, fused_linear_cross_entropy=True, **kernels)",
    ]


def after_model(job: TrainingJob) -> list[str]:
    """What the script does to the model that is built."""
    return ["model.forward = MethodType(chunked_forward, model)"] if job.config.fused_loss == "chunked" else []
