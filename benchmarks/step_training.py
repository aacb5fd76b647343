"""How a measured case builds its transformers model, what it feeds it and how it takes a training step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)
from transformers.initialization import no_init_weights

MODEL_CLASSES = {
    "bert": AutoModelForMaskedLM,
    "roberta": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
    "vit": AutoModelForImageClassification,
}
"""By `model_type`; all others are language models."""

CHECKPOINTING: dict[Any, dict[str, Any]] = {
    True: {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "full-reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "selective": {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "every_n_layers": 2},
}


def build_model(case: dict[str, Any]) -> Any:
    """The case's model on the GPU, parameters placed one by one as `module.to("cuda")` does, but not copied."""
    fields = dict(case["config"])
    auto = MODEL_CLASSES.get(fields["model_type"], AutoModelForCausalLM)
    model_type = fields.pop("model_type")
    cache = {} if model_type == "vit" else {"use_cache": False}
    config = AutoConfig.for_model(model_type, **fields, **cache)
    dtype = torch.bfloat16 if case["precision"] == "bf16" else torch.float32
    with no_init_weights():
        model = auto.from_config(config, attn_implementation=case["attention"], dtype=dtype)
    model.tie_weights()
    model._apply(lambda tensor: _placed(tensor, torch.device("cuda", torch.cuda.current_device())))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    if case["checkpointing"]:
        model.gradient_checkpointing_enable(**CHECKPOINTING[case["checkpointing"]])
    if case.get("fused_loss") == "liger":
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        kept = dict.fromkeys(("rope", "rms_norm", "swiglu", "geglu", "cross_entropy"), False)
        _apply_liger_kernel_to_instance(model, **kept, fused_linear_cross_entropy=True)
    elif case.get("fused_loss") == "chunked":
        from optplan.profilers.workloads.fused_losses import fuse_loss

        fuse_loss(model, "chunked")
    return model.train()


def _placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A parameter gets its values afterwards, a buffer has them."""
    if tensor.device == device or not isinstance(tensor, torch.nn.Parameter):
        return tensor.to(device)
    return torch.empty_like(tensor, device=device)


def build_optimizer(case: dict[str, Any], parameters: Any) -> torch.optim.Optimizer:
    """The case's optimizer."""
    if case["optimizer"] == "sgd":
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=True)
    return torch.optim.AdamW(
        parameters, lr=1e-4, **{"adamw": {"fused": True}, "adamw_foreach": {"foreach": True}}[case["optimizer"]]
    )


def build_inputs(case: dict[str, Any], model: Any) -> dict[str, torch.Tensor]:
    """What the model is called with: random tokens that are their own labels, or random images."""
    config, batch = model.config, case["batch"]
    if config.model_type == "vit":
        shape = (batch, config.num_channels, config.image_size, config.image_size)
        images = torch.randn(shape, device="cuda", dtype=next(model.parameters()).dtype)
        return {"pixel_values": images, "labels": torch.randint(0, config.num_labels, (batch,), device="cuda")}
    tokens = torch.randint(0, config.vocab_size, (batch, case["seq"]), device="cuda")
    inputs = {"input_ids": tokens, "labels": tokens}
    if case.get("padding_mask"):
        inputs["attention_mask"] = torch.ones_like(tokens)
        inputs["attention_mask"][:, -(case["seq"] // 8) :] = 0
    return inputs


def memory_now() -> dict[str, int]:
    """Peaks since the last reset and the current allocated bytes."""
    stats = torch.cuda.memory_stats()
    return {
        "peak": stats["allocated_bytes.all.peak"],
        "cur": stats["allocated_bytes.all.current"],
        "req_peak": stats["requested_bytes.all.peak"],
        "res_peak": stats["reserved_bytes.all.peak"],
    }


class Step:
    """Runs training steps, measuring each phase."""

    def __init__(self, case: dict[str, Any], model: Any) -> None:
        self.case = case
        self.model = model
        self.parameters = list(model.parameters())
        self.optimizers = [build_optimizer(case, group) for group in self._groups()]
        if case.get("step_in_backward"):
            self._step_as_gradients_come()
        self.inputs = build_inputs(case, model)
        self.phases: dict[str, dict[str, int]] = {}
        self.starts_us: dict[str, int] = {}

    def _groups(self) -> list[list[torch.nn.Parameter]]:
        return [[p] for p in self.parameters] if self.case.get("step_in_backward") else [self.parameters]

    def _step_as_gradients_come(self) -> None:
        by_parameter = dict(zip(self.parameters, self.optimizers, strict=True))

        def take(parameter: torch.Tensor) -> None:
            by_parameter[parameter].step()  # type: ignore[index]
            by_parameter[parameter].zero_grad(set_to_none=True)  # type: ignore[index]

        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(take)

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state on the GPU."""
        return sum(
            value.untyped_storage().nbytes()
            for optimizer in self.optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value) and value.is_cuda
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the body as the phase `name`; a later phase of the same name replaces it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        time.sleep(0.002)
        self.starts_us[name] = time.time_ns() // 1000
        time.sleep(0.002)
        yield
        torch.cuda.synchronize()
        self.phases[name] = memory_now()

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the forward pass runs."""
        return torch.autocast("cuda", torch.bfloat16) if self.case["precision"] == "amp" else nullcontext()

    def run(self) -> dict[str, dict[str, int]]:
        """One step; its phases."""
        self.phases = {}
        for _ in range(self.case["grad_accum"]):
            with self.phase("forward"), self.autocast():
                loss = self.model(**self.inputs).loss
            with self.phase("backward"):
                loss.backward()
            del loss
        if "clip_grad_norm" in self.case:
            with self.phase("clip"):
                torch.nn.utils.clip_grad_norm_(self.parameters, self.case["clip_grad_norm"])
        if not self.case.get("step_in_backward"):
            with self.phase("step"):
                self.optimizers[0].step()
            with self.phase("zero"):
                self.optimizers[0].zero_grad(set_to_none=not self.case.get("keep_grads", False))
        if self.case.get("empty_cache"):
            torch.cuda.empty_cache()
        return self.phases
